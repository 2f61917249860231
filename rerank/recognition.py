"""Recognition: is the query a copy of an exemplar, under whatever noise? Then it is answered for as that exemplar.

A search compares the query with every exemplar. Where one of them looks like the very image that the query shows, the
query's features move to that exemplar's, and the search is made again: the noise is gone, and with it its influence on
all other neighbours. How far they move is a smooth function of the similarity, so that nothing jumps at the threshold;
a query that resembles no exemplar that much keeps its features, and its answer.

This is query expansion (Chum et al., ICCV 2007) by the one best match, with a gate.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

SHARPNESS = 20.0  # at a similarity of 1 the query's features move to within e^−20 of the exemplar's


@dataclass(frozen=True, slots=True)
class Recognised:
    """The exemplar most likely to be the query's original.

    Attributes:
        row: Its row.
        similarity: How much it looks like the image that the query shows; at most 1.
        share: How far the query's features moved to the exemplar's, in [0, 1]; a half at the threshold.
    """

    row: int
    similarity: float
    share: float

    @classmethod
    def at(cls, row: int, similarity: float, *, threshold: float) -> "Recognised":
        """The share follows a logistic function: a half at the threshold, 1 − e^−20 at a similarity of 1.

        Args:
            row: The exemplar's.
            similarity: At most 1.
            threshold: In [0, 1).
        """
        logit = SHARPNESS * (similarity - threshold) / (1.0 - threshold)
        return cls(row, similarity, (1.0 + math.tanh(logit / 2.0)) / 2.0)

    def moved(self, query: Float[Tensor, "*n d"], exemplar: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """The query's features, by that share of the way at the exemplar's."""
        return (1.0 - self.share) * query + self.share * exemplar
