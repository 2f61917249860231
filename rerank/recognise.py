"""Recognition: is the query a copy of an exemplar, under noise? Then it is answered for as that exemplar.

A search compares the query with every exemplar. Where the nearest is much nearer than the second nearest — Lowe's ratio
test (IJCV 2004), who takes 0.8 —, the query's features move to that exemplar's and all are ranked
again: most of the noise is gone, and with it its influence on the other neighbours. This is query expansion (Chum et
al., ICCV 2007) by the one best match, with a gate.

The ratio needs no scale: where exemplars lie close together, a copy must be closer still. How far the features move is
a smooth function of it, so that nothing jumps at the threshold: a query that resembles several exemplars alike moves
little. Of exemplars that are themselves copies of each other none is recognised; the answer is then the one without.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tmm_engine.index.neighbours.metric import Metric

ROUNDING = 1e-3  # shorter distances are not told apart: a similarity of 1 in float32 may be 1 − 1e−7
SHARPNESS = 20.0  # at a ratio of 0 the query's features move to within e^−20 of the exemplar's


@dataclass(frozen=True, slots=True)
class Recognised:
    """The exemplar nearest to the query, and how far the query's features moved to it.

    Attributes:
        row: Its row.
        ratio: Its distance over that of the second nearest, in (0, 1]; 1 where both are at the query, up to rounding.
        share: How far the features moved, in [0, 1]; a half at the threshold.
    """

    row: int
    ratio: float
    share: float

    @classmethod
    def nearest(cls, row: int, distances: tuple[float, float], *, threshold: float) -> "Recognised":
        """By the logistic function of the ratio: a half at the threshold, 1 − e^−20 at 0.

        Args:
            row: The nearest exemplar's.
            distances: Its, and that of the second nearest, between features of about unit length; not negative, the
                first not larger.
            threshold: In (0, 1].
        """
        first, second = (max(distance, ROUNDING) for distance in distances)
        ratio = first / second
        return cls(row, ratio, (1.0 + math.tanh(SHARPNESS * (threshold - ratio) / threshold / 2.0)) / 2.0)

    def moved(self, query: Float[Tensor, "*n d"], exemplar: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """The query's features, by that share of the way at the exemplar's."""
        return (1.0 - self.share) * query + self.share * exemplar


FIRST_RATIO = 0.9
"""Below this ratio the exemplar that is nearest by the recogniser comes first in an answer."""

FIRST_AMONG, FIRST_SHARE = 50, 1 / 40
"""It also does where it is among so many of the best, and among such a share of all exemplars."""

TIED = 0.999
"""From this ratio on the two nearest are not told apart, and neither comes first."""


def comes_first(recognised: Recognised, rank: int, exemplars: int) -> bool:
    """Whether an answer begins with the exemplar that the recogniser finds nearest, wherever it ranks.

    Under noise the very image is found by what recognises more often than by what ranks. Either tells: it is somewhat
    nearer than the second nearest (which says less than what takes a query for a copy), or what ranks agrees.

    Args:
        recognised: The nearest by the recogniser.
        rank: Its place in the ranking, 0 is first.
        exemplars: How many are ranked.
    """
    return recognised.ratio < FIRST_RATIO or (recognised.ratio < TIED and rank < first_among(exemplars))


def first_among(exemplars: int) -> int:
    """How many of the best of so many exemplars are looked at for `comes_first`."""
    return min(FIRST_AMONG, int(FIRST_SHARE * exemplars))


def chord(similarity: float) -> float:
    """The distance, up to a factor, of two directions with this cosine similarity; rounding above 1 counts as 1."""
    return math.sqrt(max(0.0, 1.0 - similarity))


def recognise_nearest(
    features: Float[Tensor, "d"], nearest: Sequence[tuple[int, float]], *, metric: Metric, threshold: float
) -> Recognised | None:
    """What plain neighbours say: the ratio of the distances of the two nearest, in units of the query's length.

    Args:
        features: φ(x_q).
        nearest: (row, score) of at least the two nearest, nearest first, as `Metric` scores them; an approximate index
            may find fewer.
        metric: What they are nearest by.
        threshold: In (0, 1].

    Returns:
        None where fewer than two are given.
    """
    if len(nearest) < 2:
        return None
    length = float(features.norm()) or 1.0
    (row, _), *_ = nearest
    first, second = (-score / length if metric is Metric.L2 else chord(score) for _, score in nearest[:2])
    return Recognised.nearest(row, (first, second), threshold=threshold)
