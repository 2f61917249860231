"""One scan over the exemplars: the scores of all of them, block by block, and the best of what a scan offers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, Shaped

from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.index.store.exemplars import ExemplarStore

SCAN = 8192


@dataclass(frozen=True, slots=True, eq=False)
class ByVector:
    """What a query is ranked by in the modes robust, l2 and cosine.

    Attributes:
        vector: Its features; where it was recognised, moved to the exemplar's.
        column: Of the store's features that they are compared with.
        metric: How.
    """

    vector: Float32[np.ndarray, "d"]
    column: str
    metric: Metric


@dataclass(frozen=True, slots=True, eq=False)
class ByRanking:
    """What TMM-NN said of the exemplars that it scored.

    Attributes:
        rows: Of these.
        scores: Of each row.
    """

    rows: Int64[np.ndarray, "scored"]
    scores: Float[np.ndarray, "scored"]


RankedBy = ByVector | ByRanking


def score_blocks(
    store: ExemplarStore, queries: Sequence[RankedBy]
) -> Iterator[tuple[Int64[np.ndarray, "b"], Float64[np.ndarray, "q b"]]]:
    """Rows and the scores of every query, as `Neighbours.search` has them up to rounding; −∞ where nothing was scored.

    Args:
        store: The exemplars.
        queries: At least one, all of one mode.
    """
    vectors = [query for query in queries if isinstance(query, ByVector)]
    if vectors:
        first, start = vectors[0], 0
        own = np.stack([query.vector for query in vectors]).astype(np.float64)
        for block in store.scan_features(SCAN, column=first.column):
            rows = np.arange(start, start + len(block))
            start += len(block)
            yield rows, _scores(own, block.astype(np.float64), first.metric)
    else:
        scores = np.full((len(queries), len(store)), -np.inf)
        for own_scores, query in zip(scores, queries, strict=True):
            assert isinstance(query, ByRanking)
            own_scores[query.rows] = query.scores
        yield np.arange(len(store)), scores


class Scored(NamedTuple):
    """Some rows, best first, and a value of each."""

    rows: Int64[np.ndarray, "k"]
    values: Float64[np.ndarray, "k"]


class Best:
    """The k rows with the largest of all values that a scan offers, best first; ties in order of id.

    Args:
        k: At most so many.
        ids: Of all exemplars.
    """

    def __init__(self, k: int, ids: Shaped[np.ndarray, "exemplars"]) -> None:
        self._k, self._ids = k, ids
        self.found = Scored(np.empty(0, dtype=np.int64), np.empty(0))

    def offer(self, rows: Int64[np.ndarray, "b"], values: Float64[np.ndarray, "b"]) -> None:
        """More rows, each offered once, with their values."""
        rows, values = np.concatenate([self.found.rows, rows]), np.concatenate([self.found.values, values])
        first = best_first(values, rows, self._ids, k=self._k)
        self.found = Scored(rows[first], values[first])


def _scores(
    queries: Float64[np.ndarray, "q d"], block: Float64[np.ndarray, "b d"], metric: Metric
) -> Float64[np.ndarray, "q b"]:
    products = queries @ block.T  # (q, d) @ (d, b) -> (q, b)
    own, others = (np.einsum("nd,nd->n", each, each) for each in (queries, block))
    if metric is Metric.L2:
        return -np.sqrt(np.maximum(own[:, None] + others - 2.0 * products, 0.0))
    norms = np.sqrt(own[:, None] * others)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
