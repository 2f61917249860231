"""Everything that a rival may look at, computed for the same images in as few passes as there are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from tmm_engine.bench.rivals.hashes import HASHES, hashed
from tmm_engine.bench.rivals.images import median_filtered, with_own_statistics
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.descriptors.calibration import Calibrated
from tmm_engine.index.descriptors.descriptor import CONFIDENCE, FEATURES, PROBABILITIES, Descriptor, output_of
from tmm_engine.index.descriptors.descriptor import Part as Fitted
from tmm_engine.index.descriptors.layers import Activations, Layer, Taps
from tmm_engine.index.descriptors.projection import DIMENSIONS, Projection
from tmm_engine.index.descriptors.views import symmetric_views
from tmm_engine.index.models.classifier import Classifier

Seen = Literal["stretched", "plain", "median", "own statistics"]
RAW = "features, not of unit length"  # for L2
CHOSEN, RECOGNISER = "chosen", "recogniser"  # what the engine's own calibration makes

SAMPLE = 1000  # exemplars that means and projections are fitted on, as when an index is built
BATCH = 250


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to look at.

    Attributes:
        source: FEATURES, PROBABILITIES, a layer (``pixels`` among them), a hash's name, RAW, CHOSEN or RECOGNISER.
        views: Symmetric views that are looked at.
        power: Of the variance that principal components are divided by; None: no projection.
        centred: Whether the exemplars' mean is subtracted.
        seen: What is done to images first.
        confidence: Instead of the engine's own, of CHOSEN (`index.descriptors.descriptor.Part`).
    """

    source: str | Layer
    views: int = 1
    power: float | None = None
    centred: bool = True
    seen: Seen = "stretched"
    confidence: float = CONFIDENCE


class Passes:
    """What the network computes of images, looked at in many ways.

    Args:
        classifier: The network.
        calibrated: What the engine chose for these exemplars.
        parts: All that will be asked for.
    """

    def __init__(self, classifier: Classifier, calibrated: Calibrated, parts: Sequence[Part]) -> None:
        self._calibrated = calibrated
        self._chosen = {CHOSEN: calibrated.robust, RECOGNISER: calibrated.recogniser}
        self._parts = tuple(dict.fromkeys(parts))
        layers = [part.source for part in self._parts if isinstance(part.source, Layer)]
        layers += [layer for descriptor in self._chosen.values() for layer in descriptor.layers]
        self._taps = Taps(classifier, tuple(dict.fromkeys(layers)))
        adapted = with_own_statistics(classifier)
        self._adapted = Taps(adapted, ()) if adapted is not None else None
        self._parts = tuple(part for part in self._parts if self.available(part))
        self._views = max(part.views for part in self._parts)
        self._fitted: dict[Part, Fitted] = {}
        self._fitted_on = ""

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that there are of those asked for."""
        return self._parts

    @property
    def identity(self) -> list[Any]:
        """What vectors depend on beside part and image: the network, what was chosen, and what all was fitted on."""
        chosen = [self._calibrated.report[name] for name in (RECOGNISER, "robust")]
        return [self._taps.classifier.fingerprint, *chosen, self._fitted_on]

    def available(self, part: Part) -> bool:
        """Whether there is such a thing: statistics of its own need batch normalisation."""
        return part.seen != "own statistics" or self._adapted is not None

    def fit(self, images: Float32[np.ndarray, "n c h w"]) -> None:
        """Means and projections, on exemplars."""
        self._fitted_on = hashlib.sha256(np.ascontiguousarray(images[:SAMPLE]).data).hexdigest()
        with torch.no_grad():
            seen = self._seen(images[:SAMPLE], {part.seen for part in self._parts}, views=1)
        for part in self._parts:
            if part.source in (*HASHES, RAW, CHOSEN, RECOGNISER):
                continue
            [view] = seen[part.seen]
            output = output_of(view, part.source, self._taps.classifier.head)
            fitted = Fitted(part.source, 1.0, output.mean(0) if part.centred else None)
            if part.power is not None:
                projection = Projection.fit(
                    fitted([view], self._taps.classifier.head), power=part.power, dimensions=DIMENSIONS
                )
                fitted = Fitted(part.source, 1.0, fitted.mean, projection)
            self._fitted[part] = fitted

    def __call__(self, images: Float32[np.ndarray, "n c h w"]) -> dict[Part, Float[Tensor, "n _"]]:
        """Every part of every image; of unit length, but RAW.

        Args:
            images: Pixels in [0, 1].
        """
        found: dict[Part, list[Tensor]] = {part: [] for part in self._parts}
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            with torch.no_grad():
                seen = self._seen(batch, {part.seen for part in self._parts}, views=self._views)
                for part in self._parts:
                    found[part].append(self._of(part, seen, batch))
        return {part: torch.cat(rows) for part, rows in found.items()}

    def _of(
        self, part: Part, seen: dict[Seen, list[Activations]], batch: Float32[np.ndarray, "n c h w"]
    ) -> Float[Tensor, "n _"]:
        head = self._taps.classifier.head
        if part.source in HASHES:
            return torch.from_numpy(hashed(batch, str(part.source)))
        views = seen[part.seen][: part.views]
        if part.source == RAW:
            return views[0].features
        chosen = self._chosen.get(str(part.source))
        if chosen is None:
            return self._fitted[part](views, head)
        return Descriptor(tuple(replace(one, confidence=part.confidence) for one in chosen.parts))(views, head)

    def _seen(
        self, images: Float32[np.ndarray, "n c h w"], ways: set[Seen], *, views: int
    ) -> dict[Seen, list[Activations]]:
        pixels = torch.from_numpy(images)
        found: dict[Seen, list[Activations]] = {}
        if "stretched" in ways:
            found["stretched"] = [_passed(self._taps, view) for view in symmetric_views(pixels, views)]
        if "plain" in ways:
            found["plain"] = [_passed(self._taps, pixels)]
        if "median" in ways:
            found["median"] = [_passed(self._taps, stretch_contrast(median_filtered(pixels)))]
        if "own statistics" in ways and self._adapted is not None:
            found["own statistics"] = [_passed(self._adapted, stretch_contrast(pixels))]
        return found


def _passed(taps: Taps, images: Float[Tensor, "n c h w"]) -> Activations:
    parts = [taps(part) for part in images.split(forward_batch_size(taps.classifier.image_shape))]
    layers = {layer: torch.cat([part.layers[layer] for part in parts]) for layer in parts[0].layers}
    return Activations(torch.cat([part.features for part in parts]), layers)


__all__ = ["CHOSEN", "FEATURES", "PROBABILITIES", "RAW", "RECOGNISER", "Part", "Passes"]
