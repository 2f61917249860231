"""The columns of features that a rerank takes from an index beside φ(x): one small class each."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.columns import FeatureColumn, registered
from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.descriptors.columns import Describer
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.types import ImageShape
from tmm_engine.rerank.backbone import specialised
from tmm_engine.rerank.blending import apply_trigger
from tmm_engine.rerank.global_trigger import GlobalTrigger

GLOBAL_FEATURE = "global_feature"
STRETCHED_FEATURE = "stretched_feature"
GLOBAL_TRIGGER = "global_trigger.safetensors"


@registered
class StretchedColumn(FeatureColumn):
    """φ of x with its contrast stretched.

    Args:
        classifier: The index's.
        describer: Of the index, if it has one: what it has computed anyway is not computed again.
    """

    name = STRETCHED_FEATURE

    def __init__(self, classifier: Classifier, describer: Describer | None = None) -> None:
        super().__init__(classifier if describer else specialised(classifier))
        self._describer = describer

    def compute(self, images: UInt8[np.ndarray, "n c h w"]) -> Float32[np.ndarray, "n d"]:
        """As stored: uint8."""
        if self._describer is not None:
            return self._describer.stretched(images)
        return _features(self.classifier, stretch_contrast(_pixels(images, self.classifier)))


@registered
class GlobalColumn(FeatureColumn):
    """φ(x^τ), with one trigger τ for all exemplars.

    Args:
        trigger: τ, and how it is blended in.
        classifier: The index's.
    """

    name = GLOBAL_FEATURE

    def __init__(self, trigger: GlobalTrigger, classifier: Classifier) -> None:
        super().__init__(specialised(classifier))
        self._settings = trigger
        self._trigger = trigger.trigger.to(classifier.device)

    def compute(self, images: UInt8[np.ndarray, "n c h w"]) -> Float32[np.ndarray, "n d"]:
        """As stored: uint8."""
        pixels, settings = _pixels(images, self.classifier), self._settings
        triggered = apply_trigger(
            stretch_contrast(pixels) if settings.stretch else pixels,
            self._trigger,
            intensity=settings.intensity,
            blend=settings.blend,
            clamp=settings.clamp,
        )
        return _features(self.classifier, triggered)

    def save(self, index: Path) -> None:
        """Write the trigger beside the exemplars."""
        self._settings.save(index / GLOBAL_TRIGGER)

    @classmethod
    def load(cls, index: Path, classifier: Classifier) -> "GlobalColumn":
        """With the index's trigger."""
        return cls(trigger_of(index, classifier.image_shape), classifier)


def trigger_of(index: Path, image_shape: ImageShape) -> GlobalTrigger:
    """The global trigger of an index that has the column GLOBAL_FEATURE.

    Raises:
        IndexStateError: it is missing, damaged, or for images of another shape.
    """
    found = GlobalTrigger.load(index / GLOBAL_TRIGGER)
    if tuple(found.trigger.shape) != image_shape:
        raise IndexStateError(
            f"{index / GLOBAL_TRIGGER}: expected a trigger of shape {image_shape}, got {tuple(found.trigger.shape)}; "
            f"build the index again"
        )
    return found


def global_columns(trigger: GlobalTrigger, classifier: Classifier) -> tuple[FeatureColumn, ...]:
    """What the preset ``fast`` needs of an index beside φ(x)."""
    network = specialised(classifier)  # once for both
    return GlobalColumn(trigger, network), StretchedColumn(network)


def _pixels(images: UInt8[np.ndarray, "n c h w"], classifier: Classifier) -> Float32[Tensor, "n c h w"]:
    return torch.from_numpy(images).to(classifier.device).float() / 255.0


def _features(classifier: Classifier, pixels: Float32[Tensor, "n c h w"]) -> Float32[np.ndarray, "n d"]:
    parts = pixels.split(forward_batch_size(classifier.image_shape))
    with torch.inference_mode():
        return torch.cat([classifier.features(part) for part in parts]).cpu().numpy()
