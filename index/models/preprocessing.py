"""How a picture becomes what a classifier sees: the resizing and the crop that its model was evaluated with."""

import math
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from beartype.door import is_bearable
from jaxtyping import UInt8
from PIL import Image, ImageOps

from tmm_engine.index.errors import ImageError, ModelError
from tmm_engine.index.limits import MAX_PIXELS
from tmm_engine.index.types import ImageShape


class Resize(StrEnum):
    """How a picture gets its size before the crop."""

    COVER = "cover"
    """The largest centred part with the aspect ratio of the crop, resized; only where the size differs."""
    SHORTEST = "shortest"
    """The shorter side becomes so long; the other keeps the aspect ratio, rounded down."""
    EXACT = "exact"
    """Both sides, whatever the aspect ratio was."""
    NONE = "none"


class Interpolation(StrEnum):
    """Between pixels, always antialiased where that has a meaning."""

    NEAREST = "nearest"
    BOX = "box"
    BILINEAR = "bilinear"
    HAMMING = "hamming"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class Resampler(StrEnum):
    """Whose arithmetic: on 8-bit pixels they differ by one here and there."""

    PIL = "pil"
    TORCHVISION = "torchvision"


class OddCrop(StrEnum):
    """Where a crop begins, if the number of pixels that it leaves out is odd: half of it as `round` or `floor` say.

    Where black is added instead, the smaller half comes first, but for `DOWN`, which is `FLOOR` with the larger one.
    """

    ROUND = "round"
    FLOOR = "floor"
    DOWN = "down"


