"""Prototypes: of each class the exemplar in its middle, its medoid by what ranks."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn.functional import normalize

from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.scanning import SCAN


def medoids(store: ExemplarStore, classes: Int64[np.ndarray, "n"], metric: Metric, *, column: str) -> dict[int, int]:
    """The row of every class's medoid, by class; ties in order of id.

    The medoid has the smallest sum of squared distances to the others of its class (L2), or the largest sum of cosine
    similarities: with m the mean of the class, of unit vectors for cosine, that is the exemplar with the smallest
    |x − m|², or the largest x·m. Two scans over the column, whatever the number of classes.

    Args:
        store: The exemplars.
        classes: Of each exemplar, numbers from 0.
        metric: What ranks.
        column: Of the store's features.
    """
    sums = torch.zeros(int(classes.max()) + 1, store.feature_columns[column], dtype=torch.float64)
    for rows, block in _scan(store, metric, column):
        sums.index_add_(0, torch.tensor(classes[rows]), block)
    counts = torch.from_numpy(np.bincount(classes)).clamp(min=1)
    means = sums / counts[:, None]
    nearness = np.concatenate(
        [_nearness(block, means[torch.tensor(classes[rows])], metric) for rows, block in _scan(store, metric, column)]
    )
    found = {}
    for own in np.unique(classes).tolist():
        rows = np.flatnonzero(classes == own)
        found[own] = int(rows[best_first(nearness[rows], rows, store.ids, k=1)[0]])
    return found


def _nearness(block: Float64[Tensor, "b d"], means: Float64[Tensor, "b d"], metric: Metric) -> Float64[np.ndarray, "b"]:
    if metric is Metric.L2:
        return -(block - means).square().sum(dim=1).numpy()
    return (block * means).sum(dim=1).numpy()


def _scan(
    store: ExemplarStore, metric: Metric, column: str
) -> Iterator[tuple[Int64[np.ndarray, "b"], Float64[Tensor, "b d"]]]:
    """Rows and features, of unit length for cosine."""
    start = 0
    for block in store.scan_features(SCAN, column=column):
        features = torch.tensor(block).double()  # a copy: a store's may be read-only
        rows = np.arange(start, start + len(block))
        start += len(block)
        yield rows, normalize(features) if metric is Metric.COSINE else features
