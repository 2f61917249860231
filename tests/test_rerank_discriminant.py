"""The closed form of step 2, held to a slow one: whitening by eigenvectors in float64, then cosine similarity."""

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from tmm_engine.rerank import discriminant as module
from tmm_engine.rerank.discriminant import Discriminant

SEEDS = st.integers(0, 2**32 - 1)
SHRINKAGES = st.sampled_from([1e-3, 0.1, 1.0, 10.0])


def features_of(seed: int, n: int, d: int, *, offset: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """float64 (n, d): correlated, of unequal variances."""
    rng = np.random.default_rng(seed)
    return offset + scale * rng.normal(size=(n, d)) @ rng.normal(size=(d, d))


def slow_similarities(query: np.ndarray, exemplars: np.ndarray, shrinkage: float) -> np.ndarray:
    """Cosine similarity after whitening with Σ^(−1/2) = V diag(1/√λ) Vᵀ, one exemplar after the other."""
    mean = exemplars.mean(axis=0)
    covariance = sum(np.outer(x - mean, x - mean) for x in exemplars) / len(exemplars)
    variance = np.trace(covariance) / len(mean)
    values, vectors = np.linalg.eigh(covariance + shrinkage * (variance or 1.0) * np.eye(len(mean)))
    whitening = vectors @ np.diag(values**-0.5) @ vectors.T

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / lengths) if lengths > 0 else 0.0

    return np.array([cosine(whitening @ (query - mean), whitening @ (x - mean)) for x in exemplars])


def similarities(query: torch.Tensor, exemplars: torch.Tensor, shrinkage: float) -> torch.Tensor:
    fitted = Discriminant.fit([exemplars], shrinkage=shrinkage)
    return fitted.similarities(query, exemplars, lengths=fitted.lengths(exemplars))


# ---- the slow one


@given(
    seed=SEEDS,
    n=st.integers(1, 40),
    d=st.integers(1, 16),
    offset=st.sampled_from([0.0, -3.0, 1e4]),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    constant=st.integers(0, 16),
    shrinkage=SHRINKAGES,
)
def test_it_is_the_cosine_similarity_of_whitened_features(*, seed, n, d, offset, scale, constant, shrinkage):
    """Also with one exemplar, with fewer than dimensions, with constant features and far from the origin."""
    exemplars = features_of(seed, n, d, offset=offset * scale, scale=scale)
    exemplars[:, :constant] = exemplars[0, :constant]
    query = features_of(seed + 1, 1, d, offset=offset * scale, scale=scale)[0]
    assume(n == 1 or constant < d)
    found = similarities(torch.from_numpy(query), torch.from_numpy(exemplars), shrinkage)
    assert found.dtype == torch.float64
    if n == 1:  # its own mean
        assert found.tolist() == [0.0]
        return
    np.testing.assert_allclose(found, slow_similarities(query, exemplars, shrinkage), rtol=0.0, atol=1e-6)


