"""What is to become a classifier: a specification and a network, from what is asked for, saved, told by a library."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tmm_engine.index.errors import ModelError
from tmm_engine.index.models.architectures import (
    READY_MODULE,
    ModelSpec,
    build_model,
    drop_missing_auxiliaries,
    fit_spec,
    max_pool_of,
    own_copy,
    run_once,
)
from tmm_engine.index.models.checkpoints import Fitted, apply_state_dict, fit_names, load_checkpoint, read_metadata
from tmm_engine.index.models.libraries import (
    HF,
    TIMM,
    LibraryModel,
    hf_described,
    is_library,
    module_described,
    names_of_module,
    timm_described,
)
from tmm_engine.index.models.outputs import logits_of
from tmm_engine.index.models.pipelines import Pipeline, pipeline_of
from tmm_engine.index.models.torchvision_weights import torchvision_described, torchvision_weights, with_own_input
from tmm_engine.index.types import ImageShape

METADATA_KEY = "tmm_engine"
DRAFT_CLASSES = 1000  # torchvision's own default, until the weights tell


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """What a caller says of a model; None where something else tells. See `Classifier.from_architecture`."""

    image_shape: Sequence[int] | None = None
    processor: object = None
    num_classes: int | None = None
    small_stem: bool | None = None
    max_pool: bool | None = None
    head: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """What a classifier is made of.

    Attributes:
        spec: Without the number of classes and the head, if nothing told.
        network: Ours.
        class_names: In label order, where they are known.
        notes: What was guessed or left out, in words.
        max_pool_assumed: The weights do not tell whether there is a max-pool after the stem.
    """

    spec: ModelSpec
    network: nn.Module
    class_names: Sequence[str] | None = None
    notes: tuple[str, ...] = ()
    max_pool_assumed: bool = False


def draft(architecture: str, weights: Path | None, asked: Asked, *, seed: int | None, ema: bool) -> Draft:
    """A network with its weights; see `Classifier.from_architecture`."""
    if ema and weights is None:
        raise ModelError(
            f"expected weights to take the averaged ones of, got none for {architecture!r} (leave out ema)"
        )
    saved, names = (None, None) if weights is None or weights.is_dir() else read_saved(weights)
    told = None if saved and saved.architecture == architecture else _told(architecture, weights, asked, seed)
    if told is not None:
        architecture, weights, names = told.architecture, told.weights or weights, names or told.class_names
    spec, notes = draft_spec(architecture, asked, saved, told)
    if told is not None and told.network is not None:
        return Draft(spec, told.network, names, notes)
    if spec.is_user_code:
        if seed is not None or asked.small_stem is not None:
            raise ModelError(f"expected neither seed nor small_stem with {architecture!r} (let the factory apply them)")
        template = own_copy(build_model(spec))
        run_once(template, spec.image_shape)
        return Draft(spec, template, names) if weights is None else _with_weights(spec, template, weights, names, ema)
    if seed is not None and weights is None and asked.num_classes is not None:
        return Draft(spec, build_model(spec, seed=seed), names, notes)
    if weights is None or seed is not None:
        raise ModelError(
            f"expected for {architecture!r} either weights, or a seed and num_classes for random weights, "
            f"got weights={weights}, seed={seed}, num_classes={asked.num_classes}"
        )
    template = build_model(spec)
    fitted = _fitted(weights, template, ema=ema)
    spec = fit_spec(spec, fitted.tensors, num_classes=asked.num_classes, small_stem=asked.small_stem, template=template)
    network = build_model(spec)
    drop_missing_auxiliaries(network, fitted.tensors)
    apply_state_dict(network, fitted.tensors)
    notes += fitted.notes
    assumed = spec.small_stem and saved is None and asked.max_pool is None and max_pool_of(network) is not None
    if assumed:
        notes += (
            "the first convolution is 3×3, as in ResNets for small images: the max-pool after it is taken to be there, "
            "which the weights do not tell (`max_pool=False` leaves it out, `max_pool=True` says that it is right)",
        )
    return Draft(spec, network, names, notes, assumed)


def _with_weights(spec: ModelSpec, network: nn.Module, weights: Path, names: Sequence[str] | None, ema: bool) -> Draft:
    fitted = _fitted(weights, network, ema=ema)
    apply_state_dict(network, fitted.tensors)
    return Draft(spec, network, names, fitted.notes)


def _fitted(weights: Path, network: nn.Module, *, ema: bool) -> Fitted:
    """A checkpoint under the network's names."""
    checkpoint = load_checkpoint(weights, ema=ema)
    fitted = fit_names(checkpoint.tensors, network, ema=ema)
    if ema and not (checkpoint.averaged or fitted.averaged):
        raise ModelError(
            f"expected averaged (EMA) weights in {weights}, found none that are known as such (leave out ema)"
        )
    return replace(fitted, notes=checkpoint.notes + fitted.notes)


