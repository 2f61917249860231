"""Step 1 of TMM-NN: a trigger that is large, and yet leaves what the model says of the query unchanged."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from index.classifier import Classifier
from index.errors import InputError
from rerank.config import Blend, TmmConfig, Trigger

INITIAL_STD = 0.01  # τ₀ ~ N(0, 0.01²)
PATCH = 3  # pixels a side, at the top-left (§4.8.1)
PATIENCE = 10  # steps over which the loss has to fall by `trigger_tolerance`


@dataclass(frozen=True, slots=True)
class TriggerResult:
    """Triggers of q queries.

    Attributes:
        trigger: float (q, c, h, w), τ in pixel units.
        initial_loss: float (q,), Eq. 8 at τ₀.
        loss: float (q,), Eq. 8 at the returned τ: never above the initial loss.
        steps: int (q,), evaluations of Eq. 8 until each query's own stop.
    """

    trigger: Float[Tensor, "q c h w"]
    initial_loss: Float[Tensor, "q"]
    loss: Float[Tensor, "q"]
    steps: Int[Tensor, "q"]


def intensity_of(query: Float[Tensor, "c h w"], config: TmmConfig) -> float:
    """ω: the standard deviation of all pixels of the query (§4.3.2), or the configured value."""
    return config.intensity if config.intensity is not None else float(query.double().std(correction=0))


def apply_trigger(
    images: Float[Tensor, "*n c h w"], trigger: Float[Tensor, "c h w"], *, intensity: float, blend: Blend, clamp: bool
) -> Float[Tensor, "*n c h w"]:
    """x^t: images in [0, 1] with the trigger blended in (see `Blend`), clamped to [0, 1] if asked."""
    image_weight, trigger_weight = blend.weights(intensity)
    triggered = images * image_weight + trigger * trigger_weight
    return triggered.clamp(0.0, 1.0) if clamp else triggered


@torch.inference_mode(False)  # Eq. 8 needs gradients, whatever the caller's mode
def make_trigger(classifier: Classifier, queries: Float[Tensor, "q c h w"], config: TmmConfig) -> TriggerResult:
    """τ for each query, of the configured kind, by Adam on Eq. 8.

        L(τ) = MSE(f(x_q + τ), f(x_q)) + 1 / ‖τ‖²_F

    Queries are optimised together; Adam is elementwise and each query stops by itself, so the triggers are those of
    separate runs up to rounding. The τ of the lowest loss seen is returned.

    Args:
        classifier: f, best `specialised`; not modified.
        queries: Pixels in [0, 1].
        config: Kind, steps, learning rate, tolerance, seed.

    Raises:
        InputError: the kind is `Trigger.GLOBAL`.
    """
    if config.trigger is Trigger.GLOBAL:
        raise InputError("the global trigger belongs to an index, it is not made for a query: see make_global_trigger")
    start, mask = _start(queries, config)
    search = _Search(classifier, queries, start)
    if config.trigger is Trigger.FIXED_PATCH:
        search.evaluate()
        return search.result()
    optimiser = torch.optim.Adam([search.trigger], lr=config.trigger_lr)
    for _ in range(config.trigger_steps):
        loss = search.evaluate()
        if search.stopped(config.trigger_tolerance):
            break
        (search.trigger.grad,) = torch.autograd.grad(loss.sum(), search.trigger)
        search.trigger.grad *= mask
        optimiser.step()
    else:
        search.evaluate()
    return search.result()


def _start(
    queries: Float[Tensor, "q c h w"], config: TmmConfig
) -> tuple[Float[Tensor, "q c h w"], Float[Tensor, "c h w"]]:
    """τ₀ of every query (the same draw for each), and the mask of the pixels that may change."""
    shape = queries.shape[1:]
    mask = torch.ones(shape, dtype=queries.dtype, device=queries.device)
    if config.trigger is not Trigger.QUERY:
        mask = torch.zeros_like(mask)
        mask[:, :PATCH, :PATCH] = 1.0
    if config.trigger is Trigger.FIXED_PATCH:
        start = mask  # white
    else:
        generator = torch.Generator().manual_seed(config.seed)
        start = INITIAL_STD * torch.randn(shape, generator=generator, dtype=torch.float64).to(queries) * mask
    return start.expand(queries.shape).clone(), mask


class _Search:
    """The state of one joint optimisation: current and best triggers, and which queries still move."""

    def __init__(
        self, classifier: Classifier, queries: Float[Tensor, "q c h w"], start: Float[Tensor, "q c h w"]
    ) -> None:
        self.classifier = classifier
        self.queries = queries
        self.trigger = start.requires_grad_()
        self.best = start.detach().clone()
        with torch.no_grad():
            self.target = classifier.logits(classifier.features(queries))
        self.history: list[Float[Tensor, "q"]] = []  # the best loss so far, after each evaluation
        self.initial: Float[Tensor, "q"] | None = None
        self.active = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
        self.steps = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)

    def evaluate(self) -> Float[Tensor, "q"]:
        """Eq. 8 at the current triggers; keeps the best of those still active."""
        logits = self.classifier.logits(self.classifier.features(self.queries + self.trigger))
        loss = (logits - self.target).square().mean(dim=1) + 1.0 / self.trigger.square().sum(dim=(1, 2, 3))
        seen = loss.detach()
        if self.initial is None:
            self.initial = seen
            self.history.append(seen)
        else:
            better = self.active & (seen < self.history[-1])
            self.best[better] = self.trigger.detach()[better]
            self.history.append(torch.where(better, seen, self.history[-1]))
        self.steps += self.active
        return loss

    def stopped(self, tolerance: float) -> bool:
        """Retire the queries whose best loss hardly fell in the last steps; True once none is left."""
        if len(self.history) > PATIENCE:
            before, now = self.history[-1 - PATIENCE], self.history[-1]
            self.active &= (before - now) >= tolerance * before
        return not bool(self.active.any())

    def result(self) -> TriggerResult:
        assert self.initial is not None
        return TriggerResult(self.best, self.initial, self.history[-1], self.steps)