class Transparency(StrEnum):
    """What transparent pixels become: white, or the colour that is stored below the transparency."""

    WHITE = "white"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From an upright picture to the pixels that an index stores and a classifier sees; mean and std come later.

    In this order: colour, resize, the centre of `shape`'s size, black where there is nothing. `COVER` resizes in the
    picture's own colours.

    What has no effect is the default, whatever is given, so that equal pixels are of equal values.

    Attributes:
        shape: (c, h, w) of what comes out; grey becomes three equal channels, colour its luma (ITU-R 601).
        resize: How.
        size: (h, w) for `EXACT`; twice the side for `SHORTEST`; else the shape's.
        interpolation: Of resizing.
        resampler: Of resizing.
        odd_crop: Where an odd number of pixels is cut off.
        transparency: Of pictures that have any.

    Raises:
        ModelError: no shape of pictures, or another `size` than `resize` takes.
    """

    shape: ImageShape
    resize: Resize = Resize.COVER
    size: tuple[int, int] = (0, 0)
    interpolation: Interpolation = Interpolation.BICUBIC
    resampler: Resampler = Resampler.PIL
    odd_crop: OddCrop = OddCrop.ROUND
    transparency: Transparency = Transparency.WHITE

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or self.shape[0] not in (1, 3) or min(self.shape) < 1:
            raise ModelError(f"expected a shape (channels, height, width) with 1 or 3 channels, got {self.shape}")
        if self.resize in (Resize.COVER, Resize.NONE):
            object.__setattr__(self, "size", tuple(self.shape[1:]))
        if min(self.size) < 1 or (self.resize is Resize.SHORTEST and self.size[0] != self.size[1]):
            raise ModelError(f"expected positive sides to resize to, equal for the shorter one, got {self.size}")
        if max(math.prod(self.size), math.prod(self.shape[1:])) > MAX_PIXELS:
            raise ModelError(f"expected at most {MAX_PIXELS} pixels, got {self.size} and a crop of {self.shape[1:]}")
        for name, default in self._without_effect().items():
            object.__setattr__(self, name, default)

    def _without_effect(self) -> dict[str, Any]:
        """What the resize leaves nothing to do for, and the default that stands for it."""
        idle: dict[Resize, tuple[str, ...]] = {
            Resize.COVER: ("resampler", "odd_crop"),
            Resize.NONE: ("interpolation", "resampler"),
            Resize.EXACT: ("odd_crop",) if self.size == self.shape[1:] else (),
        }
        names = idle.get(self.resize, ())
        return {field.name: field.default for field in fields(self) if field.name in names}

    def __call__(self, image: Image.Image) -> UInt8[np.ndarray, "c h w"]:
        """The pixels of an upright L or RGB picture, newly allocated, contiguous and writable.

        Raises:
            ImageError: so long and thin that it would have more than MAX_PIXELS pixels.
        """
        mode = "L" if self.shape[0] == 1 else "RGB"
        if self.resize is Resize.COVER:
            height, width = self.size
            if image.size != (width, height):
                image = ImageOps.fit(image, (width, height), _PIL[self.interpolation])
            return _planes(_in_mode(image, mode))
        image = _in_mode(image, mode)
        size = self._resized(image.height, image.width)
        if self.resampler is Resampler.TORCHVISION:
            return self._cropped(Image.fromarray(_resized_by_torchvision(_planes(image), size, self.interpolation)))
        return self._cropped(image.resize((size[1], size[0]), _PIL[self.interpolation]))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is Resize.NONE:
            return height, width
        if self.resize is Resize.EXACT:
            return self.size
        side = self.size[0]
        longer = int(side * max(height, width) / min(height, width))
        if side * longer > MAX_PIXELS:
            raise ImageError(
                f"expected at most {MAX_PIXELS} pixels with a shorter side of {side}, got {side} × {longer}; "
                "crop the image first"
            )
        return (side, longer) if height <= width else (longer, side)

    def _cropped(self, image: Image.Image) -> UInt8[np.ndarray, "c h w"]:
        _, height, width = self.shape
        top, left = (self._start(have, want) for have, want in ((image.height, height), (image.width, width)))
        return _planes(image.crop((left, top, left + width, top + height)))

    def _start(self, have: int, want: int) -> int:
        if want > have:
            return (have - want) // 2 if self.odd_crop is OddCrop.DOWN else -((want - have) // 2)
        return round((have - want) / 2) if self.odd_crop is OddCrop.ROUND else (have - want) // 2

    def to_json(self) -> dict[str, Any]:
        """The attributes as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: object) -> "Preprocessing":
        """The inverse of `to_json`.

        Raises:
            ModelError: not an object with exactly these attributes, or one of another type or out of its range.
        """
        kinds = {field.name: field.type for field in fields(cls)}
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            raise ModelError(f"expected preprocessing with {sorted(kinds)}, got {value!r}")
        given: dict[str, Any] = {}
        for name, kind in kinds.items():
            try:
                item: Any = tuple(value[name]) if isinstance(value[name], list) else value[name]
                given[name] = kind(item) if isinstance(kind, type) and issubclass(kind, StrEnum) else item
            except ValueError:
                raise ModelError(f"expected {name!r} of preprocessing to be {kind}, got {value[name]!r}") from None
            if not is_bearable(given[name], kind):  # type: ignore[arg-type]
                raise ModelError(f"expected {name!r} of preprocessing to be {kind}, got {value[name]!r}")
        made = cls(**given)
        for name in made._without_effect():  # as it was written: the fingerprint of an index of before is of that
            object.__setattr__(made, name, given[name])
        return made


Target = ImageShape | Preprocessing
"""What pictures are brought to. A bare shape (c, h, w) stands for `Preprocessing` of that shape and its defaults."""


def shape_of(target: Target) -> ImageShape:
    """(c, h, w) of what comes out."""
    return target.shape if isinstance(target, Preprocessing) else target


_PIL = {each: Image.Resampling[each.name] for each in Interpolation}


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _planes(image: Image.Image) -> UInt8[np.ndarray, "c h w"]:
    interleaved: UInt8[np.ndarray, "h w c"] = np.atleast_3d(np.asarray(image))
    return np.array(interleaved.transpose(2, 0, 1), order="C")


def _resized_by_torchvision(
    pixels: UInt8[np.ndarray, "c h w"], size: tuple[int, int], interpolation: Interpolation
) -> UInt8[np.ndarray, "..."]:
    """(h, w, 3), or (h, w) of a grey picture, as Pillow takes it."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    tensor = torch.from_numpy(pixels)
    resized: torch.Tensor = functional.resize(
        tensor, list(size), interpolation=InterpolationMode(str(interpolation)), antialias=True
    )
    return np.ascontiguousarray(resized.permute(1, 2, 0).squeeze(-1).numpy())
