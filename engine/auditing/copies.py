"""Near-duplicates: what is much nearer to each other than its neighbourhoods are, by the recogniser and by the pixels.

Of two exemplars, two ratios are looked at. The first is of their distance by the recogniser's descriptors to the
distances at which either has its tenth neighbour (local scaling: Zelnik-Manor and Perona, NeurIPS 2004). For exemplars
that have a near neighbour in this sense, the pixels of the nearest are aligned (`alignment`), and the second ratio is
of what is left to what is left of their other neighbours. Minus the sum of both logarithms is the statistic.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, UInt8

from tmm_engine.auditing.alignment import pictures, residuals
from tmm_engine.auditing.discovery import Tail
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.graph import NeighbourGraph, distances, nearest_exemplars
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.exemplars import ExemplarStore

ALIGNED = 5  # neighbours of each exemplar whose pixels are compared
TENTH = 10
SUSPECT = -0.1  # log of the first ratio from which on pixels are looked at
MOST_PAIRS = 50_000  # aligned, and one more for each exemplar
NEARLY = 1e-3  # distances and residuals that are rounding
LOWEST = 0.05  # quantile below which a neighbourhood is one of copies: no scale
READ = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Pairs of images that may be the same.

    Attributes:
        first: Rows: of the exemplars, or of other images.
        second: Rows of exemplars.
        similarity: Cosine similarity by the recogniser.
        statistic: Larger is more alike.
    """

    first: Int64[np.ndarray, "p"]
    second: Int64[np.ndarray, "p"]
    similarity: Float32[np.ndarray, "p"]
    statistic: Float64[np.ndarray, "p"]

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True, slots=True, eq=False)
class _Looks:
    """Images whose nearest were looked at closely, and what came of it.

    Attributes:
        suspects: Which images.
        typical: What is left when their nearest are aligned, in the middle.
        pairs: Of (image, exemplar), several for each suspect.
        ratio: Logarithms of the first ratio.
        left: What was left, 1 − correlation.
        similarity: By the recogniser.
    """

    suspects: Int64[np.ndarray, "s"]
    typical: Float64[np.ndarray, "s"]
    pairs: Int64[np.ndarray, "p 2"]
    ratio: Float64[np.ndarray, "p"]
    left: Float32[np.ndarray, "p"]
    similarity: Float32[np.ndarray, "p"]


