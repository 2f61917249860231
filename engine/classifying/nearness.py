"""How near each class is to a query: the mean score of its k nearest exemplars, in any mode."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.scanning import RankedBy, score_blocks

TOGETHER = 256  # queries that share a scan


def class_scores(
    store: ExemplarStore,
    queries: Sequence[RankedBy],
    classes: Int64[np.ndarray, "n"],
    *,
    k: int,
    without: Int64[np.ndarray, "q"] | None = None,
) -> Float64[np.ndarray, "q classes"]:
    """s_j: for each query and class the mean score of the class's k nearest exemplars, or of all where it has fewer.

    A scan over the stored features for every `TOGETHER` queries.

    Args:
        store: The exemplars.
        queries: What they are ranked by.
        classes: Of each exemplar: numbers from 0 to the number of classes, each of which occurs.
        k: At least 1.
        without: For each query a row that is left out: its own, where it is an exemplar.

    Returns:
        −∞ for a class of which nothing was scored.
    """
    parts = []
    for start in range(0, len(queries), TOGETHER):
        own = slice(start, start + TOGETHER)
        parts.append(_class_scores(store, queries[own], classes, k, None if without is None else without[own]))
    return np.concatenate(parts)


def _class_scores(
    store: ExemplarStore,
    queries: Sequence[RankedBy],
    classes: Int64[np.ndarray, "n"],
    k: int,
    without: Int64[np.ndarray, "q"] | None,
) -> Float64[np.ndarray, "q classes"]:
    best = np.full((len(queries), int(classes.max()) + 1, k), -np.inf)
    for rows, scores in score_blocks(store, queries):
        if without is not None:
            mine = np.flatnonzero((without >= rows[0]) & (without <= rows[-1]))
            scores[mine, without[mine] - rows[0]] = -np.inf
        for one in np.unique(classes[rows]).tolist():
            offered = np.concatenate([best[:, one], scores[:, classes[rows] == one]], axis=1)
            best[:, one] = np.partition(offered, -k, axis=1)[:, -k:]
    best.sort(axis=2)  # sums do not depend on the order of rows
    counts = (best > -np.inf).sum(axis=2)
    sums = np.where(best > -np.inf, best, 0.0).sum(axis=2)
    return np.divide(sums, counts, out=np.full(sums.shape, -np.inf), where=counts > 0)
