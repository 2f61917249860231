"""Attacks against what a method ranks by: embeddings say what scores say, and an adaptive attack moves them farther."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.digits import IMAGES, LABELS, make_classifier
from tmm_engine.bench.attack import features_of
from tmm_engine.bench.methods import Method
from tmm_engine.bench.noise import Family, Perturbation
from tmm_engine.bench.retrievers import Retriever, TmmRetriever
from tmm_engine.bench.self_retrieval import scores_under
from tmm_engine.bench.suite import Suite
from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.sources.arrays import ArraySource

N = 40
METHODS = (
    "l2",
    "cosine",
    "l2,stretch=true",
    "cosine,stretch=true",
    "fast,trigger_steps=10",
    "fast,trigger_steps=10,fusion=0",
    "fast,trigger_steps=10,tuning=adam,fusion=9,tuning_min_steps=5",
    "paper",
)
BY_STEPS = METHODS[6]
TRIGGERED = METHODS[4:6]


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite.load(ArraySource(IMAGES[:N, None], LABELS[:N], name="digits"), make_classifier(), exemplars=N)


@pytest.fixture(scope="module")
def retrievers(suite: Suite) -> dict[str, Retriever]:
    return {one.name: one for one in suite.retrievers([Method.parse(name) for name in METHODS])}


def query(number: int = 0) -> np.ndarray:
    """A digit, greyer and darker than it was: stretching it changes it."""
    return (0.1 + 0.6 * IMAGES[200 + number, None] / 255).astype(np.float32)


def moved(retriever: Retriever, image: np.ndarray, attacked: np.ndarray) -> float:
    with torch.no_grad():
        before, after = retriever.embedding(torch.tensor(np.stack([image, attacked])))
    return float((after - before).norm())


# --------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("name", METHODS[:4])
def test_a_baselines_embedding_ranks_as_its_scores_do(suite: Suite, retrievers: dict[str, Retriever], name: str):
    exemplars = torch.tensor(suite.store.images(np.arange(N))) / 255.0
    with torch.no_grad():
        own = retrievers[name].embedding(torch.tensor(query())[None])
        others = retrievers[name].embedding(exemplars)
    expected = others @ own[0] if name.startswith("cosine") else -(others - own).norm(dim=1)
    np.testing.assert_allclose(retrievers[name].scores(query()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TRIGGERED)
def test_a_discriminants_embedding_is_what_its_scores_are_products_of(
    suite: Suite, retrievers: dict[str, Retriever], name: str
):
    retriever = retrievers[name]
    assert isinstance(retriever, TmmRetriever)
    config = replace(retriever.config, rank=replace(retriever.config.rank, recognition=None))
    ranking = retriever.tmm.rank(torch.tensor(query()), k=N, config=config)
    exemplars = torch.tensor(suite.store.images(ranking.rows)) / 255.0
    with torch.no_grad():
        own, others = retriever.embedding(torch.tensor(query())[None]), retriever.embedding(exemplars)
    lengths = np.full(N, np.sqrt(1.0 + config.rank.fusion))
    np.testing.assert_allclose(others.norm(dim=1), lengths, rtol=1e-4)
    products = others @ own[0]
    half_squares = (others - own).square().sum(dim=1) / 2
    np.testing.assert_allclose(half_squares, 1.0 + config.rank.fusion - products, rtol=0.0, atol=1e-3)
    sure = ranking.confidences > 0 if config.rank.fusion > 0 else slice(None)  # a negative similarity is no confidence
    np.testing.assert_allclose(products[sure], ranking.scores[sure], rtol=0.0, atol=1e-3)
    assert 5 < np.count_nonzero(ranking.confidences) < N
    assert np.ptp(ranking.scores) > 0.3


def test_with_a_head_tuned_by_steps_the_triggered_query_is_embedded_as_it_is(
    suite: Suite, retrievers: dict[str, Retriever]
):
    retriever, pixels = retrievers[BY_STEPS], torch.tensor(query())
    assert isinstance(retriever, TmmRetriever)
    triggered = retriever.tmm.rank(pixels, k=1, config=retriever.config).view.triggered
    with torch.no_grad():
        both = normalize(suite.classifier.features(torch.stack([triggered, stretch_contrast(pixels)])))
        found = retriever.embedding(pixels[None])
    np.testing.assert_allclose(found, torch.cat([both[0], 3.0 * both[1]])[None], atol=1e-4)


def test_a_trigger_of_the_querys_own_leaves_the_features(suite: Suite, retrievers: dict[str, Retriever]):
    pixels = torch.tensor(query())[None]
    with torch.no_grad():
        np.testing.assert_allclose(
            retrievers["paper"].embedding(pixels), suite.classifier.features(pixels), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("image", [query(), query() * 0, query() * 0 + 0.5], ids=["digit", "black", "grey"])
def test_gradients_flow_to_the_pixels(retrievers: dict[str, Retriever], name: str, image: np.ndarray):
    pixels = torch.tensor(image)[None].requires_grad_()
    weights = torch.tensor(np.random.default_rng(0).standard_normal(10_000)).float()
    embedded = retrievers[name].embedding(pixels)
    (gradient,) = torch.autograd.grad((embedded[0] * weights[: embedded.shape[1]]).sum(), pixels)
    assert gradient.isfinite().all()
    if image.any() and np.ptp(image) > 0:  # random weights without biases see nothing in a constant image
        assert (gradient != 0).double().mean() > 0.9


# --------------------------------------------------------------------------------------------- attacks


@pytest.mark.slow
def test_the_adaptive_attack_moves_what_robust_ranks_by_farther_than_pgd_does(
    suite: Suite, retrievers: dict[str, Retriever]
):
    for name in ("cosine,stretch=true", *TRIGGERED):
        retriever, ratios = retrievers[name], []
        for number in range(6):
            image = query(number)
            plain = Perturbation(Family.PGD, 0.5).apply(image, seed=number, embedding=features_of(suite.classifier))
            own = Perturbation(Family.ADAPTIVE, 0.5).apply(image, seed=number, embedding=retriever.embedding)
            assert np.linalg.norm(own - image) <= 0.5 + 1e-4
            ratios.append(moved(retriever, image, own) / moved(retriever, image, plain))
        assert min(ratios) > 1.0
        assert np.mean(ratios) > 1.05, (name, ratios)


def test_against_l2_the_adaptive_attack_is_pgd(suite: Suite, retrievers: dict[str, Retriever]):
    plain = Perturbation(Family.PGD, 0.5).apply(query(), seed=3, embedding=features_of(suite.classifier))
    own = Perturbation(Family.ADAPTIVE, 0.5).apply(query(), seed=3, embedding=retrievers["l2"].embedding)
    assert own.tobytes() == plain.tobytes()


def test_every_method_meets_its_own_attack_and_all_the_same_pgd(suite: Suite):
    seen: dict[str, np.ndarray] = {}

    class Watching:
        def __init__(self, name: str, part: slice) -> None:
            self.name, self._part = name, part

        def scores(self, query: np.ndarray, *, seed: int = 0) -> np.ndarray:
            seen[self.name] = query
            return np.arange(float(N))

        def embedding(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels[..., self._part].flatten(1)

    both = [Watching("left", slice(4)), Watching("right", slice(4, 8))]
    for family in (Family.PGD, Family.ADAPTIVE):
        asked = scores_under(Perturbation(family, 0.4), query(), both, seed=0, classifier=suite.classifier)
        assert [one.name for one, _ in asked] == ["left", "right"]
        left, right = (np.abs(seen[name] - query()).sum(axis=(0, 1)) for name in ("left", "right"))
        if family is Family.PGD:
            np.testing.assert_array_equal(left, right)
        else:
            assert left[:4].sum() > 5 * left[4:].sum()
            assert right[4:].sum() > 5 * right[:4].sum()
