"""Eq. 8: a trigger that is large, and yet leaves what the model says of the query unchanged."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.rerank.settings import FixedPatch, PatchTrigger, QueryTrigger

INITIAL_STD = 0.01  # τ₀ ~ N(0, 0.01²)
PATCH = 3  # pixels a side, at the top-left (§4.8.1)
PATIENCE = 10  # steps over which the loss has to fall by `trigger_tolerance`
CHECK_EVERY = 10  # steps, on a GPU: to ask whether all queries have stopped makes the host wait for the device


@dataclass(frozen=True, slots=True, eq=False)
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


OwnTrigger = QueryTrigger | PatchTrigger | FixedPatch
"""Triggers that are made for a query."""


@torch.inference_mode(False)  # Eq. 8 needs gradients, whatever the caller's mode
def make_trigger(
    classifier: Classifier,
    queries: Float[Tensor, "q c h w"],
    settings: OwnTrigger,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> TriggerResult:
    """τ for each query, by Adam on Eq. 8.

        L(τ) = MSE(f(x_q + τ), f(x_q)) + 1 / ‖τ‖²_F

    Queries are optimised together; Adam is elementwise and each query stops by itself, so the triggers are those of
    separate runs up to rounding. The τ of the lowest loss seen is returned.

    Args:
        classifier: f, best `specialised`; not modified.
        queries: Pixels in [0, 1].
        settings: Kind, steps, learning rate, tolerance. A `FixedPatch` is not optimised, only evaluated.
        seed: Of τ₀, the same for every query.
        progress: Told of steps; the last one where all queries have stopped before.
    """
    start, mask = _start(queries, settings, seed)
    if isinstance(settings, FixedPatch):
        search = _Search(classifier, queries, start, mask, lr=0.0, tolerance=0.0)
    else:
        search = _Search(classifier, queries, start, mask, lr=settings.lr, tolerance=settings.tolerance)
        search.run(settings.steps, check_every=CHECK_EVERY if queries.device.type == "cuda" else 1, progress=progress)
    return search.result()


def _start(
    queries: Float[Tensor, "q c h w"], settings: OwnTrigger, seed: int
) -> tuple[Float[Tensor, "q c h w"], Float[Tensor, "c h w"]]:
    """τ₀ of every query (the same draw for each), and the mask of the pixels that may change."""
    shape = queries.shape[1:]
    mask = torch.ones(shape, dtype=queries.dtype, device=queries.device)
    if not isinstance(settings, QueryTrigger):
        mask = torch.zeros_like(mask)
        mask[:, :PATCH, :PATCH] = 1.0
    if isinstance(settings, FixedPatch):
        start = mask  # white
    else:
        generator = torch.Generator().manual_seed(seed)
        start = INITIAL_STD * torch.randn(shape, generator=generator, dtype=torch.float64).to(queries) * mask
    return start.expand(queries.shape).clone(), mask


class _Search:
    """One joint optimisation.

    Stops are decided on the device, for each query: one that is no longer active keeps its best trigger, losses and
    count, however many steps follow.
    """

    def __init__(
        self,
        classifier: Classifier,
        queries: Float[Tensor, "q c h w"],
        start: Float[Tensor, "q c h w"],
        mask: Float[Tensor, "c h w"],
        *,
        lr: float,
        tolerance: float,
    ) -> None:
        self.classifier, self.queries, self.tolerance = classifier, queries, tolerance
        self.trigger, self.mask = start, mask
        self.gradient = self.trigger.grad = torch.zeros_like(self.trigger)
        self.optimiser = torch.optim.Adam([self.trigger], lr=lr)
        with torch.no_grad():
            self.target = classifier.logits(classifier.features(queries))
        self.initial = self._evaluate()
        self.best = self.trigger.clone()
        self.lowest = self.initial.repeat(PATIENCE + 1, 1)  # the best loss after each of the last evaluations
        self.active = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
        self.steps = torch.ones(len(queries), dtype=torch.int64, device=queries.device)

    def run(self, steps: int, *, check_every: int, progress: Progress = silent) -> None:
        """At most so many steps; fewer where all queries are found to have stopped, which is asked now and then."""
        for done in range(1, steps + 1):
            self.step()
            stopped = done % check_every == 0 and not bool(self.active.any())
            progress("optimising the trigger", steps if stopped else done, steps)
            if stopped:
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
        trigger = self.trigger.detach().requires_grad_()
        logits = self.classifier.logits(self.classifier.features(self.queries + trigger))
        loss = (logits - self.target).square().mean(dim=1) + 1.0 / trigger.square().sum(dim=(1, 2, 3))
        (gradient,) = torch.autograd.grad(loss.sum(), trigger)
        self.gradient.copy_(gradient * self.mask)
        return loss.detach()

    def result(self) -> TriggerResult:
        """The best triggers, and how they were found."""
        return TriggerResult(self.best, self.initial, self.lowest[-1], self.steps)
