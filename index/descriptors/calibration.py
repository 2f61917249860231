"""The engine measures a classifier's layers on the user's own images, without labels, and chooses what it looks at.

A sample of the exemplars is changed mildly, as light, cameras and croppings change images. A layer is as good a
recogniser as it finds the unchanged exemplar among the sample; parts and weights of the robust descriptor are those
under which a changed exemplar keeps its neighbours, and they keep its class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, affine, resized_crop

from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.descriptors.descriptor import (
    FEATURES,
    LAYER_VIEWS,
    PROBABILITIES,
    Descriptor,
    Part,
    output_of,
)
from tmm_engine.index.descriptors.layers import PIXEL_LAYER, PIXELS, Activations, Layer, Taps, find_layers
from tmm_engine.index.descriptors.projection import DIMENSIONS, Projection
from tmm_engine.index.descriptors.views import blur, shifted, symmetric_views
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent

FEWEST = 50
"""Fewer exemplars are not measured on."""

SAMPLE, QUERIES = 1000, 150  # exemplars that are found, and changed, at most
NEIGHBOURS = 10
SHARE, LEAST_IMAGES = 0.1, 200  # of what building takes, that measuring may take; or what so many images take
RECOGNISING, RANKING = 0.5, 0.25  # powers of the variance: whitened, and half so
RANKING_DIMENSIONS = 256  # of the layer that ranks, at most; the recogniser's are `DIMENSIONS`
SAME_SIMILARITY = 1e-6  # nearer ones are alike, and count against a layer: one that says nothing ties all
PER_DIMENSION = 2  # exemplars of the sample for each: whitened in as many as there are, all would be equally far apart
# Of the similarity; no fewer of features and probabilities: images that a network was trained on keep their class more
# easily than those that it has never seen, so that a sample of them would let both go (docs/ROBUST.md).
FEATURE_WEIGHT, PROBABILITY_WEIGHT, LAYER_WEIGHT = 1.0, 4.0, 1.0
PIXEL_WEIGHTS, DEFAULT_PIXEL_WEIGHT = (0.0, 0.5, 1.0), 0.5  # the default where nothing is measured
SLACK, COST = 0.005, 10.0  # of clean label precision: what robustness may cost, and what each point beyond weighs

Changed = Callable[[Float[Tensor, "n c h w"], torch.Generator], Float[Tensor, "n c h w"]]


def _noisy(images: Float[Tensor, "n c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    return (images + 0.06 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _dark(images: Float[Tensor, "n c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    return (0.4 * images + 0.02 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _blurred(images: Float[Tensor, "n c h w"], _: torch.Generator) -> Float[Tensor, "n c h w"]:
    return blur(images, min(images.shape[-2:]) / 32)


def _moved(images: Float[Tensor, "n c h w"], _: torch.Generator) -> Float[Tensor, "n c h w"]:
    height, width = images.shape[-2:]
    return shifted(images, max(1, height // 12), -max(1, width // 12))


def _turned(images: Float[Tensor, "n c h w"], _: torch.Generator) -> Float[Tensor, "n c h w"]:
    turned: Tensor = affine(images, 8.0, [0, 0], 1.0, [0.0], interpolation=InterpolationMode.BILINEAR)
    return turned


def _cropped(images: Float[Tensor, "n c h w"], _: torch.Generator) -> Float[Tensor, "n c h w"]:
    height, width = images.shape[-2:]
    inner = [max(1, round(0.85 * side)) for side in (height, width)]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    cropped: Tensor = resized_crop(images, top, left, *inner, [height, width], antialias=True)
    return cropped.clamp(0, 1)


CHANGES: dict[str, Changed] = {
    "noise": _noisy,
    "darkness": _dark,
    "blur": _blurred,
    "shift": _moved,
    "rotation": _turned,
    "crop": _cropped,
}
"""Mild, photometric and geometric; pixels in [0, 1] before and after."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """What was chosen.

    Attributes:
        recogniser: Tells copies from others.
        robust: Ranks.
        report: How both were chosen, as plain values.
    """

    recogniser: Descriptor
    robust: Descriptor
    report: dict[str, Any]


def sample_size(exemplars: int, views: int) -> tuple[int, int]:
    """(how many exemplars are looked at, how many of them are changed): a tenth of the passes of building, at most."""
    passes = int(max(LEAST_IMAGES, SHARE * exemplars) * (1 + views)) // min(views, LAYER_VIEWS)
    looked_at = min(exemplars, SAMPLE, int(0.6 * passes))
    return looked_at, min(looked_at, QUERIES, max(1, (passes - looked_at) // len(CHANGES)))


def calibrate(
    images: UInt8[np.ndarray, "n c h w"],
    classes: Int64[np.ndarray, "n"] | None,
    classifier: Classifier,
    *,
    queries: int,
    views: int = LAYER_VIEWS,
    recogniser: Layer | None = None,
    progress: Progress = silent,
) -> Calibrated:
    """Choose a recogniser and the parts of the robust descriptor on a sample of the exemplars.

    Args:
        images: The sample, in random order.
        classes: Of the images; None takes the model's predictions.
        classifier: Whose layers are measured.
        queries: How many of the images, the first, are changed.
        views: That the index will have; no more than the first `LAYER_VIEWS` are measured.
        recogniser: Instead of the layer that does best.
        progress: Told of passes.

    Raises:
        InputError: the network has no such layer.
    """
    layers = find_layers(classifier)
    looked_at = tuple(dict.fromkeys([*layers, PIXEL_LAYER, *([recogniser] if recogniser else [])]))
    taps = Taps(classifier, looked_at)
    with torch.no_grad():  # not inference mode: what is chosen may be differentiated through
        changed = min(queries, len(images)) if len(images) >= FEWEST else 0
        sample = _Sample.of(taps, images, classes, changed, views=min(views, LAYER_VIEWS), progress=progress)
        found, recogniser_report = _recogniser(sample, looked_at, recogniser)
        robust, robust_report = _robust(sample, layers or [PIXEL_LAYER])
    report = {
        "sample": len(images),
        "changed": sample.queries,
        "changes": list(CHANGES) if sample.queries else [],
        "recogniser": str(found.parts[0].source),
        "recognisers": recogniser_report,
        "robust": {str(part.source): part.weight for part in robust.parts},
        "mixtures": robust_report,
    }
    return Calibrated(found, robust, report)


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """The views of a sample, and those of its first images changed, for each change."""

    clean: list[Activations]
    changed: dict[str, list[Activations]]
    classes: Int64[Tensor, "n"]
    queries: int
    head: torch.nn.Linear

    @classmethod
    def of(
        cls,
        taps: Taps,
        images: UInt8[np.ndarray, "n c h w"],
        classes: Int64[np.ndarray, "n"] | None,
        queries: int,
        *,
        views: int,
        progress: Progress,
    ) -> "_Sample":
        device, head = taps.classifier.device, taps.classifier.head
        step = forward_batch_size(taps.classifier.image_shape)
        total, done = len(images) + len(CHANGES) * queries, 0

        def passed(pixels: Shaped[Tensor, "n c h w"]) -> list[Activations]:
            nonlocal done
            parts = []
            for part in pixels.split(step):  # bytes become floating point a batch at a time: photographs are large
                floating = part.to(device).float() / 255.0 if part.dtype == torch.uint8 else part.to(device)
                parts.append([taps(view) for view in symmetric_views(floating, views)])
                done += len(part)
                progress("measuring layers", done, total)
            return [_joined(view) for view in zip(*parts, strict=True)]

        clean, generator = passed(torch.from_numpy(images)), torch.Generator().manual_seed(0)
        first = torch.from_numpy(images[:queries]).float() / 255.0
        changed = {name: passed(change(first, generator)) for name, change in CHANGES.items() if queries}
        known = head(clean[0].features).argmax(1) if classes is None else torch.from_numpy(classes).to(device)
        return cls(clean, changed, known, queries, head)

    def part(self, source: str | Layer, weight: float, power: float, *, dimensions: int = DIMENSIONS) -> Part:
        """Centred on the sample; of a layer projected as well, where the sample is large enough to say how."""
        output = output_of(self.clean[0], source, self.head)
        mean = None if source == PROBABILITIES else output.mean(0)
        plain = Part(source, weight, mean)
        if not isinstance(source, Layer) or len(output) < FEWEST:
            return plain
        known = min(dimensions, len(output) // PER_DIMENSION)
        projection = Projection.fit(plain(self.clean[:1], self.head), power=power, dimensions=known)
        return replace(plain, projection=projection)


def _joined(parts: Sequence[Activations]) -> Activations:
    """Of all parts. What is not finite is 0 here: building the index refuses such an image by its name."""
    layers = {layer: torch.cat([part.layers[layer] for part in parts]).nan_to_num() for layer in parts[0].layers}
    return Activations(torch.cat([part.features for part in parts]).nan_to_num(), layers)


def _recogniser(
    sample: _Sample, layers: Sequence[Layer], asked_for: Layer | None
) -> tuple[Descriptor, list[dict[str, Any]]]:
    """The layer that finds changed exemplars best: by mean reciprocal rank, in thousandths, then by Lowe's ratio."""
    measured: list[dict[str, Any]] = []
    for layer in layers if sample.queries else []:
        part = sample.part(layer, 1.0, RECOGNISING)
        own = part(sample.clean, sample.head)
        ranks, ratios = [], []
        for changed in sample.changed.values():
            similarity = part(changed, sample.head) @ own.T
            right = similarity.diagonal()[:, None]
            ranks.append((similarity > right - SAME_SIMILARITY).sum(1) - 1)
            others = similarity.masked_fill(torch.eye(*similarity.shape, dtype=torch.bool, device=own.device), -1.0)
            distances = [(1.0 - one).clamp(min=1e-6).sqrt() for one in (right[:, 0], others.amax(1))]
            ratios.append((distances[0] / distances[1]).clamp(max=1.0))
        mrr = float((1.0 / (1.0 + torch.cat(ranks).double())).mean())
        measured.append({"layer": str(layer), "mrr": round(mrr, 4), "ratio": round(float(torch.cat(ratios).mean()), 4)})
    if asked_for is not None:
        chosen = asked_for
    elif measured:
        best = max(measured, key=lambda found: (round(found["mrr"], 3), -found["ratio"]))
        chosen = Layer.parse(best["layer"])
    else:
        chosen = _usual(layers)
    return Descriptor((sample.part(chosen, 1.0, RECOGNISING),)), measured


