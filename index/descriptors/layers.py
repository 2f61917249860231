"""What a network computes between its input and its head: found by hooks, pooled to a small grid."""

import math
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from tmm_engine.index.errors import InputError, ModelError, nearest
from tmm_engine.index.models.classifier import Classifier

GRID = 4
"""Cells in a row and in a column that a map is averaged over."""

PIXELS, PIXEL_GRID = "pixels", 8
PROBED = 3  # images in a pass that only asks for outputs' shapes
PER_SHAPE, MAX_LAYERS = 4, 12  # candidates among modules whose outputs are alike, and of a whole network


@dataclass(frozen=True, slots=True, order=True)
class Layer:
    """A layer's output, averaged over a grid of cells; as text ``layer2:4x4``.

    Attributes:
        name: Dotted name of a module of the network, or ``pixels``.
        grid: Cells in a row and in a column.
    """

    name: str
    grid: int = GRID

    def __str__(self) -> str:
        return f"{self.name}:{self.grid}x{self.grid}"

    @classmethod
    def parse(cls, text: str) -> "Layer":
        """From ``layer2:4x4``, or ``layer2`` for the usual grid.

        Raises:
            InputError: another form, or a grid that is not square, or not in [1, 64].
        """
        found = re.fullmatch(r"\s*([^\s:]+)(?::(\d{1,4})x(\d{1,4}))?\s*", text)
        grid = int(found[2]) if found and found[2] else (PIXEL_GRID if found and found[1] == PIXELS else GRID)
        if found is None or (found[2] != found[3]) or not 1 <= grid <= 64:
            raise InputError(f"expected a layer such as 'layer2' or 'layer2:4x4' (a square grid), got {text!r}")
        return cls(found[1], grid)


PIXEL_LAYER = Layer(PIXELS, PIXEL_GRID)


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """What one pass over images gives.

    Attributes:
        features: φ(x).
        layers: By layer, its pooled output as one row for each image.
    """

    features: Float[Tensor, "n d"]
    layers: dict[Layer, Float[Tensor, "n _"]]


class Taps:
    """A classifier whose layers can be looked at. It has a copy of the network of its own, with hooks.

    Attributes:
        classifier: The copy.
        layers: What is looked at.
        widths: How many numbers each gives for an image.

    Args:
        classifier: Stays as it is.
        layers: What is looked at.

    Raises:
        InputError: the network has no module of that name; the message suggests the nearest.
        ModelError: a module's output is not a map (n, c, h, w) or tokens (n, t, d), or there is none.
    """

    def __init__(self, classifier: Classifier, layers: Sequence[Layer]) -> None:
        self.classifier = classifier.to(classifier.device)  # a copy
        self.layers = tuple(layers)
        network = _network(self.classifier)
        self._seen = threading.local()  # searches in several threads do not see each other's
        self._aspect = _aspect(self.classifier)
        modules = dict(network.named_modules())
        for layer in self.layers:
            if layer.name == PIXELS:
                continue
            if not layer.name or layer.name not in modules:
                known = [str(found) for found in find_layers(classifier)]
                raise InputError(
                    f"the network has no layer {layer.name!r}{nearest(layer.name, modules)}; some that it has: "
                    f"{', '.join(known) or 'none'}"
                )
            modules[layer.name].register_forward_hook(self._hook(layer))
        self._probe()

    def __call__(self, images: Float[Tensor, "n c h w"]) -> Activations:
        """One pass.

        Args:
            images: Pixels in [0, 1], on the classifier's device.
        """
        self._seen.layers, self._seen.count = {}, len(images)
        try:
            features = self.classifier.features(images)
            seen = self._seen.layers
        finally:
            del self._seen.layers
        pixels = {layer: _in_cells(images, layer.grid) for layer in self.layers if layer.name == PIXELS}
        return Activations(features, seen | pixels)

    def _hook(self, layer: Layer) -> Any:
        def keep(_: nn.Module, __: object, output: object) -> None:
            if (seen := getattr(self._seen, "layers", None)) is not None:
                count = self._seen.count
                if not isinstance(output, Tensor) or output.ndim not in (3, 4) or len(output) != count:
                    raise ModelError(
                        f"{layer}: expected a map (n, c, h, w) or tokens (n, t, d) of n = {count}, got {_form(output)}"
                    )
                seen[layer] = pooled(output, layer.grid, aspect=self._aspect)

        return keep

    def _probe(self) -> None:
        with torch.no_grad():
            found = self(torch.zeros(PROBED, *self.classifier.image_shape, device=self.classifier.device)).layers
        for layer in self.layers:
            if layer not in found:
                raise ModelError(f"{layer}: expected a module that the network calls, got one that it never does")
        self.widths = {layer: output.shape[1] for layer, output in found.items()}