def _told(architecture: str, weights: Path | None, asked: Asked, seed: int | None) -> LibraryModel | None:
    """What timm, transformers or torchvision say of the model; None where nobody says anything."""
    shape = None if asked.image_shape is None else _shape(asked.image_shape)
    if architecture.startswith(TIMM):
        return timm_described(architecture.removeprefix(TIMM), weights, shape)
    if architecture.startswith(HF):
        told = hf_described(Path(architecture.removeprefix(HF)), with_weights=weights is None and seed is None)
        if shape not in (None, told.pipeline.preprocessing.shape):
            raise ModelError(
                f"expected images of {told.pipeline.preprocessing.shape}, as the folder's processor makes them, got "
                f"image_shape={shape} (leave it out)"
            )
        return told
    return None if weights is None else torchvision_described(architecture, weights, shape)


def draft_of_module(network: nn.Module, asked: Asked) -> Draft:
    """Of a user's module, ours already: as a library's model where it is one that the library can build again."""
    if asked.image_shape is not None:
        run_once(network, _shape(asked.image_shape))
    told = module_described(network, asked.processor, needed=asked.image_shape is None)
    names = names_of_module(network)
    if told is None:
        return Draft(draft_spec(READY_MODULE, asked)[0], network, names)
    alone = replace(asked, processor=None)
    spec, notes = draft_spec(told.architecture, alone if asked.image_shape is None else asked, None, told)
    if refusal := _refusal(spec, network):
        spec = replace(spec, architecture=READY_MODULE, config="")
        notes += (
            f"{told.architecture} as the library builds it computes something else than this model ({refusal}): an "
            "index stores it as code of yours, so that the model is needed again to open it (`model=…`)",
        )
    return Draft(spec, network, names, notes)


def _refusal(spec: ModelSpec, network: nn.Module) -> str | None:
    """Why what the library makes of the specification does not do for the model; None if both compute the same."""
    images = torch.rand(1, *spec.image_shape, generator=torch.Generator().manual_seed(0))
    try:
        again = build_model(spec)
        again.load_state_dict(network.state_dict())
        with torch.no_grad():
            made, given = (logits_of(each.float().cpu().eval()(images)) for each in (again, copy.deepcopy(network)))
    except Exception as error:  # the user's or a library's code may raise anything
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if made.shape != given.shape:
        return f"logits of {tuple(made.shape)}, not {tuple(given.shape)}"
    return None if torch.equal(made, given) else f"logits differ by {float((made - given).abs().max()):.3g}"


def brings_shape(architecture: str, weights: Path | None) -> bool:
    """Whether the model says itself what is done to pictures, so that no image shape has to be given."""
    if is_library(architecture):
        return True
    if weights is None or not weights.is_file():
        return False
    saved, _ = read_saved(weights)
    return saved.preprocessing is not None if saved else torchvision_weights(architecture, weights) is not None


def saved_shape(weights: Path | None) -> ImageShape | None:
    """(c, h, w) that `Classifier.save` wrote beside the weights, if it was that."""
    saved, _ = (None, None) if weights is None or not weights.is_file() else read_saved(weights)
    return None if saved is None else saved.image_shape


