"""Exact and approximate k-nearest neighbours over features, by FAISS: L2 distance and cosine similarity."""

import math
import re
from collections.abc import Iterator

import faiss
import numpy as np
from jaxtyping import Float32, Float64, Int64

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.index.store.where import shortened

EXACT = "Flat"
# FAISS ends the process, or does not come back, for strings such as HNSW0, PQ0 or NSG1: these forms are safe.
FACTORIES = re.compile(
    r"(IVF[1-9]\d{0,5},)?(IDMap,)?(Flat|SQ[468]|SQfp16|PQ[1-9]\d{0,3})|HNSW([2-9]|[1-9]\d{1,2})(,Flat)?"
)
SCAN = 8192
MARGIN = 16  # neighbours fetched beyond k, to see whether the k-th ties with the next
ROUNDING = 1e-5  # FAISS adds up in float32: how far its squares and products may be off, as a share of the largest


class Neighbours:
    """Searches the features of one version of a store.

    Args:
        store: The exemplars.
        metric: L2 distance, or cosine similarity.
        column: Of the store's features.
        factory: A FAISS factory string: ``Flat`` is exact; ``HNSW32``, ``IVF256,Flat`` and others are approximate.
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
        cache: FaissCache | None = None,
    ) -> None:
        self.metric = metric
        self._store, self._column = store, column
        self._exact = factory == EXACT
        if factory == EXACT or cache is None:  # a flat index is the features themselves, read as fast as a file
            self._index = self._built(factory)
        else:
            name = f"{metric} {factory}" if column == FEATURE else f"{metric} {factory} {column}"
            kept = cache.load(name)
            self._index = kept or self._built(factory)
            if kept is None:
                cache.save(name, self._index)

    def search(
        self, queries: Float32[np.ndarray, "q d"], *, k: int
    ) -> list[tuple[Int64[np.ndarray, "found"], Float64[np.ndarray, "found"]]]:
        """For each query its min(k, n) nearest exemplars, nearest first: their rows and scores; larger is better.

        A score is minus the L2 distance, or the cosine similarity, recomputed from the stored features in float64:
        FAISS rounds differently for one query and for many. Ties break by exemplar id. An approximate index may find
        fewer than k.
        """
        n = len(self._store)
        fetch = min(n, k + MARGIN)
        xq = normalised(queries) if self.metric is Metric.COSINE else np.ascontiguousarray(queries)
        _, found = self._index.search(xq, fetch)
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
            xq = normalised(query[None]) if self.metric is Metric.COSINE else query[None]
            rows = self._index.search(xq, wider)[1][0]
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

    def _built(self, factory: str) -> faiss.Index:
        index = make_faiss_index(self._store.feature_columns[self._column], self.metric, factory)
        try:
            if not index.is_trained:
                index.train(np.concatenate(list(self._scan())))
            for features in self._scan():
                index.add(features)
            if (clusters := faiss.try_extract_index_ivf(index)) is not None:
                clusters.nprobe = max(clusters.nprobe, math.isqrt(clusters.nlist))  # FAISS would look into one alone
        except RuntimeError as error:
            raise InputError(
                f"FAISS cannot use {factory!r} for {len(self._store)} exemplars: {_reason(error)}; use fewer clusters, "
                f"or {EXACT!r}"
            ) from None
        return index

    def _scan(self) -> Iterator[Float32[np.ndarray, "batch d"]]:
        for features in self._store.scan_features(SCAN, column=self._column):
            yield normalised(features) if self.metric is Metric.COSINE else np.ascontiguousarray(features)


def make_faiss_index(d: int, metric: Metric, factory: str) -> faiss.Index:
    """An empty FAISS index; for cosine an inner-product index that expects normalised features.

    Raises:
        InputError: FAISS does not know the factory string.
    """
    kind = faiss.METRIC_INNER_PRODUCT if metric is Metric.COSINE else faiss.METRIC_L2
    if not FACTORIES.fullmatch(factory):
        raise InputError(
            f"expected a FAISS factory string for features of {d} dimensions such as {EXACT!r} (exact), 'HNSW32', "
            f"'IVF256,Flat' or 'IVF256,PQ16', got {shortened(factory)}"
        )
    try:
        return faiss.index_factory(d, factory, kind)
    except RuntimeError as error:
        raise InputError(
            f"FAISS cannot make an index of {factory!r} for features of {d} dimensions: {_reason(error)}; "
            f"try {EXACT!r} (exact), 'HNSW32' or 'IVF256,Flat'"
        ) from None


def exact_scores(
    query: Float32[np.ndarray, "d"], features: Float32[np.ndarray, "n d"], metric: Metric
) -> Float64[np.ndarray, "n"]:
    """Minus the L2 distance, or the cosine similarity (0 where a norm is 0), in float64."""
    xq, xb = query.astype(np.float64), features.astype(np.float64)
    if metric is Metric.L2:
        return -np.linalg.norm(xb - xq, axis=1)
    norms = np.linalg.norm(xb, axis=1) * np.linalg.norm(xq)
    return np.divide(np.einsum("nd,d->n", xb, xq), norms, out=np.zeros(len(xb)), where=norms > 0)


def normalised(features: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Of unit length; zero stays zero."""
    precise = features.astype(np.float64)  # the squares of small and large numbers leave float32
    norms = np.linalg.norm(precise, axis=1, keepdims=True)
    return (precise / np.where(norms > 0, norms, 1)).astype(np.float32)


def _reason(error: RuntimeError) -> str:
    return str(error).rsplit("Error: ", 1)[-1].splitlines()[0].strip()
