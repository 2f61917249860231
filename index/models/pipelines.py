"""What other libraries do to a picture before their model sees it, in our words, held to theirs on some pictures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tmm_engine.index.errors import ModelError
from tmm_engine.index.models.preprocessing import Interpolation, OddCrop, Preprocessing, Resampler, Resize, Transparency

TOLERANCE = 1e-4  # of normalised pixels; one step of 8 bits is 0.004 before it is divided by std
SILENT_STEPS = (
    "ToTensor",
    "MaybeToTensor",
    "PILToTensor",
    "MaybePILToTensor",
    "ToImage",
    "ToDtype",
    "ConvertImageDtype",
)

BY_TORCHVISION = (Interpolation.NEAREST, Interpolation.BILINEAR, Interpolation.BICUBIC)
SIDES = ("height", "width", "shortest_edge")

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """From a picture to what a network takes.

    Attributes:
        preprocessing: To 8-bit pixels.
        mean: Per channel, subtracted from pixels in [0, 1].
        std: Per channel; divided by.
        bgr: The network takes blue first.
    """

    preprocessing: Preprocessing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        """Normalised pixels (c, h, w) of an RGB or L picture."""
        pixels = torch.from_numpy(self.preprocessing(image)).float() / 255.0
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        normalised = (pixels - mean) / std
        return normalised.flip(0) if self.bgr else normalised


def pipeline_of(processor: object, *, channels: int = 3) -> Pipeline:
    """What a processor does when it is called on a picture, as far as it can be said.

    Of pictures with transparency that is not always what ``transformers.pipeline`` does, which converts them to RGB
    before: a processor that converts by itself puts them on white.

    Args:
        processor: An image processor of transformers, or an evaluation transform: torchvision's
            ``weights.transforms()``, timm's ``create_transform(…)``, a ``Compose`` of resize, centre crop, conversion
            and normalisation.
        channels: That the model takes.

    Raises:
        ModelError: it does something that cannot be said; it is named.
    """
    if hasattr(processor, "val_transforms"):  # transformers' wrapper of timm's models
        processor = processor.val_transforms
    if hasattr(processor, "image_processor_type") or hasattr(processor, "image_mean"):
        pipeline, theirs = _of_processor(processor, channels), _processor_call(processor)
    elif hasattr(processor, "transforms") or hasattr(processor, "resize_size"):
        pipeline, theirs = _of_transform(processor, channels), _transform_call(processor)
    else:
        raise ModelError(
            f"expected an image processor of transformers, or a transform of torchvision or timm, got "
            f"{type(processor).__name__} (describe it as image_shape, mean and std)"
        )
    _check(pipeline, theirs, type(processor).__name__)
    return pipeline


def _check(pipeline: Pipeline, theirs: Transform, name: str) -> None:
    """Compare with the library's own on pictures of odd sizes."""
    for image in _pictures(pipeline.preprocessing.shape):
        ours = pipeline(image)
        try:
            expected = theirs(image)
        except Exception as error:  # the library's code may raise anything
            raise ModelError(f"{name} fails on a picture of {image.size}: {type(error).__name__}: {error}") from error
        if expected.shape != ours.shape or not (expected - ours).abs().max() <= TOLERANCE:
            got = f"pixels of shape {tuple(expected.shape)}, not {tuple(ours.shape)}"
            if expected.shape == ours.shape:
                got = f"pixels that differ by {float((expected - ours).abs().max()):.3g}"
            raise ModelError(
                f"{name} does more to a picture than resize, crop and normalise it, which is all that can be said "
                f"here: after {pipeline.preprocessing.resize} to {pipeline.preprocessing.size} and a crop of "
                f"{pipeline.preprocessing.shape[1:]} its own code gives {got} (wrap the rest into the model, and "
                "describe what comes before as image_shape, mean and std)"
            )


