"""Abstaining from what is trusted least: the accuracy of the rest, and bounds that a share may keep to."""

import numpy as np
from jaxtyping import Bool, Float, Int64
from scipy import stats

from tmm_engine.bench.statistics import LEVEL, RESAMPLES, Interval
from tmm_engine.index.errors import InputError


def selective(
    trust: Float[np.ndarray, "n"],
    correct: Bool[np.ndarray, "n"],
    queries: Int64[np.ndarray, "n"],
    *,
    coverage: float,
    seed: int = 0,
) -> Interval:
    """The accuracy of the share that is trusted most (a point of the risk-coverage curve; El-Yaniv and Wiener 2010).

    Ties at the border count in parts, so that the order of the values does not matter. The interval is the percentile
    bootstrap over queries, with the border as it is.

    Args:
        trust: Larger is surer.
        correct: Of each answer.
        queries: The query that each belongs to: answers to one query are not independent.
        coverage: The share that is kept, in (0, 1].
        seed: Of the bootstrap.

    Raises:
        InputError: no answers, or a coverage out of range.
    """
    if not len(trust) or not 0 < coverage <= 1:
        raise InputError(f"expected answers, and a coverage above 0 and at most 1, got {len(trust)} and {coverage}")
    wanted = coverage * len(trust)
    border = np.sort(trust)[::-1][max(0, int(np.ceil(wanted)) - 1)]
    above, at = trust > border, trust == border
    kept = above + at * (wanted - above.sum()) / at.sum()
    _, place = np.unique(queries, return_inverse=True)
    right, whole = np.bincount(place, kept * correct), np.bincount(place, kept)
    draws = np.random.default_rng(seed).integers(0, len(whole), (RESAMPLES, len(whole)))
    shares = right[draws].sum(axis=1) / np.maximum(whole[draws].sum(axis=1), 1e-12)
    low, high = np.quantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(right.sum() / whole.sum()), float(low), float(high))


def binomial_bounds(share: float, trials: int, *, level: float = 0.99) -> tuple[float, float]:
    """Between which shares of so many independent trials the observed one lies with this probability."""
    low, high = stats.binom.interval(level, trials, share)
    return float(low) / trials, float(high) / trials
