"""The k-nearest-neighbour graph of a store: for every exemplar the k others nearest to it, exactly.

Blocks of exemplars are compared with blocks of exemplars by FAISS's matrix products, so that memory is bounded and a
column need not fit into it. Scores are sums in float32: what differs by less than that rounds to may stand in either
order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import faiss
import numpy as np
from jaxtyping import Float32, Int64
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.cache import KeptFiles
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import MARGIN
from tmm_engine.index.neighbours.vectors import comparable
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.exemplars import ExemplarStore

TILE = 4096
"""Rows that FAISS multiplies at a time: blocks are whole tiles."""
DEFAULT_MEMORY = 1 << 30
WORKING = 64 << 20
"""Bytes that FAISS takes for a product of tiles."""


@dataclass(frozen=True, slots=True, eq=False)
class NeighbourGraph:
    """The exemplars nearest to each exemplar, which is never among its own.

    Attributes:
        rows: Nearest first; equal scores in order of id.
        scores: Cosine similarities, or minus L2 distances: larger is nearer.
        metric: Which.
    """

    rows: Int64[np.ndarray, "n k"]
    scores: Float32[np.ndarray, "n k"]
    metric: Metric

    @property
    def k(self) -> int:
        """Neighbours of each exemplar."""
        return self.rows.shape[1]

    @property
    def distances(self) -> Float32[np.ndarray, "n k"]:
        """L2 distances; of similarities those between the unit vectors, √(2 − 2s)."""
        return distances(self.scores, self.metric)

    def first(self, k: int) -> "NeighbourGraph":
        """Its k nearest alone."""
        return replace(self, rows=self.rows[:, :k], scores=self.scores[:, :k])


def distances(scores: Float32[np.ndarray, "n k"], metric: Metric) -> Float32[np.ndarray, "n k"]:
    """What scores say in terms of L2."""
    if metric is Metric.L2:
        return -scores
    return np.sqrt(np.maximum(0, 2 - 2 * scores))


@dataclass(frozen=True, slots=True)
class GraphCache(KeptFiles):
    """Graphs of one version of an index."""

    suffix = ".graph"

    def load(self, name: str, metric: Metric) -> NeighbourGraph | None:
        """The graph saved under this name; None if there is none, or it is of other content, or damaged."""
        content = self.read(name)
        if content is None:
            return None
        try:
            kept = load(content)
            return NeighbourGraph(kept["rows"], kept["scores"], metric)
        except (SafetensorError, KeyError):
            return None

    def save(self, name: str, graph: NeighbourGraph) -> None:
        """Keep a graph."""
        content = {"rows": np.ascontiguousarray(graph.rows), "scores": np.ascontiguousarray(graph.scores)}
        self.write(name, lambda path: save_file(content, path))

    def count(self, file: BinaryIO) -> int:
        """Of how many exemplars a file is."""
        try:
            return len(load(file.read())["rows"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"not a graph: {error}") from error


def neighbour_graph(
    store: ExemplarStore,
    *,
    k: int,
    column: str = FEATURE,
    metric: Metric = Metric.COSINE,
    memory: int = DEFAULT_MEMORY,
    cache: GraphCache | None = None,
    progress: Progress = silent,
) -> NeighbourGraph:
    """The min(k, n − 1) nearest others of every exemplar.

    Args:
        store: n exemplars.
        k: At least 1.
        column: Of the store's features.
        metric: What makes an exemplar near.
        memory: Bytes that features and scores may take; the graph itself, 12 · n · k bytes, comes on top.
        cache: Where to keep it; one of as many neighbours or more is taken from there.
        progress: Told of exemplars done.

    Raises:
        InputError: a `k` below 1, a column that the store does not have, or less `memory` than a block takes.
    """
    if k < 1:
        raise InputError(f"expected at least 1 neighbour, got k={k}")
    if column not in store.feature_columns:
        raise InputError(f"expected a column among {', '.join(store.feature_columns)}, got {column!r}")
    k, name = min(k, len(store) - 1), f"{metric} {column}"
    kept = None if cache is None else cache.load(name, metric)
    if kept is not None and len(kept.rows) == len(store) and kept.k >= k:
        return kept.first(k)
    rows, scores = np.empty((len(store), k), np.int64), np.empty((len(store), k), np.float32)
    columns = _Columns(store, column, metric, memory=memory, k=k)
    for start, block in columns.blocks():
        found = columns.nearest(block, k=k + 1)  # itself among them, unless as many are the same
        places = slice(start, start + len(block))
        rows[places], scores[places] = _without_self(np.arange(start, start + len(block)), *found)
        progress(f"comparing exemplars by {column}", start + len(block), len(store))
    graph = NeighbourGraph(rows, scores, metric)
    if cache is not None:
        cache.save(name, graph)
    return graph


def nearest_exemplars(
    store: ExemplarStore,
    features: Float32[np.ndarray, "q d"],
    *,
    k: int,
    column: str = FEATURE,
    metric: Metric = Metric.COSINE,
    memory: int = DEFAULT_MEMORY,
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """The min(k, n) exemplars nearest to other images, as `NeighbourGraph` has them: rows and scores.

    Args:
        store: n exemplars.
        features: Of the others, as in the column.
        k: At least 1.
        column: Of the store's features.
        metric: What makes an exemplar near.
        memory: Bytes that the store's features may take.

    Raises:
        InputError: less `memory` than a block takes.
    """
    columns = _Columns(store, column, metric, memory=memory, k=k)
    return columns.nearest(comparable(features, metric), k=min(k, len(store)))


class _Columns:
    """A column of features by blocks: all of it in memory where that is allowed, else read anew for each block."""

    def __init__(self, store: ExemplarStore, column: str, metric: Metric, *, memory: int, k: int) -> None:
        self._store, self._column, self._metric = store, column, metric
        self._order = np.argsort(np.argsort(store.ids))  # the place of each exemplar among the ids
        row_bytes = 4 * store.feature_columns[column]
        a_tile = min(TILE, len(store))
        of_results = 48 * (k + 1)  # two sets of rows and scores, while they are merged
        least = WORKING + a_tile * (2 * row_bytes + of_results)
        if memory < least:
            raise InputError(
                f"expected at least {least / 2**20:.0f} MiB to compare exemplars by {column}, got "
                f"{memory / 2**20:.0f} MiB (`memory=…`)"
            )
        room = memory - WORKING
        self._whole: Float32[np.ndarray, "n d"] | None = None
        if len(store) * row_bytes + a_tile * of_results <= room:
            self._size = TILE
            self._whole = np.concatenate([block for _, block in self._scanned()] or [np.empty((0, 1), np.float32)])
        else:
            self._size = room // (2 * row_bytes + of_results) // TILE * TILE

    def blocks(self) -> Iterator[tuple[int, Float32[np.ndarray, "block d"]]]:
        """Where each begins, and its features."""
        for start in range(0, len(self._store), self._size):
            rows = np.arange(start, min(start + self._size, len(self._store)))
            if self._whole is not None:
                yield start, self._whole[rows[0] : rows[-1] + 1]
            else:
                yield start, comparable(self._store.features(rows, column=self._column), self._metric)

    def nearest(
        self, queries: Float32[np.ndarray, "q d"], *, k: int
    ) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
        """The k exemplars nearest to each query, nearest first."""
        rows, scores = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        for start, block in self._scanned() if self._whole is None else [(0, self._whole)]:
            kind = faiss.METRIC_INNER_PRODUCT if self._metric is Metric.COSINE else faiss.METRIC_L2
            found, at = faiss.knn(queries, block, min(k + MARGIN, len(block)), metric=kind)  # what ties is by id
            own = found if self._metric is Metric.COSINE else -np.sqrt(np.maximum(0, found))
            rows, scores = np.hstack([rows, at + start]), np.hstack([scores, own])
            best = np.lexsort((self._order[rows], -scores), axis=1)[:, :k]
            rows, scores = np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)
        return rows, scores

    def _scanned(self) -> Iterator[tuple[int, Float32[np.ndarray, "block d"]]]:
        start = 0
        for block in self._store.scan_features(self._size, column=self._column):
            yield start, comparable(block, self._metric)
            start += len(block)


def _without_self(
    own: Int64[np.ndarray, "n"], rows: Int64[np.ndarray, "n k1"], scores: Float32[np.ndarray, "n k1"]
) -> tuple[Int64[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Each row without the exemplar itself, or without the last where so many are as near that it is not there."""
    left_out = rows == own[:, None]
    left_out[~left_out.any(axis=1), -1] = True
    shape = (len(rows), rows.shape[1] - 1)
    return rows[~left_out].reshape(shape), scores[~left_out].reshape(shape)
