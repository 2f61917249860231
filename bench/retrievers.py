"""What the benchmarks compare: ways to score every exemplar for a query, all with one face."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int64, Shaped

from index.ranking import best_first


@runtime_checkable
class Retriever(Protocol):
    """Scores all exemplars of a store for one query."""

    name: str

    def scores(self, query: Float32[np.ndarray, "c h w"], *, seed: int = 0) -> Float[np.ndarray, "n"]:
        """A score for every exemplar row; larger is better, no NaN. `query` is in pixels of [0, 1]."""


def top(
    scores: Float[np.ndarray, "n"], ids: Shaped[np.ndarray, "n"], k: int, *, without: int | None = None
) -> Int64[np.ndarray, "k"]:
    """The rows of the k largest scores, best first, ties by id; `without` one row, such as the query's own."""
    rows = np.arange(len(scores))
    if without is not None:
        rows = np.delete(rows, without)
    return rows[best_first(scores[rows], rows, ids, k=k)]


def rank_of(scores: Float[np.ndarray, "n"], ids: Shaped[np.ndarray, "n"], row: int) -> int:
    """How many exemplars come before this one; 0 is first."""
    tied = scores == scores[row]
    return int((scores > scores[row]).sum() + (ids[tied] < ids[row]).sum())
