"""k-nearest neighbours over features, exact by matrix products or approximate by FAISS: L2 distance and cosine."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.neighbours.approximate import Approximate
from tmm_engine.index.neighbours.budget import Claim
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.factories import EXACT, Effort
from tmm_engine.index.neighbours.matrices import Matrices
from tmm_engine.index.neighbours.matrix import Streamed
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.index.neighbours.vectors import comparable
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.index.types import Rows

MARGIN = 16  # neighbours fetched beyond k, to see whether the k-th ties with the next
TOGETHER = 1 << 14  # rows whose features are asked for at once
ROUNDING = 1e-5  # products add up in float32: how far they may be off, as a share of the largest


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The neighbours of one query.

    Attributes:
        rows: Nearest first; ties in order of id.
        scores: Minus the L2 distance, or the cosine similarity.
        agreement: The share of them that were the nearest, too, before they were scored exactly, in [0, 1].
    """

    rows: Int64[np.ndarray, "found"]
    scores: Float64[np.ndarray, "found"]
    agreement: float


class Neighbours:
    """Searches the features of one version of a store.

    Args:
        store: The exemplars.
        metric: L2 distance, or cosine similarity.
        column: Of the store's features.
        factory: A FAISS factory string: ``Flat`` is exact; ``HNSW32``, ``IVF256,Flat`` and others are approximate.
        effort: How thoroughly an approximate index is searched.
        cache: Where to keep what is not flat; without it, it is built anew.
        matrices: Of the store, where they are shared or kept; otherwise its column is held in memory.

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
        matrices: Matrices | None = None,
    ) -> None:
        self.metric = metric
        self._store, self._effort = store, effort or Effort()
        matrices = matrices or Matrices(store)
        self._finder: Approximate | None = None
        self._claim: Claim | None = None
        if factory != EXACT:
            self._finder = Approximate(store, metric, column=column, factory=factory, effort=self._effort, cache=cache)
            if matrices.budget.left is not None:  # a size is asked of FAISS only where it matters
                what = f"the index {factory!r} of the column {column!r}"
                self._claim = matrices.budget.claim(self._finder.size(), what)
        try:
            self._matrix = matrices.column(column)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Give back what an approximate index took of the bound on memory; it is not searched any more."""
        if self._claim is not None:
            self._claim.release()

    def with_effort(self, effort: Effort) -> "Neighbours":
        """The same index, searched more or less thoroughly; an exact one is as it was."""
        other = copy.copy(self)
        other._effort = effort
        if self._finder is not None:
            other._finder = self._finder.with_effort(effort)
        return other

    def keep(self, cache: FaissCache) -> None:
        """Put an approximate index of all rows, built without a cache, into one."""
        if self._finder is not None:
            self._finder.keep(cache)

    @property
    def beside(self) -> int:
        """How many rows an approximate index does not know, so that they are looked at one by one."""
        return 0 if self._finder is None else self._finder.beside

    @property
    def streamed(self) -> bool:
        """Whether every search reads the features from the store."""
        return isinstance(self._matrix, Streamed)

    def search(
        self, queries: Float32[np.ndarray, "q d"], *, k: int
    ) -> list[tuple[Int64[np.ndarray, "found"], Float64[np.ndarray, "found"]]]:
        """For each query its min(k, n) nearest exemplars, nearest first: their rows and scores; larger is better.

        A score is minus the L2 distance, or the cosine similarity, recomputed from the stored features in float64:
        products round differently for one query and for many. Ties break by exemplar id. Where an approximate index
        looks into too few clusters to find k, the search is exact.
        """
        return [(found.rows, found.scores) for found in self.ranked(queries, k=k)]

    def ranked(self, queries: Float32[np.ndarray, "q d"], *, k: int, reach: int = 0) -> list[Found]:
        """As `search`, and how far what found the candidates agrees.

        Args:
            queries: In the column.
            k: How many are wanted.
            reach: So many are given, if that is more; fewer of them, but k, where an approximate index finds no more.
        """
        if not len(queries):
            return []
        most = max(k, reach)
        wanted = most + MARGIN if self._finder is None else max(most + MARGIN, self._effort.fetched(most))
        found = self._found(queries, fetch=min(len(self._store), wanted))
        chosen = [rows[rows >= 0] for rows in found]
        return [
            self._best(query, rows, features, k=k, most=most)
            for query, rows, features in zip(queries, chosen, self._each(chosen), strict=True)
        ]

    def _best(
        self,
        query: Float32[np.ndarray, "d"],
        rows: Int64[np.ndarray, "found"],
        features: Float32[np.ndarray, "found d"],
        *,
        k: int,
        most: int,
    ) -> Found:
        first, scores = rows[:k], exact_scores(query, features, self.metric)
        if len(rows) < min(k, len(self._store)):
            if self._finder is not None:
                return self._exact().ranked(query[None], k=k, reach=most)[0]
            rows = np.arange(len(self._store))  # distances that are infinite in float32
            scores = self._scored(query, rows)
        fetched = len(rows)
        edge = most if most < fetched else k
        while edge < fetched < len(self._store) and self._unsettled(query, scores, edge):
            wider = min(len(self._store), 4 * fetched)
            rows = self._found(query[None], fetch=wider)[0]
            rows = rows[rows >= 0]
            if len(rows) <= fetched:
                break  # an approximate index has no more to give
            fetched, scores = len(rows), self._scored(query, rows)
        best = best_first(scores, rows, self._store.ids, k=most)
        agreement = len({*first.tolist()} & {*rows[best[:k]].tolist()}) / len(first) if len(first) else 1.0
        return Found(rows[best], scores[best], agreement)

    def _exact(self) -> "Neighbours":
        """Without the approximate index."""
        other = copy.copy(self)
        other._finder = None
        return other

    def _scored(self, query: Float32[np.ndarray, "d"], rows: Rows) -> Float64[np.ndarray, "found"]:
        """Exactly, and so many at a time that many ties take no more memory than few."""
        parts = (rows[start : start + TOGETHER] for start in range(0, len(rows), TOGETHER))
        return np.concatenate([exact_scores(query, self.features(own), self.metric) for own in parts])

    def _unsettled(self, query: Float32[np.ndarray, "d"], scores: Float64[np.ndarray, "found"], k: int) -> bool:
        """Whether rounding to float32 may have left out one of the k best: too many nearly tie."""
        kth, worst = float(np.sort(scores)[-k]), float(scores.min())
        if self.metric is Metric.COSINE:
            return kth - worst <= ROUNDING
        reach = 2 * float(np.linalg.norm(query.astype(np.float64))) - kth  # |xq| + |xb| of whatever is as near
        float32 = np.finfo(np.float32)  # whose squares vanish, or become infinite
        lost = ROUNDING * reach**2 + len(query) * float(float32.tiny)
        return worst**2 - kth**2 <= lost or reach**2 > float(float32.max)

    def features(self, rows: Rows) -> Float32[np.ndarray, "rows d"]:
        """As they are stored, in the order of the rows."""
        return self._matrix.take(rows)

    def _found(self, queries: Float32[np.ndarray, "q d"], *, fetch: int) -> Int64[np.ndarray, "q found"]:
        """Rows for each query; −1 where there is none."""
        xq = comparable(queries, self.metric)
        if self._finder is None:
            return self._matrix.nearest(xq, fetch=fetch, metric=self.metric)
        return self._finder.search(xq, fetch=fetch)

    def _each(self, chosen: list[Int64[np.ndarray, "_"]]) -> Iterator[Float32[np.ndarray, "_ d"]]:
        """The features of each of several lists of rows; where the store has to be asked, once for many lists."""
        group = max(1, TOGETHER // max([1, *map(len, chosen)]))
        for start in range(0, len(chosen), group):
            lists = chosen[start : start + group]
            rows = np.unique(np.concatenate(lists))
            features = self.features(rows)
            yield from (features[np.searchsorted(rows, own)] for own in lists)


def exact_scores(
    query: Float32[np.ndarray, "d"], features: Float32[np.ndarray, "n d"], metric: Metric
) -> Float64[np.ndarray, "n"]:
    """Minus the L2 distance, or the cosine similarity (0 where a norm is 0), in float64."""
    xq, xb = query.astype(np.float64), features.astype(np.float64)
    if metric is Metric.L2:
        return -np.linalg.norm(xb - xq, axis=1)
    norms = np.linalg.norm(xb, axis=1) * np.linalg.norm(xq)
    return np.divide(np.einsum("nd,d->n", xb, xq), norms, out=np.zeros(len(xb)), where=norms > 0)