def pooled(output: Float[Tensor, "n *rest"], grid: int, *, aspect: float = 1.0) -> Float[Tensor, "n _"]:
    """Means over the cells of a grid, as one row for each image; of tokens that are no map the mean of all.

    Args:
        output: Of a module.
        grid: Cells a side.
        aspect: Height of the images over their width, which tells maps' axes.
    """
    as_map = _map_of(output, aspect)
    return output.mean(1).float() if as_map is None else _in_cells(as_map, grid)


def _in_cells(maps: Float[Tensor, "n c h w"], grid: int) -> Float[Tensor, "n _"]:
    height, width = maps.shape[-2:]
    return adaptive_avg_pool2d(maps, (min(grid, height), min(grid, width))).flatten(1).float()


def _map_of(output: Float[Tensor, "n *rest"], aspect: float) -> Float[Tensor, "n c h w"] | None:
    """A module's output as a map: (n, c, h, w), or (n, h, w, c) where only those sides may be an image's.

    Tokens (n, t, d) are one where they fill a map of the images' shape, or such a map behind one class token, which is
    left out; where both may be, the one that is nearer to that shape.
    """
    if output.ndim == 4:
        _, first, second, last = output.shape
        channels_last = _as_high(first, second, aspect) and not _as_high(second, last, aspect)
        return output.permute(0, 3, 1, 2) if channels_last else output
    maps = []
    for class_tokens in (1, 0):
        count = output.shape[1] - class_tokens
        height = round(math.sqrt(count * aspect))
        if height > 0 and count % height == 0 and _as_high(height, count // height, aspect):
            as_map = output[:, class_tokens:].transpose(1, 2).unflatten(2, (height, count // height))
            maps.append((abs(height - count // height * aspect), as_map))
    return min(maps, key=itemgetter(0))[1] if maps else None


def _as_high(height: int, width: int, aspect: float) -> bool:
    """Whether a map of images of this aspect may have these sides: each may be rounded."""
    return abs(height - width * aspect) < max(1.0, aspect)


def _aspect(classifier: Classifier) -> float:
    height, width = classifier.image_shape[-2:]
    return height / width


def find_layers(classifier: Classifier) -> list[Layer]:
    """The layers that a recogniser may look at, in the order in which they are computed; none where there is no map.

    What is looked at are the network's own modules and the blocks of its sequences, not what is inside a block. Of
    those with outputs of one shape, as a stage of blocks or a transformer has, the last is taken, and of four and more
    up to four, evenly; single operations only where no block gives that shape. Outputs of a single cell are left out.
    """
    network = _network(classifier)
    outputs = _outputs(classifier, list(_blocks(network, "", within_sequence=False)))
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, shape in outputs.items():
        shapes.setdefault(shape, []).append(name)
    chosen = set()
    for names in shapes.values():
        blocks = [name for name in names if any(True for _ in network.get_submodule(name).children())] or names[-1:]
        count = min(PER_SHAPE, max(1, len(blocks) // 2))
        chosen |= {blocks[len(blocks) - 1 - place * len(blocks) // count] for place in range(count)}
    ordered = [name for name in outputs if name in chosen]
    if len(ordered) > MAX_LAYERS:
        ordered = [ordered[round(place * (len(ordered) - 1) / (MAX_LAYERS - 1))] for place in range(MAX_LAYERS)]
    return [Layer(name) for name in ordered]


def _blocks(module: nn.Module, name: str, *, within_sequence: bool) -> Iterator[str]:
    """Names of modules, but of none inside a block: a member of a sequence that is not a sequence itself."""
    if name:
        yield name
    sequence = isinstance(module, nn.Sequential | nn.ModuleList)
    if sequence or not within_sequence:
        for child_name, child in module.named_children():
            yield from _blocks(child, f"{name}.{child_name}" if name else child_name, within_sequence=sequence)


def _outputs(classifier: Classifier, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """In the order in which they are computed: the shape of one image's output of each module that gives maps only."""
    found: dict[str, tuple[int, ...]] = {}
    others: set[str] = set()

    def watch(name: str) -> Any:
        def note(_: nn.Module, __: object, output: Any) -> None:
            usable = isinstance(output, Tensor) and output.is_floating_point() and output.ndim in (3, 4)
            if not usable or len(output) != PROBED:  # of tiles, or one for all, as of positions
                others.add(name)
                return
            as_map = _map_of(output, _aspect(classifier))
            if max(output.shape[1:2] if as_map is None else as_map.shape[2:]) > 1:
                found[name] = tuple(output.shape[1:])

        return note

    network = _network(classifier)
    hooks = [network.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        with torch.no_grad():
            classifier.features(torch.zeros(PROBED, *classifier.image_shape, device=classifier.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: shape for name, shape in found.items() if name not in others}


def _network(classifier: Classifier) -> nn.Module:
    return classifier.backbone.get_submodule("network")


def _form(output: object) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
