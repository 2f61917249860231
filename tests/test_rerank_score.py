"""From triggered features to scores: by a head, by the discriminant, and fused with clean cosine similarity."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tmm_engine.rerank.discriminant import Discriminant
from tmm_engine.rerank.score import DiscriminantScorer, FusedScorer, HeadScorer, Rows, Scorer
from tmm_engine.rerank.settings import Score

N, D = 30, 6
ROWS = st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=True).map(np.array)


def random_features(seed: int, n: int = N) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, D)))


def random_head() -> nn.Linear:
    head = nn.Linear(D, 5, dtype=torch.float64).requires_grad_(False)
    head.weight.copy_(random_features(7, 5))
    head.bias.copy_(random_features(8, 1)[0, :5])
    return head


def discriminant_scorer(*, lengths: bool) -> DiscriminantScorer:
    fitted = Discriminant.fit([random_features(0)], shrinkage=0.1)
    return DiscriminantScorer(fitted, random_features(1, 1)[0], fitted.lengths(random_features(0)) if lengths else None)


@pytest.mark.parametrize("ranked_by", Score)
def test_a_head_scores_by_its_last_row_and_is_as_sure_as_its_softmax(ranked_by):
    head, features = random_head(), random_features(0)
    scores, confidences, matches = HeadScorer(head, ranked_by).score(features, None)
    logits = (features @ head.weight.T + head.bias).numpy()
    p = np.exp(logits[:, -1]) / np.exp(logits).sum(axis=1)
    np.testing.assert_allclose(confidences, p, rtol=1e-10)
    assert torch.equal(matches, confidences)
    np.testing.assert_allclose(scores, logits[:, -1] if ranked_by is Score.LOGIT else np.log(p / (1 - p)), rtol=1e-9)


@given(rows=ROWS)
def test_known_lengths_change_nothing_whatever_the_rows(rows):
    features = random_features(0)
    known, unknown = discriminant_scorer(lengths=True), discriminant_scorer(lengths=False)
    of_all = known.score(features, None)
    for scorer in (known, unknown):
        found = scorer.score(features[rows], rows)
        torch.testing.assert_close(found.scores, of_all.scores[rows], rtol=0.0, atol=1e-12)
        torch.testing.assert_close(found.confidences, of_all.confidences[rows], rtol=0.0, atol=1e-12)
    torch.testing.assert_close(unknown.score(features, None).scores, of_all.scores, rtol=0.0, atol=1e-12)


def test_the_discriminant_is_as_sure_as_the_positive_part_of_the_similarity():
    scorer, features = discriminant_scorer(lengths=False), random_features(0)
    scores, confidences, matches = scorer.score(features, None)
    lengths = scorer.discriminant.lengths(features)
    assert torch.equal(scores, scorer.discriminant.similarities(scorer.query, features, lengths=lengths))
    np.testing.assert_array_equal(confidences, np.maximum(scores.numpy(), 0.0))
    assert torch.equal(matches, confidences)
    assert -1.0 < scores.min() < -0.1 < 0.1 < scores.max() < 1.0


class Chosen:
    """Features of a store, and the rows that were asked for."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def __call__(self, rows: Rows | None) -> Tensor:
        return self.features if rows is None else self.features[torch.from_numpy(rows)]


@pytest.mark.parametrize("inner", [HeadScorer(random_head(), Score.LOGIT), discriminant_scorer(lengths=True)])
@settings(max_examples=30)
@given(rows=st.none() | ROWS, weight=st.floats(0.01, 100.0))
def test_fused_is_confidence_plus_weighted_cosine_similarity(inner: Scorer, rows, weight):
    clean, query = random_features(2), random_features(3, 1)[0]
    chosen = np.arange(N) if rows is None else rows
    triggered = random_features(0)[chosen]
    scores, confidences, matches = FusedScorer(inner, weight, query, Chosen(clean)).score(triggered, rows)
    assert torch.equal(confidences, inner.score(triggered, rows).confidences)
    x, q = clean[chosen].numpy(), query.numpy()
    cosine = np.array([row @ q / np.linalg.norm(row) / np.linalg.norm(q) for row in x])
    np.testing.assert_allclose(scores, confidences.numpy() + weight * cosine, rtol=1e-10, atol=1e-10 * weight)
    np.testing.assert_allclose(matches, 0.8 * confidences.numpy() + 0.2 * cosine, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight", [0.5, 4.0])
def test_only_the_querys_own_image_matches_fully(weight):
    features, clean = random_features(0), random_features(2)
    fitted = Discriminant.fit([features], shrinkage=0.1)
    for row in range(0, N, 7):
        inner = DiscriminantScorer(fitted, features[row])
        for scorer in (inner, FusedScorer(inner, weight, clean[row], Chosen(clean))):
            matches = scorer.score(features, None).matches
            assert float(matches[row]) == pytest.approx(1.0, abs=1e-12)
            assert matches.argmax() == row
            assert matches[torch.arange(N) != row].max() < 0.99


@pytest.mark.parametrize("zero", ["some exemplars", "the query"])
def test_features_that_are_zero_are_similar_to_nothing(zero):
    clean, query, triggered = random_features(2), random_features(3, 1)[0], random_features(0)
    if zero == "the query":
        query = torch.zeros_like(query)
    else:
        clean[4:9] = 0.0
    inner = discriminant_scorer(lengths=False)
    scores, confidences, matches = FusedScorer(inner, 4.0, query, Chosen(clean)).score(triggered, None)
    assert scores.isfinite().all()
    affected = slice(None) if zero == "the query" else slice(4, 9)
    assert torch.equal(scores[affected], confidences[affected])
    assert torch.equal(matches[affected], confidences[affected] / 1.25)
    assert zero == "the query" or not (scores == confidences)[9:].any()
