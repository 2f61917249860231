"""An approximate index of one column, by FAISS, and beside it, exactly, the rows that it does not know."""

import copy
import math
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32, Int64

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.cache import FaissCache, Kept
from tmm_engine.index.neighbours.factories import (
    EXACT,
    HALF,
    LARGEST_HALF,
    Effort,
    check_trainable,
    fitting_dimension,
    make_faiss_index,
    reason,
)
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.vectors import filled, scanned, taken
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.index.types import Rows

TRAINED_ON = 1 << 16  # exemplars, where there are so many; and of each cluster at least as many as FAISS asks for
PER_CLUSTER = 39
AT_MOST_BESIDE = 1.0  # of the rows that the index knows: with more beside it, it is built anew
SEED = 0
_untyped: Any = faiss  # whose stubs know nothing of selectors


class Approximate:
    """Finds candidates: most of the nearest, in a fraction of the time of looking at all.

    An index out of the cache may have been trained on an older version: rows that are gone are passed over, and new
    ones are looked at one by one, until they are more than those it knows, or `compact` has written all anew.

    Args:
        store: The exemplars.
        metric: What makes an exemplar near.
        column: Of the store's features.
        factory: A FAISS factory string that is not exact.
        effort: How thoroughly it is searched.
        cache: Where it is kept; without it, it is built anew.

    Raises:
        InputError: FAISS does not know the factory string, or cannot train or fill it with these exemplars.
    """

    def __init__(
        self,
        store: ExemplarStore,
        metric: Metric,
        *,
        column: str,
        factory: str,
        effort: Effort,
        cache: FaissCache | None,
    ) -> None:
        self._metric, self._effort = metric, effort
        self._name = cache_name(metric, factory, column)
        kept = self._kept(store, metric, column=column, factory=factory, cache=cache)
        self._index, self._rows = kept.index, kept.rows
        vectors = np.arange(len(store)) if kept.rows is None else kept.rows
        known = vectors[vectors >= 0]
        unknown = np.ones(len(store), dtype=bool)
        unknown[known] = False
        self._beside: Rows = np.flatnonzero(unknown)
        self._others = taken(store, self._beside, column, metric)
        gone = len(known) < len(vectors)
        self._selector = _untyped.IDSelectorBatch(np.flatnonzero(vectors >= 0)) if gone else None

    def with_effort(self, effort: Effort) -> "Approximate":
        """The same index, searched more or less thoroughly."""
        other = copy.copy(self)
        other._effort = effort
        return other

    def keep(self, cache: FaissCache) -> None:
        """Put the index, built of all rows without a cache, into one."""
        cache.save(self._name, self._index)

    @property
    def beside(self) -> int:
        """How many rows are looked at one by one."""
        return len(self._beside)

    def size(self) -> int:
        """Bytes that it takes in memory."""
        counted = _Counted()
        _untyped.write_index(self._index, _untyped.PyCallbackIOWriter(counted))
        return counted.total + self._others.nbytes

    def search(self, xq: Float32[np.ndarray, "q d"], *, fetch: int) -> Int64[np.ndarray, "q found"]:
        """Rows of candidates for each query, best first by what the index knows; −1 where fewer were found.

        Args:
            xq: As `vectors.comparable` makes them.
            fetch: How many of the index, and as many of the rows beside it.
        """
        distances, found = self._index.search(
            filled(xq, self._index.d), min(fetch, self._index.ntotal), params=self._parameters()
        )
        if self._rows is not None:
            found = np.where(found >= 0, self._rows[found], -1)
        if not len(self._beside) or not len(xq):
            return found
        kind, sign = (faiss.METRIC_INNER_PRODUCT, -1) if self._metric is Metric.COSINE else (faiss.METRIC_L2, 1)
        others, near = faiss.knn(xq, self._others, min(fetch, len(self._beside)), metric=kind)
        found = np.concatenate([found, np.where(near >= 0, self._beside[near], -1)], axis=1)
        order = np.argsort(sign * np.concatenate([distances, others], axis=1), axis=1, kind="stable")
        return np.take_along_axis(found, order, axis=1)

    def _parameters(self) -> faiss.SearchParameters | None:
        if (clusters := faiss.try_extract_index_ivf(self._index)) is not None:
            nprobe = self._effort.nprobe or math.isqrt(clusters.nlist)  # FAISS would look into one alone
            return _untyped.SearchParametersIVF(nprobe=nprobe, sel=self._selector)
        if isinstance(self._index, faiss.IndexHNSW):
            ef_search = self._effort.ef_search or self._index.hnsw.efSearch
            return _untyped.SearchParametersHNSW(efSearch=ef_search, sel=self._selector)
        return None if self._selector is None else _untyped.SearchParameters(sel=self._selector)

    def _kept(
        self, store: ExemplarStore, metric: Metric, *, column: str, factory: str, cache: FaissCache | None
    ) -> Kept:
        """Out of the cache, or built anew and put into it."""
        if cache is None:
            return Kept(built(store, metric, column=column, factory=factory))
        kept = cache.load(self._name)
        if kept is not None and kept.rows is not None:
            known, gone = int((kept.rows >= 0).sum()), bool((kept.rows < 0).any())
            unselectable = gone and isinstance(kept.index, faiss.IndexPQ)  # FAISS cannot leave rows out of it
            kept = None if len(store) - known > AT_MOST_BESIDE * known or unselectable else kept
        if kept is None:
            kept = Kept(built(store, metric, column=column, factory=factory))
            cache.save(self._name, kept.index)
        return kept


class _Counted:
    """Takes what is written, and counts it."""

    total = 0

    def __call__(self, content: bytes) -> int:
        self.total += len(content)
        return len(content)


def cache_name(metric: Metric, factory: str, column: str) -> str:
    """Of the file that holds such an index of such a column."""
    return f"{metric} {factory}" if column == FEATURE else f"{metric} {factory} {column}"


def built(store: ExemplarStore, metric: Metric, *, column: str, factory: str) -> faiss.Index:
    """A FAISS index of all rows of a store.

    Raises:
        InputError: FAISS does not know the factory string, or cannot train or fill it with these exemplars.
    """
    dimension = fitting_dimension(store.feature_columns[column], factory)
    index = make_faiss_index(dimension, metric, factory)
    check_trainable(factory, len(store))
    try:
        if not index.is_trained:
            index.train(filled(taken(store, _sample(index, len(store)), column, metric), dimension))
        for features in scanned(store, column, metric):
            if HALF in factory and np.abs(features).max(initial=0) > LARGEST_HALF:
                raise InputError(f"fp16 holds numbers up to {LARGEST_HALF:,.0f}, some features are larger: use fp32")
            index.add(filled(features, dimension))
    except RuntimeError as error:
        raise InputError(
            f"FAISS cannot use {factory!r} for {len(store)} exemplars: {reason(error)}; use fewer clusters, or "
            f"{EXACT!r}"
        ) from None
    return index


def _sample(index: faiss.Index, n: int) -> Rows:
    """What is trained on: some rows spread over all, ascending."""
    clusters = faiss.try_extract_index_ivf(index)
    size = max(TRAINED_ON, 0 if clusters is None else PER_CLUSTER * clusters.nlist)
    return np.sort(np.random.default_rng(SEED).choice(n, size, replace=False)) if size < n else np.arange(n)