@settings(max_examples=50)
@given(seed=SEEDS, n=st.integers(2, 60), d=st.integers(1, 24), offset=st.floats(0.0, 30.0), shrinkage=SHRINKAGES)
@example(seed=11286, n=2, d=1, offset=0.5, shrinkage=10.0)  # two numbers that are nearly the same
def test_float32_is_close_to_float64(*, seed, n, d, offset, shrinkage):
    exemplars = torch.from_numpy(features_of(seed, n, d, offset=offset)).float()
    query = exemplars[0] + torch.from_numpy(features_of(seed + 1, 1, d)[0]).float()
    found = similarities(query, exemplars, shrinkage)
    assert found.dtype == torch.float32
    precise = similarities(query.double(), exemplars.double(), shrinkage)
    lengths = Discriminant.fit([exemplars], shrinkage=shrinkage).lengths(exemplars)
    error = (found - precise).abs() * lengths / lengths.max()  # the direction of what lies at the mean is all rounding
    spread = min(1.0, float(exemplars.double().std()))
    assert float(error.max()) < 1e-5 * (1.0 + offset) / spread / shrinkage**0.5  # far from 0, or close together


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("level", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exemplars_that_are_all_alike_are_like_nothing_and_no_division_fails(n, level, dtype):
    exemplars = torch.full((n, 5), level, dtype=dtype)
    fitted = Discriminant.fit([exemplars], shrinkage=0.1)
    lengths = fitted.lengths(exemplars)
    for query in (exemplars[0], exemplars[0] + torch.arange(5, dtype=dtype)):
        found = fitted.similarities(query, exemplars, lengths=lengths)
        assert found.isfinite().all()
        assert len(set(found.tolist())) == 1
        assert found[0] == 0.0


# ---- one pass


@settings(max_examples=50)
@given(
    seed=SEEDS,
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    rows=st.integers(1, 20),
    offset=st.sampled_from([0.0, 50.0]),
)
def test_it_does_not_matter_how_features_are_cut(*, seed, sizes, rows, offset):
    exemplars = torch.from_numpy(features_of(seed, sum(sizes), 6, offset=offset))
    whole = Discriminant.fit([exemplars], shrinkage=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", rows)
        cut = Discriminant.fit(iter(exemplars.split(sizes)), shrinkage=0.1)
        torch.testing.assert_close(cut.mean, whole.mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(cut.factor, whole.factor, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(whole.lengths(exemplars), cut.lengths(exemplars), rtol=1e-6, atol=1e-8)


def test_the_moments_are_float64_and_those_of_numpy_far_from_the_origin():
    exemplars = features_of(0, 30_000, 8, offset=1000.0).astype(np.float32)
    fitted = Discriminant.fit(torch.from_numpy(exemplars).split(700), shrinkage=0.5)
    assert (fitted.mean.dtype, fitted.factor.dtype) == (torch.float64, torch.float64)
    np.testing.assert_allclose(fitted.mean, exemplars.mean(axis=0, dtype=np.float64), rtol=1e-9)
    covariance = np.cov(exemplars.T.astype(np.float64), bias=True)
    expected = covariance + 0.5 * np.trace(covariance) / 8 * np.eye(8)
    np.testing.assert_allclose(fitted.factor @ fitted.factor.T, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert torch.equal(fitted.factor, fitted.factor.tril())


# ---- what it says of exemplars


@given(seed=SEEDS, n=st.integers(3, 40), d=st.integers(2, 16), data=st.data())
def test_a_query_that_is_an_exemplar_has_similarity_1_and_duplicates_of_it_tie(*, seed, n, d, data):
    exemplars = torch.from_numpy(features_of(seed, n, d, offset=2.0))
    row, copies = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, 3))
    with_copies = torch.cat([exemplars, exemplars[row].expand(copies, d)])
    found = similarities(exemplars[row], with_copies, data.draw(SHRINKAGES))
    assert found[row] == pytest.approx(1.0, abs=1e-9)
    np.testing.assert_allclose(found[n:], 1.0, rtol=0.0, atol=1e-9)
    assert (found >= -1.0).all()
    assert (found <= 1.0).all()
    others = np.delete(found[:n].numpy(), row)
    assert (others < 1.0).all()
    assert int(found[:n].argmax()) == row


@given(seed=SEEDS, n=st.integers(3, 30), d=st.integers(2, 8), shrinkage=SHRINKAGES)
def test_moving_and_scaling_all_features_changes_nothing(*, seed, n, d, shrinkage):
    exemplars, query = (torch.from_numpy(features_of(seed + i, count, d)) for i, count in enumerate((n, 1)))
    found = similarities(query[0], exemplars, shrinkage)
    moved = similarities(5.0 * query[0] - 7.0, 5.0 * exemplars - 7.0, shrinkage)
    torch.testing.assert_close(moved, found, rtol=0.0, atol=1e-8)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    torch.testing.assert_close(similarities(query[0], exemplars[order], shrinkage), found[order], rtol=0.0, atol=1e-8)


def test_what_all_exemplars_share_counts_little():
    """The point of it: exemplars differ mostly along one direction, and the query is one of them, moved along that."""
    rng = np.random.default_rng(0)
    exemplars = rng.normal(size=(500, 10))
    exemplars[:, 0] *= 100.0
    exemplars[42, 0] = 50.0
    query = exemplars[42] * np.array([-1.0] + [1.0] * 9)
    centred, about = exemplars - exemplars.mean(axis=0), query - exemplars.mean(axis=0)
    plain = centred @ about / np.linalg.norm(centred, axis=1)
    assert np.argmax(plain) != 42
    found = similarities(torch.from_numpy(query), torch.from_numpy(exemplars), 1e-4)
    assert int(found.argmax()) == 42


# ---- Eq. 3 with the Gaussian model: Fisher's discriminant


@settings(max_examples=25)
@given(seed=SEEDS, n=st.integers(12, 60), d=st.integers(2, 8), share=st.floats(0.01, 0.9))
def test_before_lengths_count_it_is_scikit_learns_discriminant_of_query_against_exemplars(*, seed, n, d, share):
    """Its covariance is (1−s)·Σ + s·mean variance·I, ours Σ + s/(1−s)·mean variance·I: 1/(1−s) times that.

    Its second class is the query twice; at a prior of about 0 the class has no part in the covariance.
    """
    exemplars, query = features_of(seed, n, d, offset=1.0), features_of(seed + 1, 1, d)[0]
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=share, priors=[1.0 - 1e-12, 1e-12])
    lda.fit(np.concatenate([exemplars, [query, query]]), [0] * n + [1] * 2)
    above_mean = lda.decision_function(exemplars) - lda.decision_function(exemplars.mean(axis=0, keepdims=True))
    rows, positive = torch.from_numpy(exemplars), torch.from_numpy(query)
    fitted = Discriminant.fit([rows], shrinkage=share / (1.0 - share))
    lengths = fitted.lengths(rows)
    products = fitted.similarities(positive, rows, lengths=lengths) * lengths * fitted.lengths(positive[None])
    np.testing.assert_allclose(products, (1.0 - share) * above_mean, rtol=1e-6, atol=1e-6 * np.abs(above_mean).max())
