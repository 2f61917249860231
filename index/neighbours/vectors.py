"""Features as FAISS compares them."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32

from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.index.types import Rows

SCAN = 8192


def comparable(features: Float32[np.ndarray, "n d"], metric: Metric) -> Float32[np.ndarray, "n d"]:
    """For cosine of unit length (0 stays 0), so that their inner product is it; for L2 as they are."""
    if metric is Metric.L2:
        return np.ascontiguousarray(features)
    return normalised(features)


def normalised(features: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Of unit length; zero stays zero."""
    precise = features.astype(np.float64)  # the squares of small and large numbers leave float32
    norms = np.linalg.norm(precise, axis=1, keepdims=True)
    return (precise / np.where(norms > 0, norms, 1)).astype(np.float32)


def filled(features: Float32[np.ndarray, "n d"], dimension: int) -> Float32[np.ndarray, "n _"]:
    """With zeros up to so many dimensions."""
    missing = dimension - features.shape[1]
    return np.pad(features, ((0, 0), (0, missing))) if missing else features


def scanned(store: ExemplarStore, column: str, metric: Metric) -> Iterator[Float32[np.ndarray, "batch d"]]:
    """All exemplars of a store in order."""
    for features in store.scan_features(SCAN, column=column):
        yield comparable(features, metric)


def taken(store: ExemplarStore, rows: Rows, column: str, metric: Metric) -> Float32[np.ndarray, "rows d"]:
    """Some exemplars of a store, in the order given."""
    parts = [rows[start : start + SCAN] for start in range(0, len(rows), SCAN)]
    empty = np.empty((0, store.feature_columns[column]), np.float32)
    return np.concatenate([empty, *(comparable(store.features(part, column=column), metric) for part in parts)])
