"""What is done to a query before it is searched for: families of perturbations, each with a level.

Pixels are in [0, 1] before and after. What a perturbation draws depends on the seed, its family and the image's shape
only: give each query a seed of its own, or all of them get the same noise.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float32, Float64
from PIL import Image as PillowImage
from scipy.ndimage import gaussian_filter, rotate

from tmm_engine.bench.attack import Embedding, pgd
from tmm_engine.index.errors import InputError, member

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # of Rec. 601
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))

Image = Float32[np.ndarray, "c h w"]


class Family(StrEnum):
    """Kinds of perturbations; `FAMILIES` says what each does."""

    CLEAN = "clean"
    BRIGHTNESS = "brightness"
    GAUSSIAN = "gaussian"
    CONTRAST = "contrast"
    BLUR = "blur"
    JPEG = "jpeg"
    SHIFT = "shift"
    ROTATION = "rotation"
    CROP = "crop"
    OCCLUSION = "occlusion"
    SATURATION = "saturation"
    HUE = "hue"
    DARK_NOISE = "dark-noise"
    CROP_BLUR = "crop-blur"
    PGD = "pgd"
    ADAPTIVE = "adaptive"


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """What is random in a perturbation, and what an attack moves."""

    seed: int
    embedding: Embedding | None

    def generator(self, family: Family) -> np.random.Generator:
        """The family's own, for this seed."""
        return np.random.default_rng([self.seed, *family.encode()])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Noise:
    """All there is to a family of perturbations.

    Attributes:
        change: The perturbed image, from image, level and draw; it may leave [0, 1] by rounding.
        levels: From mild to strong, as a benchmark uses them unless told otherwise.
        limits: The smallest and the largest level, both included.
        whole: Whether levels are whole numbers.
        title: For people.
        axis: What the level is.
        clean: The level that changes nothing, if there is one.
        falling: Whether smaller levels are stronger.
    """

    change: Callable[[Image, float, Draw], Image]
    levels: tuple[float, ...]
    limits: tuple[float, float] = (0.0, math.inf)
    whole: bool = False
    title: str
    axis: str
    clean: float | None = 0.0
    falling: bool = False


@dataclass(frozen=True, slots=True)
class Perturbation:
    """One family at one level.

    Attributes:
        family: What is done.
        level: How much; its meaning and range are the family's (`FAMILIES`).

    Raises:
        InputError: a level out of the family's range, or not whole where it must be.
    """

    family: Family
    level: float

    def __post_init__(self) -> None:
        own = FAMILIES[self.family]
        (low, high), whole = own.limits, own.whole
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
        perturbed = FAMILIES[self.family].change(image, self.level, Draw(seed, embedding))
        return np.clip(perturbed, 0, 1)  # rounding may have left the range


def standard_perturbations(
    families: Sequence[Family], *, levels: Mapping[Family, Sequence[float]] | None = None
) -> list[Perturbation]:
    """Every level of every family given, in that order.

    Args:
        families: What is done.
        levels: Instead of the family's own.

    Raises:
        InputError: a level that its family does not have.
    """
    own = levels or {}
    return [Perturbation(family, level) for family in families for level in own.get(family, FAMILIES[family].levels)]


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


def _gaussian_direction(image: Image, seed: int) -> Float64[np.ndarray, "c h w"]:
    return Draw(seed, None).generator(Family.GAUSSIAN).standard_normal(image.shape)


def _with_contrast(image: Image, factor: float) -> Image:
    mean = np.float32(image.mean(dtype=np.float64))
    return mean + (image - mean) * np.float32(factor)


def _attacked(image: Image, bound: float, draw: Draw) -> Image:
    if draw.embedding is None:
        raise InputError("expected what an attack moves, got nothing (pass embedding=)")
    return pgd(image, draw.generator(Family.PGD), draw.embedding, bound=bound)


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


def _rotated(image: Image, degrees: float) -> Image:
    return rotate(image, degrees, axes=(1, 2), reshape=False, order=1, mode="nearest")


def _cropped(image: Image, generator: np.random.Generator, *, share: float) -> Image:
    sides = np.array(image.shape[1:])
    window = np.maximum(1, np.rint(share * sides)).astype(int)
    top, left = (int(generator.integers(room + 1)) for room in sides - window)
    inner = image[:, top : top + window[0], left : left + window[1]]
    return np.stack([_resized(channel, height=image.shape[1], width=image.shape[2]) for channel in inner])


def _resized(channel: Float32[np.ndarray, "h w"], *, height: int, width: int) -> Float32[np.ndarray, "height width"]:
    picture = PillowImage.fromarray(channel, mode="F").resize((width, height), PillowImage.Resampling.BILINEAR)
    return np.asarray(picture, dtype=np.float32)


def _occluded(image: Image, generator: np.random.Generator, *, share: float) -> Image:
    covered, sides = image.copy(), np.array(image.shape[1:])
    square = np.rint(share * sides).astype(int)
    top, left = (int(generator.integers(room + 1)) for room in sides - square)
    covered[:, top : top + square[0], left : left + square[1]] = 0.5
    return covered


def _saturated(image: Image, factor: float) -> Image:
    if image.shape[0] != 3:
        return image
    grey = np.tensordot(LUMA, image, axes=1)[None]
    return grey + (image - grey) * np.float32(factor)


