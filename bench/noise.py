"""What is done to a query before it is searched for: families of perturbations, each with a level.

Pixels are in [0, 1] before and after. What a perturbation draws depends on the seed, its family and the image's shape
only: give each query a seed of its own, or all of them get the same noise.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float32, Float64
from PIL import Image as PillowImage
from scipy.ndimage import gaussian_filter

from tmm_engine.bench.attack import Embedding, pgd
from tmm_engine.index.errors import InputError, member

DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))

Image = Float32[np.ndarray, "c h w"]


class Family(StrEnum):
    """Kinds of perturbations, and what their level means."""

    CLEAN = "clean"  # the query as it is; level 0
    BRIGHTNESS = "brightness"  # x · level
    GAUSSIAN = "gaussian"  # x + δ, ‖δ‖₂ = level after clipping
    CONTRAST = "contrast"  # mean + (x − mean) · level
    BLUR = "blur"  # Gaussian; the level is σ in pixels
    JPEG = "jpeg"  # the level is Pillow's quality
    SHIFT = "shift"  # by so many pixels up, down, left or right, the edge repeated
    PGD = "pgd"  # x + δ, ‖δ‖₂ ≤ level, that moves φ(x) far: one for all methods
    ADAPTIVE = "adaptive"  # x + δ, ‖δ‖₂ ≤ level, that moves far what a method ranks by: one for each method


LEVELS: dict[Family, tuple[float, ...]] = {
    Family.CLEAN: (0.0,),
    Family.BRIGHTNESS: (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
    Family.GAUSSIAN: (0.5, 1.0, 2.5, 5.0),
    Family.CONTRAST: (0.8, 0.6, 0.4, 0.2),
    Family.BLUR: (0.5, 1.0, 2.0),
    Family.JPEG: (75.0, 50.0, 25.0, 10.0),
    Family.SHIFT: (1.0, 2.0, 4.0),
    Family.PGD: (0.25, 0.5, 1.0, 2.5),
    Family.ADAPTIVE: (0.5, 1.0),
}
"""The levels a benchmark uses unless told otherwise, from mild to strong."""

LIMITS: dict[Family, tuple[float, float]] = dict.fromkeys(Family, (0.0, math.inf)) | {
    Family.CLEAN: (0.0, 0.0),
    Family.BRIGHTNESS: (0.0, 1.0),
    Family.CONTRAST: (0.0, 1.0),
    Family.JPEG: (1.0, 100.0),
}
"""The smallest and the largest level, both included."""

WHOLE = (Family.JPEG, Family.SHIFT)


@dataclass(frozen=True, slots=True)
class Perturbation:
    """One family at one level.

    Attributes:
        family: What is done.
        level: How much; its meaning and range are the family's (`Family`, `LIMITS`).

    Raises:
        InputError: a level out of the family's range, or not whole where it must be.
    """

    family: Family
    level: float

    def __post_init__(self) -> None:
        low, high = LIMITS[self.family]
        whole = self.family in WHOLE
        if not (math.isfinite(self.level) and low <= self.level <= high and (not whole or self.level % 1 == 0)):
            raise InputError(
                f"{self.family}: expected a finite {'whole ' if whole else ''}level in [{low:g}, {high:g}], "
                f"got {self.level!r}"
            )

    @property
    def name(self) -> str:
        """Family and level, as `parse` reads them: 'gaussian 2.5'; 'clean' has no level."""
        if self.family is Family.CLEAN:
            return str(self.family)
        return f"{self.family} {np.format_float_positional(self.level, trim='-')}"

    def apply(self, image: Image, *, seed: int, embedding: Embedding | None = None) -> Image:
        """The perturbed image, a new array; the same bytes for the same arguments (attacks: on the same device).

        Args:
            image: float32 (c, h, w) in [0, 1].
            seed: Of what is random: the direction of Gaussian noise (the same one at every level), that of a shift, the
                start of an attack, the same one for both. Not negative.
            embedding: What an attack moves: `features_of` the classifier for PGD, a retriever's own for the adaptive
                one; the other families do without.

        Returns:
            float32 (c, h, w) in [0, 1]. Under Gaussian noise its L2 distance from ``image`` is the level to 1e-4,
            under an attack at most that.

        Raises:
            InputError: not such an image; one with too little room in [0, 1] for the noise; a JPEG that has neither 1
                nor 3 channels; an attack without an embedding.
        """
        _check(image)
        generator = _generator(self.family, seed)
        match self.family:
            case Family.CLEAN:
                perturbed = image
            case Family.BRIGHTNESS:
                perturbed = image * np.float32(self.level)
            case Family.GAUSSIAN:
                perturbed = _moved(image, _gaussian_direction(image, seed), norm=self.level)
            case Family.CONTRAST:
                mean = np.float32(image.mean(dtype=np.float64))
                perturbed = mean + (image - mean) * np.float32(self.level)
            case Family.BLUR:
                perturbed = gaussian_filter(image, (0, self.level, self.level), mode="nearest")
            case Family.JPEG:
                perturbed = _jpeg(image, quality=int(self.level))
            case Family.SHIFT:
                perturbed = _shifted(image, generator, pixels=int(self.level))
            case Family.PGD | Family.ADAPTIVE:
                if embedding is None:
                    raise InputError(f"{self.family}: expected what to move, got nothing (pass embedding=)")
                perturbed = pgd(image, _generator(Family.PGD, seed), embedding, bound=self.level)
        return np.clip(perturbed, 0, 1)  # rounding may have left the range


def standard_perturbations(
    families: Sequence[Family], *, levels: Mapping[Family, Sequence[float]] | None = None
) -> list[Perturbation]:
    """Every level of every family given, in that order.

    Args:
        families: What is done.
        levels: Instead of the family's `LEVELS`.

    Raises:
        InputError: a level that its family does not have.
    """
    chosen = {**LEVELS, **(levels or {})}
    return [Perturbation(family, level) for family in families for level in chosen[family]]


def parse(text: str) -> Perturbation:
    """Read 'gaussian 2.5', or 'clean'.

    Raises:
        InputError: an unknown family, no level, or a level that the family does not have.
    """
    name, _, level = text.strip().partition(" ")
    family = member(Family, name)
    if family is Family.CLEAN and not level:
        return Perturbation(family, 0.0)
    try:
        number = float(level)
    except ValueError:
        raise InputError(f"expected a family and its level, like 'gaussian 2.5', got {text!r}") from None
    return Perturbation(family, number)


def gaussian_reach(image: Image, *, seed: int) -> float:
    """The largest L2 norm that Gaussian noise of this seed can have before every pixel is at 0 or 1."""
    return float(np.linalg.norm(_room(image, _gaussian_direction(image, seed))))


def _generator(family: Family, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, *family.encode()])


def _gaussian_direction(image: Image, seed: int) -> Float64[np.ndarray, "c h w"]:
    return _generator(Family.GAUSSIAN, seed).standard_normal(image.shape)


def _check(image: Image) -> None:
    if image.dtype != np.float32 or image.ndim != 3 or not (image.min() >= 0 and image.max() <= 1):
        raise InputError(
            f"expected a float32 image (c, h, w) in [0, 1], got {image.dtype} {image.shape} in "
            f"[{image.min():g}, {image.max():g}] (divide 8-bit pixels by 255)"
        )


def _room(image: Image, direction: Float64[np.ndarray, "c h w"]) -> Float64[np.ndarray, "c h w"]:
    """How far each pixel can move before it is at 0 or 1."""
    precise = image.astype(np.float64)
    return np.where(direction > 0, 1 - precise, precise)


def _moved(image: Image, direction: Float64[np.ndarray, "c h w"], *, norm: float) -> Image:
    """clip(x + s·direction, 0, 1) with the s ≥ 0 at which the result is ``norm`` away from x.

    Pixels reach their limits one after another as s grows, and between two such moments ‖·‖² is quadratic in s: so s
    is found exactly, and only the rounding to float32 parts the L2 distance from ``norm``.
    """
    room, speed = _room(image, direction), np.abs(direction)
    if norm > (farthest := float(np.linalg.norm(room))):
        raise InputError(
            f"expected an image with room in [0, 1] for a perturbation of L2 norm {norm:g}, got one that can move by "
            f"{farthest:g} in this direction (choose a smaller level or another seed)"
        )
    limits = (room / speed).ravel()  # the s at which each pixel is at its limit
    order = np.argsort(limits)
    at_limit = np.concatenate(([0.0], np.cumsum(room.ravel()[order][:-1] ** 2)))  # Σ of squares: the first m pixels
    moving = np.cumsum(speed.ravel()[order][::-1] ** 2)[::-1]  # Σ of squared speeds: the others
    squares = at_limit + limits[order] ** 2 * moving  # ‖·‖² as the m-th pixel arrives
    m = min(int(np.searchsorted(squares, norm**2)), len(order) - 1)
    s = math.sqrt(max(norm**2 - at_limit[m], 0.0) / moving[m])
    return np.clip(image + s * direction, 0, 1).astype(np.float32)


def _jpeg(image: Image, *, quality: int) -> Image:
    if image.shape[0] not in (1, 3):
        raise InputError(f"jpeg: expected 1 or 3 channels, got {image.shape[0]} (leave this family out)")
    pixels = np.moveaxis(np.rint(image * 255).astype(np.uint8), 0, -1)
    file = io.BytesIO()
    PillowImage.fromarray(pixels.squeeze(-1) if image.shape[0] == 1 else pixels).save(file, "JPEG", quality=quality)
    with PillowImage.open(file) as decoded:
        back = np.array(decoded, dtype=np.float32) / 255
    return np.ascontiguousarray(np.moveaxis(back.reshape(pixels.shape), -1, 0))


def _shifted(image: Image, generator: np.random.Generator, *, pixels: int) -> Image:
    down, right = pixels * generator.choice(DIRECTIONS)
    _, height, width = image.shape
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return image[:, rows[:, None], columns]