class CopyDetector:
    """Finds copies among exemplars, and of other images among them.

    Args:
        store: The exemplars; at least 3.
        graph: Of the column that recognises copies.
        column: Its name.
        memory: As for `neighbour_graph`.
        progress: Told of pairs aligned.

    Attributes:
        tail: How often images that are no copies have a statistic as large.
        pairs: Of exemplars, each once, the first row the smaller.
        cut: How many exemplars were suspect, but not looked at because there were too many.

    Raises:
        InputError: fewer exemplars.
    """

    def __init__(
        self, store: ExemplarStore, graph: NeighbourGraph, *, column: str, memory: int, progress: Progress = silent
    ) -> None:
        if len(store) < 3:
            raise InputError(f"expected at least 3 exemplars to tell copies from others, got {len(store)}")
        self._store, self._column, self._memory = store, column, memory
        scales = graph.distances[:, min(TENTH, graph.k) - 1]
        self._scales = np.maximum(scales, np.quantile(scales, LOWEST)) + NEARLY
        looks, nearest = self._look(graph.rows, graph.scores, self._scales, None, progress)
        self.cut = int((nearest <= SUSPECT).sum()) - len(looks.suspects)
        low, middle = np.quantile(looks.typical, [LOWEST, 0.5]) if len(looks.suspects) else (0.0, 1.0)
        self._middle = float(middle)
        self._typical = np.full(len(store), self._middle)
        self._typical[looks.suspects] = np.maximum(looks.typical, low)
        statistic = self._statistic(looks, self._typical)
        ordered, at = np.unique(np.sort(looks.pairs, axis=1), axis=0, return_index=True)
        self.pairs = Pairs(ordered[:, 0], ordered[:, 1], looks.similarity[at], statistic[at])
        best = np.full(len(store), -np.inf)
        np.maximum.at(best, looks.pairs.ravel(), np.repeat(statistic, 2))
        self.tail = Tail.fit(np.where(np.isinf(best), -nearest, best))

    def across(
        self, features: Float32[np.ndarray, "q d"], images: UInt8[np.ndarray, "q c h w"], *, progress: Progress = silent
    ) -> Pairs:
        """Of other images and exemplars; the first of a pair is a position among the others.

        Args:
            features: Of the others, as the recogniser's column has them.
            images: The others, of the exemplars' shape.
            progress: Told of pairs aligned.
        """
        k = min(TENTH, len(self._store))
        rows, scores = nearest_exemplars(self._store, features, k=k, column=self._column, memory=self._memory)
        scales = np.maximum(distances(scores, Metric.COSINE)[:, -1], self._scales.min()) + NEARLY
        looks, _ = self._look(rows, scores, scales, pictures(images), progress)
        typical = np.full(len(images), self._middle)
        typical[looks.suspects] = looks.typical
        statistic = self._statistic(looks, np.maximum(typical, self._typical.min()))
        return Pairs(looks.pairs[:, 0], looks.pairs[:, 1], looks.similarity, statistic)

    def _look(
        self,
        rows: Int64[np.ndarray, "n k"],
        scores: Float32[np.ndarray, "n k"],
        scales: Float[np.ndarray, "n"],
        others: UInt8[np.ndarray, "n h w"] | None,
        progress: Progress,
    ) -> tuple[_Looks, Float64[np.ndarray, "n"]]:
        """The suspects among images, and for every image the first ratio of its nearest."""
        taken = min(ALIGNED, rows.shape[1])
        rows, scores = rows[:, :taken], scores[:, :taken]
        apart = distances(scores, Metric.COSINE) + NEARLY
        ratio = np.log(apart / np.sqrt(scales[:, None] * self._scales[rows])).astype(np.float64)
        nearest = ratio.min(axis=1)
        most = (MOST_PAIRS + len(rows)) // taken
        suspects = np.argsort(nearest, kind="stable")[:most]
        suspects = np.sort(suspects[nearest[suspects] <= SUSPECT])
        pairs = np.stack([np.repeat(suspects, taken), rows[suspects].ravel()], axis=1)
        left = self._left(pairs, others, progress)
        typical = np.median(left.reshape(len(suspects), taken), axis=1).astype(np.float64)
        found = _Looks(suspects, typical, pairs, ratio[suspects].ravel(), left, scores[suspects].ravel())
        return found, nearest

    def _left(
        self, pairs: Int64[np.ndarray, "p 2"], others: UInt8[np.ndarray, "n h w"] | None, progress: Progress
    ) -> Float32[np.ndarray, "p"]:
        """What is left of each pair; of two exemplars, which may be there both ways, once."""
        if others is not None:
            rows, places = np.unique(pairs[:, 1], return_inverse=True)
            aligned = np.stack([pairs[:, 0], places.ravel()], axis=1)
            return residuals(others, self._pictures(rows), aligned, progress=progress)
        ordered, back = np.unique(np.sort(pairs, axis=1), axis=0, return_inverse=True)
        rows, places = np.unique(ordered, return_inverse=True)
        shown = self._pictures(rows)
        return residuals(shown, shown, places.reshape(ordered.shape), progress=progress)[back.ravel()]

    def _pictures(self, rows: Int64[np.ndarray, "r"]) -> UInt8[np.ndarray, "r h w"]:
        parts = [pictures(self._store.images(rows[start : start + READ])) for start in range(0, len(rows), READ)]
        return np.concatenate(parts) if parts else np.empty((0, 1, 1), np.uint8)

    def _statistic(self, looks: _Looks, typical: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "p"]:
        first, second = looks.pairs.T
        left = np.log((looks.left + NEARLY) / np.sqrt((typical[first] + NEARLY) * (self._typical[second] + NEARLY)))
        return -(looks.ratio + left)


def groups(first: Int64[np.ndarray, "p"], second: Int64[np.ndarray, "p"]) -> list[list[int]]:
    """What pairs connect, directly or through others: each group ascending, in order of its first."""
    leader: dict[int, int] = {}

    def lead(row: int) -> int:
        while leader.setdefault(row, row) != row:
            leader[row] = row = leader[leader[row]]
        return row

    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted((lead(one), lead(other)))
        leader[high] = low
    found: dict[int, list[int]] = {}
    for row in sorted(leader):
        found.setdefault(lead(row), []).append(row)
    return [found[row] for row in sorted(found)]
