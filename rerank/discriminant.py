"""Step 2 of TMM-NN in closed form: the linear discriminant that tells *query + trigger* from all *exemplar + trigger*.

Eq. 3 fits the dummy class's row by gradient steps. If triggered features are Gaussian, with the covariance Σ that the
exemplars' have, the best row has a closed form: Fisher's linear discriminant with a single positive, the "exemplar LDA"
of Hariharan, Malik and Ramanan, *Discriminative Decorrelation for Clustering and Classification*, ECCV 2012:

    w_C = Σ⁻¹ (φ(x_q^t) − μ)

An exemplar's score is w_C · (φ(x_i^t) − μ), divided by the lengths of both vectors under Σ⁻¹: the cosine similarity of
decorrelated (whitened) features. It is 1 for the query itself, and about 0 for an exemplar that has nothing in common
with it beyond what all exemplars have. Nothing is drawn, and no step size chosen.

==============  ===============  ===================================================
symbol          here             meaning
==============  ===============  ===================================================
μ               mean             mean of the triggered exemplars' features, (d,)
Σ = L Lᵀ        factor           the Cholesky factor L of their covariance, (d, d)
L⁻¹ (φ − μ)     `decorrelated`  features without what they share
==============  ===============  ===================================================
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

ROWS = 8192  # features decorrelated at a time


@dataclass(frozen=True, slots=True, eq=False)
class Discriminant:
    """Mean and shrunk covariance of triggered exemplars' features.

    Attributes:
        mean: float64 (d,), μ.
        factor: float64 (d, d), lower triangular L with L Lᵀ = Σ + shrinkage · mean variance · I.
    """

    mean: Float64[Tensor, "d"]
    factor: Float64[Tensor, "d d"]

    @classmethod
    def fit(cls, chunks: Iterable[Float[Tensor, "_ d"]], *, shrinkage: float) -> "Discriminant":
        """From φ(x_i^t), in one pass.

        Args:
            chunks: Features, some rows at a time; at least one row.
            shrinkage: What is added to every variance, as a share of the mean variance; above 0, since there may be
                fewer exemplars than dimensions.
        """
        moments: Moments | None = None
        for chunk in chunks:
            for rows in chunk.split(ROWS):
                moments = moments or Moments.about(rows)
                moments.add(rows)
        assert moments is not None, "no features to fit"
        return cls.of(moments, shrinkage=shrinkage)

    @classmethod
    def of(cls, moments: "Moments", *, shrinkage: float) -> "Discriminant":
        """From the moments of φ(x_i^t)."""
        mean, covariance = moments.mean_and_covariance()
        variance = covariance.diagonal().mean()
        covariance.diagonal().add_(shrinkage * variance.where(variance > 0, 1.0))
        return cls(mean, torch.linalg.cholesky(covariance))

    def lengths(self, triggered: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
        """‖L⁻¹ (φ − μ)‖ of every row."""
        return torch.cat([self.decorrelated(rows).norm(dim=1) for rows in triggered.split(ROWS)])

    def similarities(
        self, query: Float[Tensor, "d"], triggered: Float[Tensor, "n d"], *, lengths: Float[Tensor, "n"]
    ) -> Float[Tensor, "n"]:
        """Cosine similarity of decorrelated features, in [−1, 1]; 0 where a length is 0.

        Args:
            query: φ(x_q^t).
            triggered: φ(x_i^t).
            lengths: `lengths(triggered)`.
        """
        own = self.decorrelated(query[None])
        row = torch.linalg.solve_triangular(self.factor.T.to(query), own.T, upper=True)[:, 0]  # w_C, (d,)
        products = triggered @ row - self.mean.to(query) @ row  # (n, d) @ (d,) -> (n,)
        scale = lengths * own.norm()
        return (products / scale.where(scale > 0, 1.0)).where(scale > 0, 0.0).clamp(-1.0, 1.0)

    def decorrelated(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """L⁻¹ (φ − μ) of every row."""
        centred = (features - self.mean.to(features)).T
        return torch.linalg.solve_triangular(self.factor.to(features), centred, upper=False).T


class Moments:
    """First and second moments about a point near the mean, so that float32 products do not cancel.

    Args:
        origin: That point, (d,).
    """

    def __init__(self, origin: Float[Tensor, "d"]) -> None:
        d, device = len(origin), origin.device
        self.origin = origin
        self.count = 0
        self.total = torch.zeros(d, dtype=torch.float64, device=device)
        self.products = torch.zeros((d, d), dtype=torch.float64, device=device)

    @classmethod
    def about(cls, first: Float[Tensor, "n d"]) -> "Moments":
        """About the mean of some rows; none are counted yet."""
        return cls(first.mean(dim=0))

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        """Count more rows."""
        shifted = rows - self.origin
        self.count += len(rows)
        self.total += shifted.sum(dim=0, dtype=torch.float64)
        self.products += shifted.T @ shifted  # (d, n) @ (n, d) -> (d, d)

    def merge(self, count: int, total: Float64[Tensor, "d"], products: Float64[Tensor, "d d"]) -> None:
        """Count what others have counted about the same point: moments are sums."""
        self.count += count
        self.total += total
        self.products += products

    def mean_and_covariance(self) -> tuple[Float64[Tensor, "d"], Float64[Tensor, "d d"]]:
        """Of all rows."""
        mean = self.total / self.count
        return self.origin.double() + mean, self.products / self.count - torch.outer(mean, mean)
