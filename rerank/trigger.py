"""Step 1 of TMM-NN: the trigger of each query, its own (Eq. 8) or the index's (Eq. 2), and how it is blended in."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, part_of, silent
from tmm_engine.rerank.blending import INVISIBLE, apply_trigger, intensity_of
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.optimisation import OwnTrigger, make_trigger
from tmm_engine.rerank.settings import Blending, IndexTrigger, TmmConfig

TOGETHER = 32  # queries whose triggers are optimised jointly


@dataclass(frozen=True, slots=True, eq=False)
class FoundTrigger:
    """A query's trigger.

    Attributes:
        trigger: (c, h, w), τ in pixel units.
        intensity: ω.
        blending: How it is put into an image.
        loss: Eq. 8 at τ₀ and at τ; NaN for the global trigger, which is not the query's.
        steps: Evaluations of Eq. 8 for this query.
    """

    trigger: Float[Tensor, "c h w"]
    intensity: float
    blending: Blending
    loss: tuple[float, float]
    steps: int

    @property
    def weights(self) -> tuple[float, float]:
        """(weight of the image, weight of the trigger)."""
        return self.blending.weights(self.intensity)

    def applied(self, images: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n c h w"]:
        """x^t."""
        how = self.blending
        return apply_trigger(images, self.trigger, intensity=self.intensity, blend=how.formula, clamp=how.clamp)


def find_triggers(
    classifier: Classifier,
    queries: Float[Tensor, "q c h w"],
    config: TmmConfig,
    *,
    shared: GlobalTrigger | None,
    together: bool,
    progress: Progress = silent,
) -> list[FoundTrigger]:
    """Step 1 for every query.

    Args:
        classifier: f, best `specialised`.
        queries: Pixels in [0, 1], as viewed.
        config: The reading of TMM-NN.
        shared: The index's global trigger, if it has one.
        together: Optimise the queries' own triggers jointly.
        progress: Told of steps of optimisation.

    Raises:
        InputError: a global trigger is asked for that the index does not have, or has for another configuration.
        ImageError: ω makes every triggered image the same or leaves the trigger out (a constant query image).
    """
    if isinstance(config.trigger, IndexTrigger):
        return [_of_index(shared, queries, config)] * len(queries)
    return _of_queries(classifier, queries, config.trigger, config, together=together, progress=progress)


def _of_index(shared: GlobalTrigger | None, queries: Float[Tensor, "q c h w"], config: TmmConfig) -> FoundTrigger:
    if shared is None:
        raise InputError(
            "the index has no global trigger, which this configuration needs: build it with one (global_trigger=…), or "
            "search with the query's own (the preset 'paper', or trigger=query)"
        )
    shared.check(config)
    nan = float("nan")
    return FoundTrigger(shared.trigger.to(queries), shared.intensity, config.blending, (nan, nan), 0)


def _of_queries(
    classifier: Classifier,
    queries: Float[Tensor, "q c h w"],
    settings: OwnTrigger,
    config: TmmConfig,
    *,
    together: bool,
    progress: Progress,
) -> list[FoundTrigger]:
    given = config.blending.intensity
    intensities = [intensity_of(query) if given is None else given for query in queries]
    for intensity in intensities:
        _refuse_degenerate(intensity, config.blending)
    found: list[FoundTrigger] = []
    parts = queries.split(TOGETHER if together else 1)
    for number, part in enumerate(parts):
        made = make_trigger(
            classifier, part, settings, seed=config.seed, progress=part_of(progress, number, len(parts))
        )
        losses = torch.stack([made.initial_loss, made.loss], dim=1).tolist()
        for trigger, (first, last), steps in zip(made.trigger, losses, made.steps.tolist(), strict=True):
            intensity = intensities[len(found)]
            found.append(FoundTrigger(trigger, intensity, config.blending, (first, last), steps))
    return found


def _refuse_degenerate(intensity: float, blending: Blending) -> None:
    image_weight, trigger_weight = blending.weights(intensity)
    if min(image_weight, trigger_weight) < INVISIBLE:
        vanishes = "every triggered image the same" if image_weight < trigger_weight else "the trigger invisible"
        raise ImageError(
            f"the query's intensity ω = {intensity:g} (the standard deviation of its pixels, unless it was set) makes "
            f"{vanishes} with the blend {str(blending.formula)!r}: is the image constant? Give another image, the "
            f"blend 'added', or an intensity between 0 and 1"
        )
