"""Intervals for the figures of a benchmark. What is drawn anew in a bootstrap is always a query, never a record."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Shaped
from scipy import stats

from tmm_engine.index.errors import InputError

LEVEL = 0.95
RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence interval, in the unit of the estimate; NaN bounds where nothing is known of them.

    As text ``0.87 [0.81, 0.92]``; a format specification applies to each of the three numbers.
    """

    estimate: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        low, high = ("–" if math.isnan(bound) else format(bound, spec or "z.2f") for bound in (self.low, self.high))
        return f"{format(self.estimate, spec or 'z.2f')} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self, "")


def bootstrap_interval(
    values: Shaped[np.ndarray, "n"],
    statistic: Callable[..., Any] = np.mean,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic of independent values (Efron and Tibshirani 1993, §13.3).

    Args:
        values: Numbers or booleans, one per query (`by_query`); at least one, all finite.
        statistic: Takes ``axis``, as ``np.mean`` and ``np.median`` do.
        level: Of confidence, in (0, 1).
        resamples: How often n values are drawn with replacement.
        seed: Of the draws.

    Returns:
        Bounds equal to the estimate if all values are equal, and NaN for a single value: it does not tell its spread.

    Raises:
        InputError: no values, or one that is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise InputError(f"expected at least one value, all finite, got {numbers} (leave out queries without a value)")
    estimate = float(statistic(numbers, axis=-1))
    if len(numbers) == 1:
        return Interval(estimate, math.nan, math.nan)
    found = stats.bootstrap(
        (numbers,),
        statistic,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=level,
        method="percentile",  # the others are undefined for a median, or where nearly all values are equal
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = min(estimate, float(found.low)), max(estimate, float(found.high))  # but for the last bit they are
    return Interval(estimate, low, high)


def by_query(values: Shaped[np.ndarray, "n"], queries: Shaped[np.ndarray, "n"]) -> Float64[np.ndarray, "queries"]:
    """The mean of each query's values, ordered by query: records of one query are not independent.

    Args:
        values: Numbers or booleans, one per record.
        queries: The query that each belongs to.
    """
    _, positions = np.unique(queries, return_inverse=True)
    sums = np.bincount(positions, weights=np.asarray(values, dtype=np.float64))
    return sums / np.bincount(positions)


def paired_difference(
    a: Float[np.ndarray, "n"],
    b: Float[np.ndarray, "n"],
    queries: Shaped[np.ndarray, "n"],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of a − b over queries, by `bootstrap_interval` over the queries' own mean differences.

    Args:
        a: One method's values.
        b: Another's, of the same queries under the same perturbations, in the same order.
        queries: The query of each pair.
        level: Of confidence, in (0, 1).
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        InputError: there are no pairs, or a difference is not finite.
    """
    return bootstrap_interval(by_query(a - b, queries), level=level, resamples=resamples, seed=seed)


def wilson_interval(successes: int, trials: int, *, level: float = LEVEL) -> Interval:
    """A share of independent trials with Wilson's score interval (Wilson 1927), in [0, 1].

    Raises:
        InputError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or not trials:
        raise InputError(f"expected at least one trial and at most as many successes, got {successes} of {trials}")
    found = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return Interval(successes / trials, float(found.low), float(found.high))


def share_at_least(
    radii: Float[np.ndarray, "n"], censored: Bool[np.ndarray, "n"], grid: Float[np.ndarray, "g"]
) -> Float64[np.ndarray, "g"]:
    """Share of queries whose radius is at least ε, for each ε of a grid: the estimate of Kaplan and Meier (1958).

    A censored query counts as robust up to its radius, where its search ended, and is out of the count beyond. Without
    censoring below ε this is the plain share.

    Args:
        radii: One per query, at least 0.
        censored: Whether the search ended at that radius without a change.
        grid: ε, in the unit of the radii.

    Returns:
        In [0, 1], falling with ε.
    """
    survival = stats.ecdf(stats.CensoredData(uncensored=radii[~censored], right=radii[censored])).sf
    return np.asarray(survival.evaluate(np.nextafter(grid, -np.inf)))  # its own is P(radius > ε)
