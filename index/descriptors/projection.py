"""A linear map to few dimensions, fitted on a sample: principal components, partly whitened."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

DIMENSIONS = 512
SMALLEST = 1e-10  # of the largest variance: what is below has no direction
FLOOR = 1e-3  # of the largest variance: what is added to every one, so that noise is not blown up


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """x ↦ (x − mean) · matrix.

    Attributes:
        mean: Of the sample.
        matrix: Principal components as columns, each divided by its variance to some power.
    """

    mean: Float[Tensor, "e"]
    matrix: Float[Tensor, "e k"]

    @classmethod
    def fit(cls, sample: Float[Tensor, "n e"], *, power: float, dimensions: int = DIMENSIONS) -> "Projection":
        """The first principal components of a sample, in float64.

        Args:
            sample: At least two rows.
            power: Of the variance that a component is divided by: 0 rotates only, 1/2 whitens (Jégou and Chum, ECCV
                2012), what is between does so in part.
            dimensions: At most so many; never more than the sample has.
        """
        precise = sample.double()
        mean = precise.mean(0)
        variance, components = _principal(precise - mean)
        kept = max(1, min(dimensions, int((variance > variance[0] * SMALLEST).sum())))
        variance, components = variance[:kept], components[:, :kept]
        scale = (variance + variance[0] * FLOOR) ** -power if variance[0] > 0 else torch.ones_like(variance)
        return cls(mean.float(), (components * scale).float())

    def __call__(self, rows: Float[Tensor, "n e"]) -> Float[Tensor, "n k"]:
        """Projected, of unit length; 0 where a row is the mean."""
        return normalize((rows - self.mean) @ self.matrix)


def _principal(centred: Float[Tensor, "n e"]) -> tuple[Float[Tensor, "k"], Float[Tensor, "e k"]]:
    """Variances, the largest first, and unit components as columns; by the smaller of the two Gram matrices."""
    n, e = centred.shape
    if e <= n:
        values, components = torch.linalg.eigh(centred.T @ centred)
        return values.flip(0).clamp(min=0) / n, components.flip(1)
    values, rows = torch.linalg.eigh(centred @ centred.T)
    values, rows = values.flip(0).clamp(min=0), rows.flip(1)
    return values / n, normalize(centred.T @ rows, dim=0)
