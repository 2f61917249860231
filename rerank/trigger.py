"""Step 1 of TMM-NN: a trigger that is large, and yet leaves what the model says of the query unchanged."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.rerank.cuda_graphs import graphed
from tmm_engine.rerank.settings import Blend, TmmConfig, Trigger

INITIAL_STD = 0.01  # τ₀ ~ N(0, 0.01²)
PATCH = 3  # pixels a side, at the top-left (§4.8.1)
PATIENCE = 10  # steps over which the loss has to fall by `trigger_tolerance`
CHECK_EVERY = 10  # steps, on a GPU: to ask whether all queries have stopped makes the host wait for the device


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
    search = _Search(classifier, queries, config)
    steps = 0 if config.trigger is Trigger.FIXED_PATCH else config.trigger_steps
    search.run(steps, check_every=CHECK_EVERY if queries.device.type == "cuda" else 1)
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
    """One joint optimisation as a *static step*: its tensors stay where they are, and no step reads one on the host.

    So a step can be recorded and replayed (`graphed`). Stops are decided on the device, for each query: one that is no
    longer active keeps its best trigger, losses and count, however many steps follow.
    """

    def __init__(self, classifier: Classifier, queries: Float[Tensor, "q c h w"], config: TmmConfig) -> None:
        self.classifier, self.queries, self.tolerance = classifier, queries, config.trigger_tolerance
        self.trigger, self.mask = _start(queries, config)
        self.gradient = self.trigger.grad = torch.zeros_like(self.trigger)
        on_gpu = queries.device.type == "cuda"
        self.optimiser = torch.optim.Adam([self.trigger], lr=config.trigger_lr, capturable=on_gpu)
        with torch.no_grad():
            self.target = classifier.logits(classifier.features(queries))
        self.initial = self._evaluate()
        self.best = self.trigger.clone()
        self.lowest = self.initial.repeat(PATIENCE + 1, 1)  # the best loss after each of the last evaluations
        self.active = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
        self.steps = torch.ones(len(queries), dtype=torch.int64, device=queries.device)

    def run(self, steps: int, *, check_every: int) -> None:
        """At most so many steps; fewer where all queries are found to have stopped, which is asked now and then."""
        step = graphed(self.step, self.queries.device)
        for done in range(1, steps + 1):
            step()
            if done % check_every == 0 and not bool(self.active.any()):
                break

    def step(self) -> None:
        """Move all triggers; keep what is better, and retire those whose best loss hardly fell in the last steps."""
        self.optimiser.step()
        loss = self._evaluate()
        better = self.active & (loss < self.lowest[-1])
        self.best.copy_(torch.where(better[:, None, None, None], self.trigger, self.best))
        self.lowest.copy_(torch.cat([self.lowest[1:], torch.where(better, loss, self.lowest[-1])[None]]))
        self.steps += self.active
        before, now = self.lowest[0], self.lowest[-1]
        self.active &= ((before - now) >= self.tolerance * before) | (self.steps <= PATIENCE)

    def _evaluate(self) -> Float[Tensor, "q"]:
        """Eq. 8 at the current triggers; its gradient goes where the optimiser reads it."""
        trigger = self.trigger.detach().requires_grad_()  # new: autograd ties a leaf to the stream of its first use
        logits = self.classifier.logits(self.classifier.features(self.queries + trigger))
        loss = (logits - self.target).square().mean(dim=1) + 1.0 / trigger.square().sum(dim=(1, 2, 3))
        (gradient,) = torch.autograd.grad(loss.sum(), trigger)
        self.gradient.copy_(gradient * self.mask)
        return loss.detach()

    def result(self) -> TriggerResult:
        """The best triggers, and how they were found."""
        return TriggerResult(self.best, self.initial, self.lowest[-1], self.steps)
