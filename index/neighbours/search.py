"""Exact and approximate k-nearest neighbours over features, by FAISS: L2 distance and cosine similarity."""

import copy

import numpy as np
from jaxtyping import Float32, Float64, Int64

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.neighbours.approximate import Approximate
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.factories import EXACT, Effort, make_faiss_index
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.index.neighbours.vectors import comparable, scanned
from tmm_engine.index.store.exemplars import ExemplarStore

MARGIN = 16  # neighbours fetched beyond k, to see whether the k-th ties with the next
ROUNDING = 1e-5  # FAISS adds up in float32: how far its squares and products may be off, as a share of the largest


class Exact:
    """All rows of one column, looked at one by one."""

    def __init__(self, store: ExemplarStore, metric: Metric, *, column: str) -> None:
        self._index = make_faiss_index(store.feature_columns[column], metric, EXACT)
        for features in scanned(store, column, metric):
            self._index.add(features)

    def search(self, xq: Float32[np.ndarray, "q d"], *, fetch: int) -> Int64[np.ndarray, "q found"]:
        """The nearest rows for each query, nearest first; −1 where a distance is infinite."""
        return self._index.search(xq, fetch)[1]


class Neighbours:
    """Searches the features of one version of a store.

    Args:
        store: The exemplars.
        metric: L2 distance, or cosine similarity.
        column: Of the store's features.
        factory: A FAISS factory string: ``Flat`` is exact; ``HNSW32``, ``IVF256,Flat`` and others are approximate.
        effort: How thoroughly an approximate index is searched.
        cache: Where to keep what is not flat; without it, it is built anew.

    Raises:
        InputError: FAISS does not know the factory string, or cannot train or fill it with these exemplars.
    """

    def __init__(
        self,
        store: ExemplarStore,
        metric: Metric,
        *,
        column: str = FEATURE,
        factory: str = EXACT,
        effort: Effort | None = None,
        cache: FaissCache | None = None,
    ) -> None:
        self.metric = metric
        self._store, self._column = store, column
        self._effort = effort or Effort()
        self._exact = factory == EXACT
        self._finder: Exact | Approximate = (
            Exact(store, metric, column=column)
            if factory == EXACT
            else Approximate(store, metric, column=column, factory=factory, effort=self._effort, cache=cache)
        )

    def with_effort(self, effort: Effort) -> "Neighbours":
        """The same index, searched more or less thoroughly; an exact one is as it was."""
        other = copy.copy(self)
        other._effort = effort
        if isinstance(self._finder, Approximate):
            other._finder = self._finder.with_effort(effort)
        return other

    def keep(self, cache: FaissCache) -> None:
        """Put an approximate index of all rows, built without a cache, into one."""
        if isinstance(self._finder, Approximate):
            self._finder.keep(cache)

    @property
    def beside(self) -> int:
        """How many rows an approximate index does not know, so that they are looked at one by one."""
        return 0 if isinstance(self._finder, Exact) else self._finder.beside

    def search(
        self, queries: Float32[np.ndarray, "q d"], *, k: int
    ) -> list[tuple[Int64[np.ndarray, "found"], Float64[np.ndarray, "found"]]]:
        """For each query its min(k, n) nearest exemplars, nearest first: their rows and scores; larger is better.

        A score is minus the L2 distance, or the cosine similarity, recomputed from the stored features in float64:
        FAISS rounds differently for one query and for many. Ties break by exemplar id. An approximate index may find
        fewer than k.
        """
        wanted = k + MARGIN if self._exact else max(k + MARGIN, self._effort.fetched(k))
        found = self._finder.search(comparable(queries, self.metric), fetch=min(len(self._store), wanted))
        return [self._best(query, rows[rows >= 0], k) for query, rows in zip(queries, found, strict=True)]

    def _best(
        self, query: Float32[np.ndarray, "d"], rows: Int64[np.ndarray, "found"], k: int
    ) -> tuple[Int64[np.ndarray, "best"], Float64[np.ndarray, "best"]]:
        if self._exact and len(rows) < min(k, len(self._store)):  # infinite distances, which FAISS leaves out
            rows = np.arange(len(self._store))
        scores = self._scores(query, rows)
        fetched = len(rows)
        while k < fetched < len(self._store) and self._unsettled(query, scores, k):
            wider = min(len(self._store), 4 * fetched)
            rows = self._finder.search(comparable(query[None], self.metric), fetch=wider)[0]
            rows = rows[rows >= 0]
            if len(rows) <= fetched:
                break  # an approximate index has no more to give
            fetched, scores = len(rows), self._scores(query, rows)
        best = best_first(scores, rows, self._store.ids, k=k)
        return rows[best], scores[best]

    def _unsettled(self, query: Float32[np.ndarray, "d"], scores: Float64[np.ndarray, "found"], k: int) -> bool:
        """Whether FAISS, with its rounding, may have left out one of the k best: too many nearly tie."""
        kth, worst = float(np.sort(scores)[-k]), float(scores.min())
        if self.metric is Metric.COSINE:
            return kth - worst <= ROUNDING
        reach = 2 * float(np.linalg.norm(query.astype(np.float64))) - kth  # |xq| + |xb| of whatever is as near
        float32 = np.finfo(np.float32)  # whose squares vanish, or become infinite
        lost = ROUNDING * reach**2 + len(query) * float(float32.tiny)
        return worst**2 - kth**2 <= lost or reach**2 > float(float32.max)

    def _scores(
        self, query: Float32[np.ndarray, "d"], rows: Int64[np.ndarray, "found"]
    ) -> Float64[np.ndarray, "found"]:
        return exact_scores(query, self._features(rows), self.metric)

    def _features(self, rows: Int64[np.ndarray, "found"]) -> Float32[np.ndarray, "found d"]:
        return self._store.features(rows, column=self._column)


def exact_scores(
    query: Float32[np.ndarray, "d"], features: Float32[np.ndarray, "n d"], metric: Metric
) -> Float64[np.ndarray, "n"]:
    """Minus the L2 distance, or the cosine similarity (0 where a norm is 0), in float64."""
    xq, xb = query.astype(np.float64), features.astype(np.float64)
    if metric is Metric.L2:
        return -np.linalg.norm(xb - xq, axis=1)
    norms = np.linalg.norm(xb, axis=1) * np.linalg.norm(xq)
    return np.divide(np.einsum("nd,d->n", xb, xq), norms, out=np.zeros(len(xb)), where=norms > 0)
