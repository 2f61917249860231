"""Planted faults: copies that were changed, labels that were exchanged, images of another data set."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from PIL import Image

from tmm_engine.bench.noise import parse
from tmm_engine.index.errors import InputError

Pixels = UInt8[np.ndarray, "c h w"]


def _resized(image: Pixels, _: int) -> Pixels:
    """To 0.7 of the sides and back."""
    _, height, width = image.shape
    small = (max(1, round(0.7 * width)), max(1, round(0.7 * height)))
    channels = [
        Image.fromarray(channel)
        .resize(small, Image.Resampling.BILINEAR)
        .resize((width, height), Image.Resampling.BILINEAR)
        for channel in image
    ]
    return np.stack([np.asarray(channel) for channel in channels])


def _perturbed(text: str) -> Callable[[Pixels, int], Pixels]:
    def change(image: Pixels, seed: int) -> Pixels:
        changed = parse(text).apply(image.astype(np.float32) / np.float32(255), seed=seed)
        return np.rint(changed * 255).astype(np.uint8)

    return change


CHANGES: dict[str, Callable[[Pixels, int], Pixels]] = {
    "exact": lambda image, _: image.copy(),
    "resized": _resized,
    "recompressed": _perturbed("jpeg 50"),
    "cropped": _perturbed("crop 0.9"),
    "darkened": _perturbed("brightness 0.6"),
    "turned": _perturbed("rotation 5"),
}
"""What may be done to a copy, by name: from an image and a seed. A crop takes a tenth of each side."""


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Copies of some images.

    Attributes:
        images: The copies.
        origin: Which image each is a copy of.
        change: What was done to it, by name.
    """

    images: UInt8[np.ndarray, "m c h w"]
    origin: Int64[np.ndarray, "m"]
    change: list[str]


def copies_of(images: UInt8[np.ndarray, "n c h w"], *, share: float, seed: int) -> Copies:
    """Copies of so many of the images, each of another one, every change equally often.

    Raises:
        InputError: fewer images than changes.
    """
    each = round(share * len(images)) // len(CHANGES)
    if each < 1:
        raise InputError(f"expected a share of at least {len(CHANGES)} images, got {share:g} of {len(images)}")
    generator = np.random.default_rng(seed)
    origin = generator.permutation(len(images))[: each * len(CHANGES)]
    names = [name for name in CHANGES for _ in range(each)]
    seeds = generator.integers(2**31, size=len(origin)).tolist()
    changed = [CHANGES[name](images[row], own) for name, row, own in zip(names, origin, seeds, strict=True)]
    return Copies(np.stack(changed), origin, names)


def flipped(
    labels: Int64[np.ndarray, "n"], *, share: float, classes: int, seed: int
) -> tuple[Int64[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Labels of which a share is another one, each equally likely; and which."""
    generator = np.random.default_rng(seed)
    wrong = np.zeros(len(labels), dtype=np.bool_)
    wrong[generator.permutation(len(labels))[: max(1, round(share * len(labels)))]] = True
    new = labels.copy()
    new[wrong] = (labels[wrong] + generator.integers(1, classes, size=int(wrong.sum()))) % classes
    return new, wrong