def draft_spec(
    architecture: str, asked: Asked, saved: ModelSpec | None = None, told: LibraryModel | None = None
) -> tuple[ModelSpec, tuple[str, ...]]:
    """(what is asked for, else what was saved, else what a library says, else a default; what was guessed of it).

    Weights may tell the rest.
    """
    pipeline, notes = (told.pipeline, told.notes) if told else (None, ())
    if asked.processor is not None:
        pipeline = pipeline_of(asked.processor, channels=asked.image_shape[0] if asked.image_shape else 3)
        pipeline, notes = with_own_input(architecture, pipeline)
    base = _base(architecture, asked, saved if asked.processor is None else None, pipeline)
    if told is not None:
        base = replace(base, num_classes=told.num_classes, config=told.config)
    if is_library(architecture) and (asked.small_stem is not None or asked.max_pool is not None):
        raise ModelError(f"expected neither small_stem nor max_pool with {architecture!r} (it has a stem of its own)")
    for name, values, most in (("mean", asked.mean, 1.0), ("std", asked.std, 10.0)):
        if values is not None and max(values, default=0.0) > most:
            raise ModelError(
                f"expected {name} of pixels in [0, 1], got {tuple(values)}, as of pixels from 0 to 255 (divide mean "
                "and std by 255)"
            )
    spec = replace(
        base,
        num_classes=base.num_classes if asked.num_classes is None else asked.num_classes,
        small_stem=base.small_stem if asked.small_stem is None else asked.small_stem,
        max_pool=base.max_pool if asked.max_pool is None else asked.max_pool,
        mean=base.mean if asked.mean is None else tuple(map(float, asked.mean)),
        std=base.std if asked.std is None else tuple(map(float, asked.std)),
        head=base.head if asked.head is None else asked.head,
    )
    return spec, notes


def _base(architecture: str, asked: Asked, saved: ModelSpec | None, pipeline: Pipeline | None) -> ModelSpec:
    """Without what the caller says of anything but shape and processor."""
    shape = None if asked.image_shape is None else _shape(asked.image_shape)
    brought = saved.preprocessing if saved else pipeline.preprocessing if pipeline else None
    if brought is not None and shape not in (None, brought.shape):
        raise ModelError(
            f"expected images of {brought.shape}, as the preprocessing makes them, got image_shape={shape}"
        )
    shape = shape or (brought.shape if brought else saved.image_shape if saved else None)
    if shape is None:
        raise ModelError(f"expected the shape of images for {architecture!r} as `image_shape=(c, h, w)`, got none")
    channels, height, width = shape
    if saved is not None:
        # mean and std are checked against the channels only once the caller's have taken their place
        return replace(saved, architecture=architecture, in_channels=channels, image_size=(height, width))
    plain = ModelSpec(
        architecture, DRAFT_CLASSES, channels, False, (height, width), (0.0,) * channels, (1.0,) * channels
    )
    if pipeline is None:
        return plain
    return replace(plain, mean=pipeline.mean, std=pipeline.std, preprocessing=pipeline.preprocessing, bgr=pipeline.bgr)


def _shape(given: Sequence[int]) -> tuple[int, int, int]:
    if len(given) != 3:
        raise ModelError(f"expected an image shape (c, h, w), got {tuple(given)}")
    channels, height, width = given
    return channels, height, width


def read_saved(path: Path) -> tuple[ModelSpec, tuple[str, ...]] | tuple[None, None]:
    """What `Classifier.save` wrote beside the weights, if it was that."""
    metadata = read_metadata(path)
    if METADATA_KEY not in metadata:
        return None, None
    try:
        saved = json.loads(metadata[METADATA_KEY])
    except json.JSONDecodeError as error:
        raise ModelError(f"expected JSON in the metadata of {path}, got {error} (save the classifier again)") from error
    names = saved.get("class_names") if isinstance(saved, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"expected a list of class names in the metadata of {path}, got {names!r}")
    return ModelSpec.from_json(saved.get("spec")), tuple(names)
