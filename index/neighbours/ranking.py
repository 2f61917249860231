"""The k best rows by score: larger is better, ties break by exemplar id."""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from jaxtyping import Float, Int64, Shaped


def best_first(
    scores: Float[np.ndarray, "n"], rows: Int64[np.ndarray, "n"], ids: Shaped[np.ndarray, "exemplars"], *, k: int
) -> Int64[np.ndarray, "best"]:
    """Positions into ``scores`` of the min(k, n) largest, best first.

    Args:
        scores: One per row; no NaN.
        rows: The exemplar each score belongs to, as a position in ``ids``.
        ids: The ids of all exemplars (strings).
        k: At least 1.
    """
    assert not np.isnan(scores).any(), "scores must be numbers"
    if k < len(scores):
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        contenders = np.flatnonzero(scores >= threshold)  # k, and whatever ties with the last of them
    else:
        contenders = np.arange(len(scores))
    order = np.lexsort((ids[rows[contenders]], -scores[contenders]))
    return contenders[order[:k]]


def in_turn(rankings: Sequence[Int64[np.ndarray, "_"]]) -> Int64[np.ndarray, "union"]:
    """The union of several rankings, taken in turn: each one's first, each one's second, …; every row once."""
    taken = [row for level in zip_longest(*(ranking.tolist() for ranking in rankings)) for row in level]
    return np.array([row for row in dict.fromkeys(taken) if row is not None], dtype=np.int64)
