"""Decode and check one image: a file, its bytes, a PIL image, an array or a tensor -> uint8 (c, h, w)."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Num, Shaped, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tmm_engine.index.errors import ImageError, InputError, printable
from tmm_engine.index.limits import MAX_PIXELS
from tmm_engine.index.models.preprocessing import Preprocessing, Target, Transparency, shape_of
from tmm_engine.index.types import ImageLike, ImageShape

# These and no others: Pillow's EPS plugin, for one, would start Ghostscript on whatever it is given.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)

_WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_GREY_MODES = ("1", "L", "LA", *_WIDE_MODES)
_COLOUR_MODES = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV")
_ROUNDING = 1e-5  # how far floating-point pixels may lie outside [0, 1]
_warning_filters = threading.Lock()


def decode_image(
    source: ImageLike,
    *,
    shape: Target | None = None,
    assumed: list[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "c h w"]:
    """One image as the index stores it.

    Files, bytes and PIL images are turned upright (EXIF), converted to 8 bits (the table in `_to_8_bits`) and, where a
    shape is given, brought to its channels and size (`Preprocessing`). Of an animation the first frame counts; of a PIL
    image the frame it stands at.

    Arrays and tensors are taken as they are: (h, w), (c, h, w) or (h, w, c) with 1 or 3 channels, uint8 or
    floating point in [0, 1], which is rounded to 8 bits. Where both layouts are possible the one that has the given
    shape is meant, else (c, h, w).

    Args:
        source: A path, an image file's bytes, an open binary file (read from its beginning where it can be rewound),
            a PIL image, a NumPy array, or a tensor on any device. Never modified.
        shape: The expected shape, or a classifier's preprocessing, which says how pictures come to it. Default: the
            image's own size, 1 channel for grey modes, else 3.
        assumed: Takes what had to be assumed of the image, in sentences.
        max_pixels: Height × width beyond which a file is refused before its pixels are decoded.

    Returns:
        uint8 (c, h, w), newly allocated, writable and contiguous.

    Raises:
        ImageError: Missing, unreadable, truncated or too large a file, or an array of another shape, type or range.
        InputError: A shape that no image can have.
    """
    expected = None if shape is None else shape_of(shape)
    _check_shape(expected)
    if isinstance(source, np.ndarray | torch.Tensor):
        array: UInt8[np.ndarray, "c h w"] = to_uint8(channels_first(to_numpy(source)[None], shape=expected))[0]
        return array
    bring = Preprocessing(shape) if isinstance(shape, tuple) else shape
    with _opened(source, max_pixels) as image:
        image.load()
        transparency = bring.transparency if bring else Transparency.WHITE
        pixels = _to_8_bits(_upright(image), transparency, [] if assumed is None else assumed)
        if bring is not None:
            return bring(pixels)
        interleaved: UInt8[np.ndarray, "h w c"] = np.atleast_3d(np.asarray(pixels))
        return np.array(interleaved.transpose(2, 0, 1), order="C")


def natural_shape(source: ImageLike) -> ImageShape:
    """The shape `decode_image` gives without being told one, from the file's header where the format allows it.

    Raises:
        ImageError: As `decode_image`, except for damage that only decoding the pixels would show.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        channels, height, width = channels_first(to_numpy(source)[None]).shape[1:]
        return channels, height, width
    with _opened(source) as image:
        channels = _channels(image)
        if image.format == "TIFF":
            image.load()  # which turns a TIFF upright
        width, height = image.size
        with _pillow_silenced():
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter
        return (channels, width, height) if turned else (channels, height, width)


def pixels_of(source: bytes, *, max_pixels: int) -> int:
    """Height × width of an image file, from its header.

    Raises:
        ImageError: As `decode_image`, but for what decoding the pixels would show.
    """
    with _opened(source, max_pixels) as image:
        return image.width * image.height


def to_numpy(images: np.ndarray | torch.Tensor) -> np.ndarray:
    """An array of the same values; 16-bit floating point becomes float32 (NumPy has no bfloat16)."""
    if isinstance(images, np.ndarray):
        return images
    images = images.detach().cpu()
    return (images.float() if images.dtype in (torch.float16, torch.bfloat16) else images).numpy()


