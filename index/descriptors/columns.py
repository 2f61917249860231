"""The columns of an index that hold its descriptors: the recogniser's, and the one that ranks."""

import json
import threading
from abc import abstractmethod
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.columns import FeatureColumn, registered
from tmm_engine.index.descriptors.descriptor import (
    CONFIDENCE,
    FEATURES,
    LAYER_VIEWS,
    PROBABILITIES,
    Descriptor,
    Part,
)
from tmm_engine.index.descriptors.layers import Activations, Layer, Taps
from tmm_engine.index.descriptors.projection import Projection
from tmm_engine.index.descriptors.views import MAX_VIEWS, ORDER, symmetric_views
from tmm_engine.index.errors import IndexStateError, InputError, ModelError
from tmm_engine.index.models.classifier import Classifier

COPY_FEATURE = "copy_feature"
ROBUST_FEATURE = "robust_feature"
DESCRIPTORS = "descriptors.safetensors"
METADATA = "descriptors"


@dataclass(frozen=True, slots=True, eq=False)
class Descriptors:
    """What an index describes its images by.

    Attributes:
        recogniser: Tells copies of an exemplar from other images.
        robust: Ranks.
        views: How many symmetric views they look at, 1 to `MAX_VIEWS`.
        report: How they were chosen, as plain values.
    """

    recogniser: Descriptor
    robust: Descriptor
    views: int
    report: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write a safetensors file; what is not a tensor goes into its metadata."""
        tensors: dict[str, Tensor] = {}
        parts: dict[str, list[dict[str, Any]]] = {}
        for name, descriptor in (("recogniser", self.recogniser), ("robust", self.robust)):
            parts[name] = [
                {"source": str(part.source), "weight": part.weight, "confidence": part.confidence}
                for part in descriptor.parts
            ]
            for place, part in enumerate(descriptor.parts):
                tensors |= {f"{name}.{place}.{what}": tensor for what, tensor in _tensors(part).items()}
        about = {"parts": parts, "views": self.views, "report": self.report} | _of_views(self.views)
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        path.write_bytes(save(whole, {METADATA: json.dumps(about)}))

    @classmethod
    def load(cls, path: Path, *, device: torch.device) -> "Descriptors":
        """The inverse of `save`.

        Raises:
            IndexStateError: the file is missing, damaged or another version's.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                about = json.loads(file.metadata()[METADATA])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            views = int(about["views"])
            if not 1 <= views <= MAX_VIEWS or not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ValueError(f"expected finite tensors and 1 to {MAX_VIEWS} views, got {views} views")
            if {name: about.get(name) for name in _of_views(views)} != _of_views(views):
                raise IndexStateError(f"{path}: descriptors of another version of tmm-engine; build the index again")
            found = {
                name: Descriptor(
                    tuple(_part(own, f"{name}.{place}.", tensors) for place, own in enumerate(about["parts"][name]))
                )
                for name in ("recogniser", "robust")
            }
            weights = [part.weight for descriptor in found.values() for part in descriptor.parts]
            if not all(descriptor.parts for descriptor in found.values()) or not all(0 < one < inf for one in weights):
                raise ValueError(f"expected parts of positive weight, got {weights}")
            return cls(**found, views=views, report=dict(about["report"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, InputError) as error:
            raise IndexStateError(f"{path}: damaged descriptors ({error}); build the index again") from error


def _of_views(views: int) -> dict[str, Any]:
    """How descriptors are made of views; where an index was built with other rules, its descriptors say nothing."""
    return {
        "order": [list(view) for view in ORDER[:views]],
        "layer_views": LAYER_VIEWS,
        "confidence": CONFIDENCE,
    }


def _tensors(part: Part) -> dict[str, Tensor]:
    found = {} if part.mean is None else {"mean": part.mean}
    if part.projection is not None:
        found |= {"projection.mean": part.projection.mean, "projection.matrix": part.projection.matrix}
    return found


def _part(about: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Part:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    source = about["source"]
    projection = Projection(own["projection.mean"], own["projection.matrix"]) if "projection.matrix" in own else None
    return Part(
        source if source in (FEATURES, PROBABILITIES) else Layer.parse(source),
        float(about["weight"]),
        own.get("mean"),
        projection,
        float(about.get("confidence", CONFIDENCE)),
    )


class Describer:
    """Computes an index's descriptors: one pass of the network for each view, whatever is asked of it.

    Args:
        descriptors: What is computed.
        classifier: The index's.

    Raises:
        InputError: the network has not the layers that the descriptors look at, or they are of another width.
        ModelError: their outputs are no maps or tokens.
    """

    def __init__(self, descriptors: Descriptors, classifier: Classifier) -> None:
        self.descriptors = descriptors
        layers = (*descriptors.recogniser.layers, *descriptors.robust.layers)
        self._taps = Taps(classifier, tuple(dict.fromkeys(layers)))
        self.classifier = self._taps.classifier
        for part in (*descriptors.recogniser.parts, *descriptors.robust.parts):
            self._check(part)
        self._last: tuple[UInt8[np.ndarray, "n c h w"], list[Activations]] | None = None

    def views(self, images: Float[Tensor, "n c h w"]) -> list[Activations]:
        """What the network computes of each view; all views of few images in one pass.

        Args:
            images: Pixels in [0, 1], on the classifier's device.
        """
        count = self.descriptors.views
        views = list(symmetric_views(images, count))
        if count * len(images) > forward_batch_size(self.classifier.image_shape):
            return [self._taps(view) for view in views]
        passed = self._taps(torch.cat(views))
        layers = {layer: output.chunk(count) for layer, output in passed.layers.items()}
        return [
            Activations(features, {layer: chunks[place] for layer, chunks in layers.items()})
            for place, features in enumerate(passed.features.chunk(count))
        ]

    def _check(self, part: Part) -> None:
        """That a part's tensors are as wide as what it looks at."""
        head = self.classifier.head
        if isinstance(part.source, Layer):
            width = self._taps.widths[part.source]
        else:
            width = head.in_features if part.source == FEATURES else head.out_features
        known = [] if part.mean is None else [part.mean]
        known += [] if part.projection is None else [part.projection.mean, part.projection.matrix]
        if other := [len(tensor) for tensor in known if len(tensor) != width]:
            raise InputError(
                f"descriptors of another network, or of another version of tmm-engine: {part.source} gives {width} "
                f"numbers, not {other[0]}"
            )

    def described(self, views: list[Activations], descriptor: Descriptor) -> Float32[np.ndarray, "n d"]:
        """Unit vectors."""
        return descriptor(views, self.classifier.head).float().cpu().numpy()

    def predicted(self, views: list[Activations]) -> list[int]:
        """The class that the model sees in each image, its contrast stretched."""
        return [int(own) for own in self.classifier.logits(views[0].features).argmax(dim=1)]

    def of_stored(self, images: UInt8[np.ndarray, "n c h w"], descriptor: Descriptor) -> Float32[np.ndarray, "n d"]:
        """Of images as stored."""
        with torch.inference_mode():
            return self.described(self._kept(images), descriptor)

    def stretched(self, images: UInt8[np.ndarray, "n c h w"]) -> Float32[np.ndarray, "n d"]:
        """φ of stored images with their contrast stretched, which is the first view."""
        return self._kept(images)[0].features.float().cpu().numpy()

    def _kept(self, images: UInt8[np.ndarray, "n c h w"]) -> list[Activations]:
        """The views of images; those of the same array are not computed again for another column."""
        last = self._last
        if last is None or last[0] is not images:
            with torch.inference_mode():
                pixels = torch.from_numpy(images).to(self.classifier.device).float() / 255.0
                last = self._last = (images, self.views(pixels))
        return last[1]


_describers: WeakKeyDictionary[Classifier, Describer] = WeakKeyDictionary()
_guard = threading.Lock()


class DescriptorColumn(FeatureColumn):
    """A column of descriptors.

    Args:
        describer: Shared by an index's columns, so that each image passes once for both.
        classifier: The index's.
    """

    def __init__(self, describer: Describer, classifier: Classifier) -> None:
        super().__init__(classifier)
        self.describer = describer

    @property
    @abstractmethod
    def descriptor(self) -> Descriptor:
        """Which one."""

    @property
    def dimension(self) -> int:
        """Of the descriptor."""
        images = np.zeros((1, *self.classifier.image_shape), dtype=np.uint8)
        return self.describer.of_stored(images, self.descriptor).shape[1]

    def compute(self, images: UInt8[np.ndarray, "n c h w"]) -> Float32[np.ndarray, "n d"]:
        """In one pass for each view."""
        return self.describer.of_stored(images, self.descriptor)

    def save(self, index: Path) -> None:
        """Write the descriptors beside the exemplars; both columns write the same."""
        self.describer.descriptors.save(index / DESCRIPTORS)

    @classmethod
    def load(cls, index: Path, classifier: Classifier) -> "FeatureColumn":
        """With the index's descriptors."""
        return cls(describer_of(index, classifier), classifier)


@registered
class CopyColumn(DescriptorColumn):
    """What recognises copies."""

    name = COPY_FEATURE

    @property
    def descriptor(self) -> Descriptor:
        """The recogniser."""
        return self.describer.descriptors.recogniser


@registered
class RobustColumn(DescriptorColumn):
    """What ranks in mode ``robust``."""

    name = ROBUST_FEATURE

    @property
    def descriptor(self) -> Descriptor:
        """The robust one."""
        return self.describer.descriptors.robust


def descriptor_columns(describer: Describer, classifier: Classifier) -> tuple[FeatureColumn, ...]:
    """What the mode ``robust`` needs of an index beside φ(x)."""
    return CopyColumn(describer, classifier), RobustColumn(describer, classifier)


def describer_of(index: Path, classifier: Classifier) -> Describer:
    """What computes an index's descriptors; the same for all columns that are loaded with the same classifier.

    Raises:
        IndexStateError: the descriptors are missing or damaged, or look at layers that the network does not have.
    """
    descriptors = Descriptors.load(index / DESCRIPTORS, device=classifier.device)
    with _guard:
        known = _describers.get(classifier)
        if (
            known is None
            or known.descriptors.report != descriptors.report
            or known.descriptors.views != descriptors.views
        ):
            try:
                known = _describers[classifier] = Describer(descriptors, classifier)
            except (InputError, ModelError) as error:
                raise IndexStateError(f"{index / DESCRIPTORS}: {error}; build the index again") from error
        return known
