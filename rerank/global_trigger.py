"""One trigger for a whole index (Eq. 2): computed when the index is built, so that a search needs no pass at all."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tmm_engine.index.errors import IndexStateError, InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.sources.sampling import readable, reservoir
from tmm_engine.rerank.backbone import specialised
from tmm_engine.rerank.blending import INVISIBLE
from tmm_engine.rerank.optimisation import INITIAL_STD, PATIENCE
from tmm_engine.rerank.settings import (
    Blend,
    Blending,
    GlobalRecipe,
    IndexTrigger,
    Sample,
    TmmConfig,
    TunedHead,
    View,
)

SAMPLE = 4096  # exemplars, drawn at random, that τ is optimised on
BATCH = 64
HELD = 256  # of the sample, on which the loss is watched


@dataclass(frozen=True, slots=True, eq=False)
class GlobalTrigger:
    """τ of an index, and what its stored features were made with.

    Attributes:
        trigger: float32 (c, h, w), in pixel units.
        intensity: ω, the mean over exemplars of the standard deviation of their pixels (§4.3.2).
        blend: How it was blended in.
        clamp: Whether triggered images were clamped to [0, 1].
        stretch: Whether images had their contrast stretched before it was blended in.
    """

    trigger: Float32[Tensor, "c h w"]
    intensity: float
    blend: Blend
    clamp: bool
    stretch: bool

    def check(self, config: TmmConfig) -> None:
        """Refuse a configuration that the stored features were not made with.

        Raises:
            InputError: another blend, clamping or intensity.
        """
        asked = config.blending
        if asked.intensity not in (None, self.intensity):
            raise InputError(
                f"the index's global trigger was blended with intensity={self.intensity:g}, the configuration says "
                f"intensity={asked.intensity:g}: leave the intensity out, or build the index with it"
            )
        pairs = {
            "blend": (self.blend, asked.formula),
            "clamp": (self.clamp, asked.clamp),
            "stretch": (self.stretch, config.view.stretch),
        }
        for name, (own, wanted) in pairs.items():
            if own != wanted:
                raise InputError(
                    f"the index's global trigger was blended with {name}={own}, the configuration says "
                    f"{name}={wanted}: search with the former, or build the index with a global trigger of the latter"
                )

    def as_asked_of(self, config: TmmConfig) -> TmmConfig:
        """The configuration with this trigger instead of its own, blended as the stored features were."""
        drawn = isinstance(config.head, TunedHead)  # else nothing is drawn any more
        return replace(
            config,
            view=View(stretch=self.stretch),
            trigger=IndexTrigger(),
            blending=Blending(formula=self.blend, clamp=self.clamp),
            sample=config.sample if drawn else Sample(),
            seed=config.seed if drawn else 0,
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file; what is not a tensor goes into its metadata."""
        about = {"intensity": self.intensity, "blend": str(self.blend), "clamp": self.clamp, "stretch": self.stretch}
        path.write_bytes(save({"trigger": self.trigger.cpu().contiguous()}, {"global_trigger": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> "GlobalTrigger":
        """The inverse of `save`.

        Raises:
            IndexStateError: the file is missing or damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["global_trigger"])
                trigger = file.get_tensor("trigger")
            if trigger.dtype != torch.float32 or trigger.ndim != 3 or not trigger.isfinite().all():
                raise ValueError(f"expected finite float32 (c, h, w), got {trigger.dtype} {tuple(trigger.shape)}")
            flags = [bool(about[name]) for name in ("clamp", "stretch")]
            return cls(trigger, float(about["intensity"]), Blend(about["blend"]), *flags)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise IndexStateError(f"{path}: damaged global trigger ({error}); build the index again") from error


def make_global_trigger(
    source: ImageSource, classifier: Classifier, recipe: GlobalRecipe | TmmConfig, *, progress: Progress = silent
) -> GlobalTrigger:
    """One τ for all images of a source, by Adam on Eq. 8's loss, averaged over mini-batches of them (Eq. 2).

    The source is read once: a seeded random sample of SAMPLE images is kept, and ω is averaged over all.

    Args:
        source: The exemplars.
        classifier: f; not modified.
        recipe: What it is made with; of a configuration that whose features this can be searched with.
        progress: Told of images read, then of steps.

    Raises:
        InputError: no image can be read; or ω makes every triggered image the same or leaves the trigger out (all
            images are constant).
    """
    recipe = GlobalRecipe.of(recipe)
    blending = recipe.blending
    images, intensity = _sample(source, classifier, recipe.seed, progress)
    if blending.intensity is not None:
        intensity = blending.intensity
    if min(blending.weights(intensity)) < INVISIBLE:
        raise InputError(
            f"{source.name}: the intensity ω = {intensity:g} (the mean standard deviation of the images' pixels, "
            f"unless it was set) leaves out either image or trigger with the blend {str(blending.formula)!r}: is every "
            f"image constant? Give other images, the blend 'added', or an intensity between 0 and 1"
        )
    trigger = _optimised(specialised(classifier), images, recipe, progress)
    return GlobalTrigger(trigger, intensity, blending.formula, blending.clamp, recipe.view.stretch)


def _sample(
    source: ImageSource, classifier: Classifier, seed: int, progress: Progress
) -> tuple[Float32[Tensor, "n c h w"], float]:
    """(a uniform sample by reservoir sampling, the mean of all images' standard deviations)."""
    total, seen = 0.0, 0

    def images() -> Iterator[UInt8[np.ndarray, "c h w"]]:
        nonlocal total, seen
        for record in readable(source, classifier.target, progress):
            total, seen = total + float(record.image.std()) / 255.0, seen + 1
            yield record.image

    kept = reservoir(images(), SAMPLE, np.random.default_rng(seed))
    return torch.from_numpy(np.stack(kept)).to(classifier.device).float() / 255.0, total / seen


def _optimised(
    classifier: Classifier, images: Float32[Tensor, "n c h w"], recipe: GlobalRecipe, progress: Progress
) -> Float32[Tensor, "c h w"]:
    settings, generator = recipe.trigger, torch.Generator().manual_seed(recipe.seed)
    start = INITIAL_STD * torch.randn(images.shape[1:], generator=generator, dtype=torch.float64)
    trigger = start.to(images).requires_grad_()
    held, batches = images[:HELD], _batches(images, generator)
    best, losses = trigger.detach().clone(), [float("inf")]
    optimiser = torch.optim.Adam([trigger], lr=settings.lr)
    for step in range(settings.steps + 1):
        if step % PATIENCE == 0 or step == settings.steps:
            with torch.no_grad():
                loss = float(_loss(classifier, held, trigger))
            if loss < min(losses):
                best = trigger.detach().clone()
            if step == settings.steps or losses[-1] - loss < settings.tolerance * losses[-1]:
                break
            losses.append(loss)
        (trigger.grad,) = torch.autograd.grad(_loss(classifier, next(batches), trigger), trigger)
        optimiser.step()
        progress("optimising the global trigger", step + 1, settings.steps)
    return best


def _loss(
    classifier: Classifier, images: Float[Tensor, "n c h w"], trigger: Float[Tensor, "c h w"]
) -> Float[Tensor, ""]:
    with torch.no_grad():
        target = classifier.logits(classifier.features(images))
    logits = classifier.logits(classifier.features(images + trigger))
    return (logits - target).square().mean() + 1.0 / trigger.square().sum()


def _batches(images: Float[Tensor, "n c h w"], generator: torch.Generator) -> Iterator[Float[Tensor, "batch c h w"]]:
    while True:
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            yield images[rows.to(images.device)]
