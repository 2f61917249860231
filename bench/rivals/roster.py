"""Who competes: every layer, pooling and whitening, pixels, hashes, views, mixtures, re-rankings — by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from tmm_engine.bench.rivals.hashes import HASHES
from tmm_engine.bench.rivals.parts import CHOSEN, FEATURES, PROBABILITIES, RAW, RECOGNISER, Part
from tmm_engine.bench.rivals.reranking import GATES, Gate
from tmm_engine.index.descriptors.layers import PIXEL_LAYER, PIXELS, Layer

GRIDS = (1, 2, 4)
VIEWS = (1, 2, 4)
FEATURE_WEIGHTS, PIXEL_WEIGHTS, PROBABILITY_WEIGHTS = (0.5, 1.0, 2.0), (0.0, 0.5, 1.0), (1.0, 2.0, 4.0)
MIXED_VIEWS = 4
WHOLE = 64  # cells a side: every pixel of a small image

CONFIDENCES = (0.0, 1.0)  # beside the engine's own

Reranking = Gate | Literal["expansion 2", "expansion 5", "k-reciprocal"]


@dataclass(frozen=True, slots=True)
class Rival:
    """A way to rank exemplars.

    Attributes:
        name: Of its records.
        parts: (weight, what it looks at): the cosine similarity of the weighted whole.
        reranking: What follows the first ranking, if anything does.
    """

    name: str
    parts: tuple[tuple[float, Part], ...]
    reranking: Reranking | None = None


STRETCHED = "cosine,stretch=true"
"""What the others are compared with."""


def roster(layers: Sequence[Layer]) -> list[Rival]:
    """All, the dullest first.

    Args:
        layers: Of the network (`find_layers`); their grids are not looked at.
    """
    return [*_plain(), *_single(layers), *_views(), *_mixtures(layers), *_ours()]


def _plain() -> list[Rival]:
    pixels = Layer(PIXELS, WHOLE)
    alone = {
        "l2": Part(RAW, seen="plain"),
        "cosine": Part(FEATURES, centred=False, seen="plain"),
        STRETCHED: Part(FEATURES, centred=False),
        "features": Part(FEATURES),
        "features whitened": Part(FEATURES, power=0.5),
        "features median-filtered": Part(FEATURES, seen="median"),
        "features own statistics": Part(FEATURES, seen="own statistics"),
        "pixels plain": Part(pixels, centred=False, seen="plain"),
        "pixels stretched, centred": Part(pixels),
        "pixels stretched, whitened": Part(pixels, power=0.5),
    }
    return [Rival(name, ((1.0, part),)) for name, part in (alone | {name: Part(name) for name in HASHES}).items()]


def _single(layers: Sequence[Layer]) -> list[Rival]:
    sources = [PIXEL_LAYER, *(Layer(layer.name, grid) for layer in layers for grid in GRIDS)]
    powers: dict[str, float | None] = {"": None, " half whitened": 0.25, " whitened": 0.5}
    return [
        Rival(f"{source}{how}", ((1.0, Part(source, power=power)),))
        for source, (how, power) in product(sources, powers.items())
    ]


def _views() -> list[Rival]:
    return [Rival(f"features, {views} views", ((1.0, Part(FEATURES, views)),)) for views in VIEWS[1:]]


def mixture(layer: Layer, weights: tuple[float, float, float], views: int) -> tuple[tuple[float, Part], ...]:
    """Features, pixels, probabilities by these weights, and the layer, half whitened, by 1."""
    features, pixels, probabilities = weights
    parts = [
        (features, Part(FEATURES, views)),
        (pixels, Part(PIXEL_LAYER, views)),
        (probabilities, Part(PROBABILITIES, views, centred=False)),
        (1.0, Part(layer, views, power=0.25)),
    ]
    return tuple((weight, part) for weight, part in parts if weight)


def _mixtures(layers: Sequence[Layer]) -> list[Rival]:
    weighted = product(layers, product(FEATURE_WEIGHTS, PIXEL_WEIGHTS, PROBABILITY_WEIGHTS))
    return [
        Rival(
            f"{features:g} features + {pixels:g} pixels + {probabilities:g} probabilities + {layer.name}",
            mixture(Layer(layer.name), (features, pixels, probabilities), MIXED_VIEWS),
        )
        for layer, (features, pixels, probabilities) in weighted
    ]


def _ours() -> list[Rival]:
    ways: list[tuple[int, Reranking | None]] = [(views, how) for views in VIEWS for how in (None, "gate")]
    ways += [(MIXED_VIEWS, how) for how in ("never first", "first by ratio", "first by rank", "always first")]
    ways += [(MIXED_VIEWS, how) for how in ("expansion 2", "expansion 5", "k-reciprocal")]
    ours = [Rival(_named(views, how), ((1.0, Part(CHOSEN, views)),), how) for views, how in ways]
    ours += [
        Rival(f"{_named(MIXED_VIEWS, None)} + confidence {by:g}", ((1.0, Part(CHOSEN, MIXED_VIEWS, confidence=by)),))
        for by in CONFIDENCES
    ]
    return ours + [Rival(f"recogniser, {views} views", ((1.0, Part(RECOGNISER, views)),)) for views in (1, MIXED_VIEWS)]


def _named(views: int, reranking: Reranking | None) -> str:
    """As mode robust is called elsewhere, where it is that."""
    recognises = reranking in GATES
    name = f"robust,views={views}" + ("" if recognises else ",recognition=none")
    return name if reranking in (None, "gate") else f"{name} + {reranking}"