def channels_first(
    images: Shaped[np.ndarray, "n *dims"], *, shape: ImageShape | None = None
) -> Shaped[np.ndarray, "n c h w"]:
    """A view of images in any layout, (n, h, w), (n, c, h, w) or (n, h, w, c), as (n, c, h, w).

    Raises:
        ImageError: Another layout, no pixels, or not the expected shape.
    """
    dims = images.shape[1:]
    layouts = []
    if len(dims) == 2:
        layouts = [images[:, None]]
    if len(dims) == 3 and dims[0] in (1, 3):
        layouts.append(images)
    if len(dims) == 3 and dims[2] in (1, 3):
        layouts.append(images.transpose(0, 3, 1, 2))
    if not layouts or 0 in dims:
        raise ImageError(f"expected an array (h, w), (c, h, w) or (h, w, c) with 1 or 3 channels, got shape {dims}")
    for view in layouts:
        if shape is None or view.shape[1:] == shape:
            return view
    raise ImageError(
        f"expected an image of shape (c, h, w) = {shape}, got an array of shape {dims}; arrays are never resized: "
        "resize it, or pass a file or a PIL image"
    )


def to_uint8(images: Shaped[np.ndarray, "n c h w"]) -> UInt8[np.ndarray, "n c h w"]:
    """A contiguous copy in 8 bits: uint8 as it is, floating point in [0, 1] times 255, rounded.

    Raises:
        ImageError: Another dtype, or values outside [0, 1] by more than rounding (1e-5), NaN included.
    """
    if images.dtype == np.uint8:
        return np.array(images, order="C")
    if not np.issubdtype(images.dtype, np.floating):
        raise ImageError(f"expected pixels as uint8 or floating point in [0, 1], got {images.dtype}; convert them")
    low, high = images.min(), images.max()
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN compares false
        raise ImageError(
            f"expected floating-point pixels in [0, 1], got {low:.9g} to {high:.9g}; divide by their maximum, "
            "undo a normalisation, or pass uint8"
        )
    scaled: Float[np.ndarray, "n c h w"] = np.rint(images * images.dtype.type(255))
    return scaled.astype(np.uint8, order="C")


def _check_shape(shape: ImageShape | None) -> None:
    if shape is None:
        return
    if not isinstance(shape, tuple | list) or len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
        raise InputError(f"expected a shape (channels, height, width) with 1 or 3 channels, got {shape}")


@contextmanager
def _pillow_silenced() -> Iterator[None]:
    """Pillow's warnings about odd files, ignored; the lock, because warning filters belong to the whole process."""
    with _warning_filters, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextmanager
def _opened(source: ImageLike, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image, its header read and its size checked. Whatever Pillow raises inside becomes an ImageError."""
    name, stream = _described(source)
    try:
        if isinstance(stream, Image.Image):
            _check_size(stream, max_pixels)
            yield stream
            return
        with _pillow_silenced():
            image = Image.open(stream, formats=FORMATS)
        with image:
            _check_size(image, max_pixels)
            yield image
    except UnidentifiedImageError:
        raise ImageError(f"{name}: expected an image ({', '.join(FORMATS)}), got something else") from None
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Image.DecompressionBombError:  # twice what Pillow warns of, whatever `max_pixels` is
        most = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise ImageError(f"{name}: expected at most {most} pixels, got more; make the image smaller first") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything for damaged files
        raise ImageError(f"{name}: expected a readable image, got {error or type(error).__name__}") from error


def _described(source: ImageLike) -> tuple[str, Path | io.BytesIO | Image.Image]:
    """A name for messages, and what Pillow can open."""
    if isinstance(source, Image.Image):
        return "PIL image", source
    if isinstance(source, io.IOBase):
        source = _content(source)
    if isinstance(source, bytes | bytearray | memoryview):
        if not source:
            raise ImageError("expected an image file's bytes, got none (0 bytes)")
        return f"image of {len(source)} bytes", io.BytesIO(source)
    if not isinstance(source, Path | str):
        raise ImageError(
            f"expected a path, bytes, an open binary file, a PIL image, an array or a tensor, got "
            f"{type(source).__name__}; convert it"
        )
    path, name = Path(source), printable(source)
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise ImageError(f"{name}: expected an image file, got {found}; check the path")
        if path.stat().st_size == 0:
            raise ImageError(f"{name}: expected an image file, got an empty one (0 bytes)")
    except OSError as error:
        raise ImageError(f"{name}: expected an image file, got {error.strerror}; check the path") from error
    return name, path


def _content(stream: io.IOBase) -> bytes:
    """All of an open file, which is left at the place where it stood."""
    try:
        place = stream.tell() if stream.seekable() else None
        if place is not None:
            stream.seek(0)
        content = stream.read()
        if place is not None:
            stream.seek(place)
    except (OSError, ValueError) as error:
        raise ImageError(f"expected an open binary file, got {error}; open it again") from error
    if not isinstance(content, bytes):
        raise ImageError(f"expected a file opened in binary mode, got {type(content).__name__}; open it with 'rb'")
    return content


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"expected at most {max_pixels} pixels, got {width} × {height}; make the image smaller first")
    if width * height == 0:
        raise ImageError(f"expected at least one pixel, got {width} × {height}")


def _channels(image: Image.Image) -> int:
    if image.mode not in _GREY_MODES + _COLOUR_MODES:
        raise ImageError(f"expected a mode of {', '.join(_GREY_MODES + _COLOUR_MODES)}, got {image.mode}; convert it")
    return 1 if image.mode in _GREY_MODES else 3


def _upright(image: Image.Image) -> Image.Image:
    """The loaded image turned as its EXIF data say; the same object where they say nothing."""
    with _pillow_silenced():
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image


def _to_8_bits(image: Image.Image, transparency: Transparency, assumed: list[str]) -> Image.Image:
    """Any supported mode as L or RGB. Colour profiles are not applied. What is assumed of the image is added.

    | mode | what it is | becomes |
    |---|---|---|
    | L, RGB | 8 bits, 16-bit colour (of which Pillow keeps the high byte) | L, RGB: unchanged |
    | 1 | black and white | L: 0 and 255 |
    | I;16, I | integers; outside 0..65535 refused | L: v / 257, rounded (Pillow's `convert` would clip at 255); \
        where none is above 4095, v · 255 / 4095, as cameras of 12 bits write; where none is above 255, unchanged |
    | F | floating point; outside [0, 1] refused, as for arrays | L: v · 255, rounded |
    | P | palette | RGB |
    | LA, RGBA, PA; L, RGB, P with a transparent colour | transparency | L or RGB, over white, or without it |
    | CMYK, YCbCr, HSV | other colour spaces | RGB by Pillow's plain formulas |
    """
    mode = "L" if _channels(image) == 1 else "RGB"
    if image.mode in _WIDE_MODES:
        return Image.fromarray(_narrowed(np.asarray(image), assumed))
    if image.has_transparency_data and transparency is Transparency.WHITE:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert(mode)
    return image if image.mode == mode else image.convert(mode)


def _narrowed(pixels: Num[np.ndarray, "h w"], assumed: list[str]) -> UInt8[np.ndarray, "h w"]:
    """Integers of 16, 12 or 8 bits, or floating point in [0, 1], as 8 bits."""
    narrowed: UInt8[np.ndarray, "h w"]
    if np.issubdtype(pixels.dtype, np.floating):
        narrowed = to_uint8(pixels[None, None])[0, 0]
        return narrowed
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 65535:
        raise ImageError(f"expected 16-bit pixels in 0..65535, got {low} to {high}; scale them to 8 bits first")
    bits = 8 if high < 1 << 8 else 12 if high < 1 << 12 else 16
    if bits < 16:
        assumed.append(f"read as {bits} bits, since no pixel of the 16-bit file is above {(1 << bits) - 1}")
    most = (1 << bits) - 1
    narrowed = ((pixels.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
    return narrowed