def _hued(image: Image, degrees: float) -> Image:
    """By Rodrigues' formula about the axis (1, 1, 1)."""
    if image.shape[0] != 3:
        return image
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)) / math.sqrt(3.0)
    same, after, before = (1 + 2 * cosine) / 3, (1 - cosine) / 3 - sine, (1 - cosine) / 3 + sine
    turn = np.array([[same, after, before], [before, same, after], [after, before, same]], dtype=np.float32)
    return np.tensordot(turn, image, axes=1).astype(np.float32)


FAMILIES: dict[Family, Noise] = {
    Family.CLEAN: Noise(  # the query as it is
        change=lambda image, level, draw: image, levels=(0.0,), limits=(0.0, 0.0), title="Clean", axis="none"
    ),
    Family.BRIGHTNESS: Noise(  # x · level
        change=lambda image, level, draw: image * np.float32(level),
        levels=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
        limits=(0.0, 1.0),
        title="Brightness",
        axis="brightness factor",
        clean=1.0,
        falling=True,
    ),
    Family.GAUSSIAN: Noise(  # x + δ, ‖δ‖₂ = level after clipping
        change=lambda image, level, draw: _moved(image, _gaussian_direction(image, draw.seed), norm=level),
        levels=(0.5, 1.0, 2.5, 5.0),
        title="Gaussian noise",
        axis="L2 norm of the noise",
    ),
    Family.CONTRAST: Noise(  # mean + (x − mean) · level
        change=lambda image, level, draw: _with_contrast(image, level),
        levels=(0.8, 0.6, 0.4, 0.2),
        limits=(0.0, 1.0),
        title="Contrast",
        axis="contrast factor",
        clean=1.0,
        falling=True,
    ),
    Family.BLUR: Noise(
        change=lambda image, level, draw: gaussian_filter(image, (0, level, level), mode="nearest"),
        levels=(0.5, 1.0, 2.0),
        title="Gaussian blur",
        axis="σ in pixels",
    ),
    Family.JPEG: Noise(  # Pillow's quality
        change=lambda image, level, draw: _jpeg(image, quality=int(level)),
        levels=(75.0, 50.0, 25.0, 10.0),
        limits=(1.0, 100.0),
        whole=True,
        title="JPEG compression",
        axis="JPEG quality",
        clean=None,
        falling=True,
    ),
    Family.SHIFT: Noise(  # up, down, left or right, the edge repeated
        change=lambda image, level, draw: _shifted(image, draw.generator(Family.SHIFT), pixels=int(level)),
        levels=(1.0, 2.0, 4.0),
        whole=True,
        title="Shift",
        axis="shift in pixels",
    ),
    Family.ROTATION: Noise(  # left or right about the centre, the edge repeated
        change=lambda image, level, draw: _rotated(image, level * draw.generator(Family.ROTATION).choice((-1.0, 1.0))),
        levels=(5.0, 10.0, 20.0),
        limits=(0.0, 180.0),
        title="Rotation",
        axis="degrees",
    ),
    Family.CROP: Noise(  # a random window, enlarged to the old size
        change=lambda image, level, draw: _cropped(image, draw.generator(Family.CROP), share=level),
        levels=(0.95, 0.85, 0.7),
        limits=(0.0, 1.0),
        title="Crop and resize",
        axis="share of each side that is left",
        clean=1.0,
        falling=True,
    ),
    Family.OCCLUSION: Noise(  # a random grey square
        change=lambda image, level, draw: _occluded(image, draw.generator(Family.OCCLUSION), share=level),
        levels=(0.15, 0.25, 0.4),
        limits=(0.0, 1.0),
        title="Occlusion",
        axis="side of the square, of each side",
    ),
    Family.SATURATION: Noise(  # grey + (x − grey) · level; nothing happens to images of one channel
        change=lambda image, level, draw: _saturated(image, level),
        levels=(0.5, 0.0, 2.0),
        limits=(0.0, 10.0),
        title="Saturation",
        axis="saturation factor",
        clean=1.0,
    ),
    Family.HUE: Noise(  # colours turned about the grey axis; nothing happens to images of one channel
        change=lambda image, level, draw: _hued(image, level),
        levels=(10.0, 30.0, 60.0),
        limits=(0.0, 180.0),
        title="Hue",
        axis="degrees",
    ),
    Family.DARK_NOISE: Noise(  # x · 0.4, then Gaussian noise of this norm
        change=lambda image, level, draw: _moved(
            image * np.float32(0.4), _gaussian_direction(image, draw.seed), norm=level
        ),
        levels=(1.0, 2.5),
        title="Darkness and noise",
        axis="L2 norm, at brightness 0.4",
        clean=None,
    ),
    Family.CROP_BLUR: Noise(  # a crop of 0.85, then blur of this σ
        change=lambda image, level, draw: gaussian_filter(
            _cropped(image, draw.generator(Family.CROP), share=0.85), (0, level, level), mode="nearest"
        ),
        levels=(0.5, 1.0),
        title="Crop and blur",
        axis="σ in pixels, of a crop of 0.85",
        clean=None,
    ),
    Family.PGD: Noise(  # x + δ, ‖δ‖₂ ≤ level, that moves φ(x) far: one for all methods
        change=_attacked,
        levels=(0.25, 0.5, 1.0, 2.5),
        title="Adversarial (PGD on features)",
        axis="bound on the L2 norm",
    ),
    Family.ADAPTIVE: Noise(  # … that moves far what a method ranks by: one for each method
        change=_attacked,
        levels=(0.5, 1.0),
        title="Adaptive (PGD on what the method ranks by)",
        axis="bound on the L2 norm",
    ),
}
"""What each family does. A family is added here, and to `Family`; nothing else knows one."""