def _pictures(shape: tuple[int, int, int]) -> Iterator[Image.Image]:
    channels, height, width = shape
    generator = np.random.default_rng(0)
    smaller = (max(1, height - 1), max(1, width - 3))  # by an odd number: what is added to it has two halves
    for sides in ((height * 3 // 2 + 7, width * 5 // 2 + 4), (height * 2 + 5, width * 2 // 3 + 3), smaller):
        coarse = generator.integers(0, 256, (*sides, channels), dtype=np.uint8)
        yield Image.fromarray(coarse if channels == 3 else coarse[..., 0])


def _transform_call(transform: Any) -> Transform:
    def call(image: Image.Image) -> Tensor:
        made: Tensor = transform(image)
        return made.float()

    return call


def _processor_call(processor: Any) -> Transform:
    def call(image: Image.Image) -> Tensor:
        made: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return made.float()

    return call


def _of_transform(transform: Any, channels: int) -> Pipeline:
    """Of torchvision's presets and of a ``Compose``."""
    if not hasattr(transform, "transforms"):
        plain = Preprocessing((channels, *_pair(transform.crop_size)))
        plain = _resized(_side(transform.resize_size), transform.interpolation, plain)
        return Pipeline(plain, tuple(transform.mean), tuple(transform.std))
    size: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mean, std = (0.0,) * channels, (1.0,) * channels
    interpolation: object = "bilinear"
    for step in transform.transforms:
        name = type(step).__name__
        if name == "Resize" and crop is None and size is None and getattr(step, "max_size", None) is None:
            size, interpolation = _side(step.size), step.interpolation
        elif name == "CenterCrop" and crop is None:
            crop = _pair(step.size)
        elif name == "Normalize":
            mean, std = (tuple(map(float, values)) for values in (step.mean, step.std))
        elif name not in SILENT_STEPS:
            raise ModelError(
                f"{type(transform).__name__} has a step that cannot be said here: {step!r} (what can: one Resize, then "
                "one CenterCrop, conversion to a tensor, Normalize)"
            )
    out = crop or (size if isinstance(size, tuple) else None)
    if out is None:
        raise ModelError(f"expected a resize to (h, w) or a centre crop, got images of any size from {transform!r}")
    return Pipeline(_resized(size, interpolation, Preprocessing((channels, *out))), mean, std)


def _resized(size: int | tuple[int, int] | None, interpolation: object, plain: Preprocessing) -> Preprocessing:
    """With a resize to the shorter side or both, or none, as a library does it."""
    kind = Resize.NONE if size is None else Resize.SHORTEST if isinstance(size, int) else Resize.EXACT
    sides = plain.shape[1:] if size is None else _pair(size)
    return replace(
        plain,
        resize=kind,
        size=sides,
        interpolation=_interpolation(interpolation),
        transparency=Transparency.IGNORED,
    )


def _interpolation(given: object) -> Interpolation:
    """Of torchvision's and Pillow's enumerations, and Pillow's numbers."""
    try:
        name = Image.Resampling(given).name if isinstance(given, int) else str(getattr(given, "value", given))
        return Interpolation(name.lower())
    except ValueError:
        raise ModelError(f"expected an interpolation of {', '.join(Interpolation)}, got {given!r}") from None


def _side(size: Any) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    return int(size[0]) if len(size) == 1 else (int(size[0]), int(size[1]))


def _pair(size: Any) -> tuple[int, int]:
    side = _side(size)
    return (side, side) if isinstance(side, int) else side


def _of_processor(processor: Any, channels: int) -> Pipeline:
    """Of an image processor of transformers."""

    def said(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    size, crop = _asked_size(processor, said)
    if crop is None:
        raise ModelError(f"{type(processor).__name__} gives images of any size: expected height and width, or a crop")
    interpolation = said("resample", Image.Resampling.BILINEAR)
    made = _resized(size, interpolation, Preprocessing((channels, *crop)))
    resampler = Resampler.TORCHVISION if said("backend", "pil") == "torchvision" else Resampler.PIL
    if resampler is Resampler.TORCHVISION and made.interpolation not in BY_TORCHVISION:
        raise ModelError(
            f"{type(processor).__name__} resizes by torchvision, which has {', '.join(BY_TORCHVISION)}, got resample="
            f"{interpolation!r}, which is {made.interpolation} (correct its preprocessor_config.json)"
        )
    may_add = made.resize is Resize.NONE or any(have < want for have, want in zip(made.size, crop, strict=True))
    pixel_scale = round(255.0 * said("rescale_factor", 1 / 255), 12) if said("do_rescale", False) else 255.0
    offset = -1.0 if said("rescale_offset", False) and said("do_rescale", False) else 0.0
    normalises = bool(said("do_normalize", False))
    mean = _per_channel("image_mean", said("image_mean", 0.0) if normalises else 0.0, channels)
    std = _per_channel("image_std", said("image_std", 1.0) if normalises else 1.0, channels)
    twice = std if said("include_top", False) else (1.0,) * channels  # EfficientNet's divides by std once more
    return Pipeline(
        replace(
            made,
            resampler=resampler,
            odd_crop=OddCrop.DOWN if may_add and resampler is Resampler.PIL else OddCrop.FLOOR,
            transparency=Transparency.WHITE if said("do_convert_rgb", False) else Transparency.IGNORED,
        ),
        tuple((value - offset) / pixel_scale for value in mean),
        tuple(value * again / pixel_scale for value, again in zip(std, twice, strict=True)),
        bool(said("do_flip_channel_order", False)),
    )


def _asked_size(
    processor: Any, said: Callable[..., Any]
) -> tuple[int | tuple[int, int] | None, tuple[int, int] | None]:
    """(what is resized to, what is cropped to)."""
    size: dict[str, int] = dict(said("size", {}))
    if said("do_resize", True) and (odd := {key: side for key, side in size.items() if side and key not in SIDES}):
        raise ModelError(
            f"{type(processor).__name__} resizes to {odd}, which cannot be said here (what can: {', '.join(SIDES)})"
        )
    both = (size["height"], size["width"]) if size.get("height") and size.get("width") else None
    resized: int | tuple[int, int] | None = size.get("shortest_edge") or both
    if not said("do_resize", True):
        resized = None
    wanted = dict(said("crop_size", {})) if said("do_center_crop", False) else {}
    crop = (wanted["height"], wanted["width"]) if {"height", "width"} <= wanted.keys() else None
    if resized is None or not isinstance(share := said("crop_pct", 0.0), float):
        share = 0.0
    name = type(processor).__name__
    if name.startswith("ConvNext") and isinstance(resized, int):
        side, share = resized, share or 224 / 256
        resized, crop = (int(side / share), (side, side)) if side < 384 else ((side, side), (side, side))
    elif name.startswith("Levit") and isinstance(resized, int):
        resized = int(256 / 224 * resized)
    elif name.startswith("PoolFormer") and share and resized is not None:
        resized = int((resized if isinstance(resized, int) else resized[0]) / share)
    return resized, crop or (resized if isinstance(resized, tuple) else None)


def _per_channel(name: str, values: float | Sequence[float], channels: int) -> tuple[float, ...]:
    given = (values,) if isinstance(values, int | float) else tuple(values)
    if len(given) not in (1, channels):
        raise ModelError(f"expected {name} of one number or {channels}, one per channel, got {given}")
    return tuple(map(float, given if len(given) == channels else given * channels))
