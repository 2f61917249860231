"""Thresholds by a rule: the share of false findings among all findings that one accepts (false discovery rate)."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float, Float64

CENTRE, UPPER = 0.5, 0.8
"""Quantiles of a statistic between which nearly all images are innocent."""
ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Tail:
    """How often an innocent image has a statistic as large, told by the common half of all images.

    The fall is read off the images between the median and the upper fifth, so that faults, which lie above, hardly
    matter. What is beyond chance by then is left out, and it is read off the others again.

    Attributes:
        centre: The median.
        scale: Of the fall: a normal distribution's standard deviation, or how much further up an exponential one is e
            times as seldom.
        normal: Which of both.
    """

    centre: float
    scale: float
    normal: bool = False

    @classmethod
    def fit(cls, statistic: Float[np.ndarray, "n"], *, normal: bool = False) -> "Tail":
        """Of the statistics of all images; at least one."""
        found = cls._once(statistic, normal=normal)
        for _ in range(ROUNDS):
            found = cls._once(statistic[found.chance(statistic) * len(statistic) > 1], normal=normal)
        return found

    @classmethod
    def _once(cls, statistic: Float[np.ndarray, "n"], *, normal: bool) -> "Tail":
        centre, upper = np.quantile(statistic.astype(np.float64), [CENTRE, UPPER])
        reach = NormalDist().inv_cdf(UPPER) if normal else math.log((1 - CENTRE) / (1 - UPPER))
        return cls(float(centre), max(float(upper - centre) / reach, 1e-9), normal)

    def chance(self, statistic: Float[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
        """Of an innocent image to have a statistic as large, in [0, 1]; 1 below the median."""
        above = (statistic.astype(np.float64) - self.centre) / self.scale
        if self.normal:
            return np.where(above < 0, 1.0, torch.special.ndtr(torch.from_numpy(-above)).numpy())
        return np.where(above < 0, 1.0, (1 - CENTRE) * np.exp(-np.maximum(above, 0)))


def adjusted(chances: Float64[np.ndarray, "n"], *, tests: int | None = None) -> Float64[np.ndarray, "n"]:
    """For each the smallest false discovery rate at which it is found (Benjamini and Hochberg 1995), in [0, 1].

    Args:
        chances: Of an innocent one.
        tests: How many were looked at, where those that are left out have a chance of 1.
    """
    count = len(chances) if tests is None else tests
    order = np.argsort(chances)
    rates = chances[order] * count / np.arange(1, len(chances) + 1)
    found = np.empty(len(chances))
    found[order] = np.minimum(1, np.minimum.accumulate(rates[::-1])[::-1])
    return found


def likely(probabilities: Float64[np.ndarray, "n"], *, rate: float) -> float:
    """The smallest probability of a fault that is a finding: of all at least as probable, at most this share is none.

    Infinite where nothing is a finding (Newton et al., Biostatistics 2004: the mean of 1 − probability).
    """
    best = np.sort(probabilities)[::-1]
    false = np.cumsum(1 - best) / np.arange(1, len(best) + 1)
    within = np.flatnonzero(false <= rate)
    return float(best[within[-1]]) if len(within) else math.inf