def _usual(layers: Sequence[Layer]) -> Layer:
    """Where nothing is measured: a layer at a third of the depth, else pixels."""
    of_network = [layer for layer in layers if layer.name != PIXELS]
    return of_network[(len(of_network) - 1) // 3 + (len(of_network) > 1)] if of_network else PIXEL_LAYER


def _robust(sample: _Sample, layers: Sequence[Layer]) -> tuple[Descriptor, list[dict[str, Any]]]:
    """Features, probabilities, one layer and so much of pixels that neighbours change least and keep their class."""
    features, pixels = sample.part(FEATURES, FEATURE_WEIGHT, 0.0), sample.part(PIXEL_LAYER, 1.0, 0.0)
    probabilities = sample.part(PROBABILITIES, PROBABILITY_WEIGHT, 0.0)
    middle = [
        sample.part(layer, LAYER_WEIGHT, RANKING, dimensions=RANKING_DIMENSIONS)
        for layer in layers
        if layer != PIXEL_LAYER
    ]

    def mixture(pixel_weight: float, layer: Part | None) -> tuple[Part, ...]:
        own = [] if layer is None else [layer]
        return tuple(
            part for part in (features, replace(pixels, weight=pixel_weight), probabilities, *own) if part.weight
        )

    if not sample.queries:
        usual = next((part for part in middle if part.source == _usual(layers)), None)
        return Descriptor(mixture(DEFAULT_PIXEL_WEIGHT, usual)), []
    similar = {part.source: _similarities(part, sample) for part in (features, pixels, probabilities, *middle)}
    alone = _kept(similar[FEATURES], sample)
    measured: list[dict[str, Any]] = []
    best: tuple[Part, ...] = ()
    best_value = -np.inf
    beside: Sequence[Part | None] = middle or [None]
    for pixel_weight, layer in product(PIXEL_WEIGHTS, beside):
        parts = mixture(pixel_weight, layer)
        by_change = zip(*(similar[part.source] for part in parts), strict=True)
        mixed = [sum(part.weight * own for part, own in zip(parts, each, strict=True)) for each in by_change]
        found = _kept(mixed, sample)
        cost = max(0.0, alone["label_clean"] - SLACK - found["label_clean"])
        measured.append(
            {str(part.source): part.weight for part in parts}
            | {name: round(number, 4) for name, number in found.items()}
        )
        if (value := found["overlap"] + found["label_noisy"] - COST * cost) > best_value:
            best, best_value = parts, value
    return Descriptor(best), [{FEATURES: 1.0} | alone, *measured]


def _similarities(part: Part, sample: _Sample) -> list[Float[Tensor, "q n"]]:
    """Of the first images, unchanged and under each change, with the sample."""
    own = part(sample.clean, sample.head)
    rows = [own[: sample.queries], *(part(changed, sample.head) for changed in sample.changed.values())]
    return [row @ own.T for row in rows]


def _kept(similarities: Sequence[Float[Tensor, "q n"]], sample: _Sample) -> dict[str, float]:
    """How much of the clean answer is kept, and of the class, clean and changed; the image itself is left out."""
    q, n = similarities[0].shape
    k = max(1, min(NEIGHBOURS, n // 10))
    itself = torch.eye(q, n, dtype=torch.bool, device=similarities[0].device)
    clean, *changed = (each.masked_fill(itself, -torch.inf).topk(k, dim=1).indices for each in similarities)
    right = sample.classes[: len(clean), None]
    return {
        "overlap": float(np.mean([_overlap(one, clean) for one in changed])),
        "label_clean": float((sample.classes[clean] == right).double().mean()),
        "label_noisy": float(np.mean([float((sample.classes[one] == right).double().mean()) for one in changed])),
    }


def _overlap(one: Int64[Tensor, "q k"], other: Int64[Tensor, "q k"]) -> float:
    return float((one[:, :, None] == other[:, None, :]).any(2).double().mean())
