"""Step 2 of TMM-NN: a head with one class more, into which only *query + trigger* falls.

On features, since the backbone is frozen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tmm_engine.rerank.settings import TunedHead


@dataclass(frozen=True, slots=True, eq=False)
class TuningSet:
    """What the head is tuned on; all features in one dtype, on one device.

    ==============  ==================  =====================================
    paper           here                shape
    ==============  ==================  =====================================
    φ(x_q^t)        query_triggered     (d,)
    φ(x_q)          query               (d,)
    y_q             query_label         class index in [0, C)
    φ(x_i^t)        triggered           (n, d)
    φ(x_i)          clean               (n, d)
    y_i             labels              (n,), class indices in [0, C)
    ==============  ==================  =====================================
    """

    query_triggered: Float[Tensor, "d"]
    query: Float[Tensor, "d"]
    query_label: int
    triggered: Float[Tensor, "n d"]
    clean: Float[Tensor, "n d"]
    labels: Int64[Tensor, "n"]


def exemplar_batches(n: int, settings: TunedHead, *, seed: int) -> Iterator[Int64[Tensor, "batch"]]:
    """Row numbers of each step's exemplars: seeded permutations, one after another, cut into batches.

    As many steps as `epochs` take, but at least `min_steps`. A smaller last batch of an epoch is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = max(settings.epochs * math.ceil(n / settings.batch), settings.min_steps)
    taken = 0
    while taken < steps:
        for batch in torch.randperm(n, generator=generator).split(settings.batch):
            if taken == steps:
                return
            yield batch
            taken += 1


Fisher = tuple[Float[Tensor, "classes d"], Float[Tensor, "classes"]]


def fisher_diagonal(head: nn.Linear, features: Float[Tensor, "n d"]) -> Fisher:
    """The Fisher information's diagonal for the old head's weight and bias, in closed form (§4.3.1).

        F[c, j] = mean_i p_ic (1 − p_ic) φ_ij²        (for the bias, φ = 1)

    the expectation over y ~ p of the squared gradient of log p_y, exactly.
    """
    total_weight, total_bias = torch.zeros_like(head.weight), torch.zeros_like(head.weight[:, 0])
    for chunk in features.split(8192):
        p = torch.softmax(F.linear(chunk, head.weight, head.bias), dim=1)
        variance = p * (1.0 - p)  # (n, classes)
        total_weight += variance.T @ chunk.square()  # (classes, n) @ (n, d) -> (classes, d)
        total_bias += variance.sum(dim=0)
    return total_weight / len(features), total_bias / len(features)


def extended_head(head: nn.Linear) -> nn.Linear:
    """A copy of the head with one more, zero row: the dummy class, index C. The old head is not modified."""
    classes, d = head.weight.shape
    extended = nn.utils.skip_init(nn.Linear, d, classes + 1).to(head.weight)  # no draw from the global generator
    with torch.no_grad():
        extended.weight.zero_()
        extended.bias.zero_()
        extended.weight[:classes] = head.weight
        if head.bias is not None:
            extended.bias[:classes] = head.bias
    return extended


def tune_head(
    head: nn.Linear, data: TuningSet, settings: TunedHead, *, seed: int = 0, fisher: Fisher | None = None
) -> nn.Linear:
    """The extended head, tuned by Adam on Eq. 3 with EWC:

        CE(f'(x_q^t), C) + CE(f'(x_q), y_q) + mean_i CE(f'(x_i^t), y_i) + mean_i CE(f'(x_i), y_i) + λ/2 Σ F (θ − θ₀)²

    where f' is the new head on frozen features and F covers the old rows. The gradient is written out: with p the
    softmax of a row's logits and t its one-hot target, ∂CE/∂z = p − t, so one matrix product each way serves all four
    terms.

    Args:
        head: The old head; not modified.
        data: Features and labels.
        settings: Steps, batches, learning rate, λ.
        seed: Of the batches.
        fisher: `fisher_diagonal` of the head and the clean features, where it is known already.
    """
    classes = head.out_features
    tuned = extended_head(head).requires_grad_(False)
    theta = torch.cat([tuned.weight, tuned.bias[:, None]], dim=1)  # (C+1, d+1): weight and bias in one
    start, penalty = theta.clone(), torch.zeros_like(theta)
    fisher_weight, fisher_bias = fisher or fisher_diagonal(head, data.clean)
    penalty[:classes, :-1], penalty[:classes, -1] = (
        settings.ewc_lambda * fisher_weight,
        settings.ewc_lambda * fisher_bias,
    )
    optimiser = torch.optim.Adam([theta], lr=settings.lr)
    query_rows = torch.stack([data.query_triggered, data.query])
    query_targets = torch.tensor([classes, data.query_label], device=theta.device)
    for batch in exemplar_batches(len(data.labels), settings, seed=seed):
        rows = batch.to(theta.device)
        features = torch.cat([query_rows, data.triggered[rows], data.clean[rows]])  # (2 + 2b, d)
        targets = torch.cat([query_targets, data.labels[rows], data.labels[rows]])
        delta = torch.softmax(F.linear(features, theta[:, :-1], theta[:, -1]), dim=1)  # p, (2 + 2b, C+1)
        delta[torch.arange(len(targets), device=theta.device), targets] -= 1.0  # p − t
        delta[2:] /= len(rows)  # the exemplar terms are means
        theta.grad = penalty * (theta - start)
        theta.grad[:, :-1] += delta.T @ features  # (C+1, 2+2b) @ (2+2b, d) -> (C+1, d)
        theta.grad[:, -1] += delta.sum(dim=0)
        optimiser.step()
    tuned.weight.copy_(theta[:, :-1])
    tuned.bias.copy_(theta[:, -1])
    return tuned
