"""From a description of a model to an ``nn.Module``: torchvision's names, our small ViT, the user's factories."""

import copy
import importlib
import math
import operator
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from beartype.door import is_bearable
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tmm_engine.index.errors import ModelError, nearest
from tmm_engine.index.models.libraries import build_library_model, is_library
from tmm_engine.index.models.preprocessing import Preprocessing
from tmm_engine.index.types import ImageShape

READY_MODULE = "module"
VIT_TINY = "vit_tiny_32"
AUXILIARIES = frozenset(("aux1", "aux2", "AuxLogits"))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All that is needed, beside the weights, to build a classifier again.

    Attributes:
        architecture: A torchvision classification name, ``vit_tiny_32``, ``timm:NAME``, ``hf:TYPE`` for a model of
            transformers, ``package.module:factory``, or ``module`` for a ready ``nn.Module`` that was given in Python.
        num_classes: C, at least 2.
        in_channels: Channels of an image.
        small_stem: The first convolution is 3×3, stride 1, padding 1 (small images); a max-pool after it is kept unless
            `max_pool` says otherwise.
        image_size: (h, w).
        mean: Per channel, in [0, 1] pixel units; subtracted inside φ.
        std: Per channel, positive; divided by inside φ.
        head: Dotted name of the final Linear layer, empty until it is found.
        preprocessing: How pictures get the image size; None: as `Preprocessing` does by default, which becomes None.
        bgr: The network takes blue first.
        config: Of a model of transformers, and what one of timm is built with beside its name, as JSON text.
        max_pool: The max-pool after the first convolution is there, where the architecture has one.

    Raises:
        ModelError: A value out of its range, mean or std not one per channel, or preprocessing to another shape.
    """

    architecture: str
    num_classes: int
    in_channels: int
    small_stem: bool
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: str = ""
    preprocessing: Preprocessing | None = None
    bgr: bool = False
    config: str = ""
    max_pool: bool = True

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ModelError(
                f"expected at least 2 classes, got {self.num_classes} (give a model with one output the logits 0 and z)"
            )
        if min(self.in_channels, *self.image_size) < 1:
            raise ModelError(f"expected a positive image shape (c, h, w), got {self.image_shape}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.in_channels or not all(map(math.isfinite, values)):
                raise ModelError(
                    f"expected {name} to be {self.in_channels} finite numbers, one per channel, got {values}"
                )
        if min(self.std) <= 0:
            raise ModelError(f"expected std to be positive, got {self.std}")
        if self.preprocessing is not None and self.preprocessing.shape != self.image_shape:
            raise ModelError(f"expected preprocessing to {self.image_shape}, got one to {self.preprocessing.shape}")
        if self.preprocessing is not None and self.preprocessing == Preprocessing(self.image_shape):
            object.__setattr__(self, "preprocessing", None)

    @property
    def image_shape(self) -> ImageShape:
        """(c, h, w)."""
        return (self.in_channels, *self.image_size)

    @property
    def is_user_code(self) -> bool:
        """Whether the model comes from code outside torchvision, timm, transformers and this project."""
        return self.architecture == READY_MODULE or (":" in self.architecture and not is_library(self.architecture))

    def to_json(self) -> dict[str, Any]:
        """The attributes as JSON values; those that came later than others are left out where they say nothing."""
        silent = {field.name for field in fields(self) if getattr(self, field.name) == field.default}
        content = {name: value for name, value in asdict(self).items() if name not in LATER & silent}
        return content if self.preprocessing is None else content | {"preprocessing": self.preprocessing.to_json()}

    @classmethod
    def from_json(cls, value: object) -> "ModelSpec":
        """The inverse of `to_json`, after a trip through JSON or not.

        Raises:
            ModelError: Not an object with exactly these attributes, or one of another type or out of its range.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(value, dict) or not set(names) - LATER <= value.keys() <= set(names):
            got = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise ModelError(f"expected a model specification with {sorted(set(names) - LATER)}, got {got}")
        given: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
        if given.get("preprocessing") is not None:
            given["preprocessing"] = Preprocessing.from_json(given["preprocessing"])
        for field in fields(cls):
            if field.name in given and not is_bearable(given[field.name], field.type):  # type: ignore[arg-type]
                raise ModelError(
                    f"expected {field.name!r} of a model specification to be {field.type}, got {given[field.name]!r}"
                )
        return cls(**given)


LATER = frozenset(("preprocessing", "bgr", "config", "max_pool"))
"""Attributes of a specification that those of before do not have."""


class Normalise(nn.Module):
    """The first layer of φ: (x − mean) / std per channel, so that everything outside φ is in RGB pixels of [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, bgr: bool = False) -> None:
        super().__init__()
        self.bgr = bgr
        # Not persistent: a checkpoint holds the names of the user's model, and these are in the specification.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Normalised images, same shape and dtype."""
        normalised = (images - self.mean) / self.std
        return normalised.flip(1) if self.bgr else normalised


def build_model(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """The model that ``spec`` describes; the caller owns it.

    All but the user's code get random weights, drawn with ``seed`` without touching the global generator. A factory
    is imported, with the current folder importable as under ``python -m``, and called without arguments.

    Raises:
        ModelError: An unknown name, a specification that the architecture cannot follow, or a factory that fails.
    """
    if spec.architecture == READY_MODULE:
        raise ModelError("expected the model itself, which is code of yours: pass the nn.Module or its factory again")
    if spec.is_user_code:
        return _call_factory(spec.architecture)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", "The default weight initialization of", FutureWarning)
        try:
            if is_library(spec.architecture):
                return build_library_model(spec)
            model = _with_stem(_torchvision_model(spec), spec)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"{spec.architecture!r} cannot be built for images of {spec.image_shape}: {error}"
            ) from error
    return model


def own_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a user's model without the wrappers that PyTorch puts around one.

    Raises:
        ModelError: It cannot be copied.
    """
    inner: Any = getattr(model, "_orig_mod", model)  # torch.compile
    if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = getattr(inner.module, "_orig_mod", inner.module)
    if isinstance(inner, torch.jit.ScriptModule):
        raise ModelError(
            "expected a model that runs in Python, got TorchScript, which cannot be split into backbone and head (give "
            "the module that was scripted or traced, with the state dict of this one as its weights)"
        )
    try:
        copied: nn.Module = copy.deepcopy(inner)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"expected a model that copy.deepcopy can copy, got: {error}") from error
    return copied


def run_once(network: nn.Module, image_shape: ImageShape) -> None:
    """Give a lazy network its parameters, by showing it one image; others stay as they are."""
    if not any(is_lazy(value) for value in (*network.parameters(), *network.buffers())):
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            network.eval()(torch.zeros(2, *image_shape))
        except Exception as error:  # the user's code may raise anything
            raise ModelError(
                f"expected a lazy model that can be run once on images of {image_shape}, got {type(error).__name__}: "
                f"{error} (run it once yourself)"
            ) from error


def drop_missing_auxiliaries(network: nn.Module, names: Iterable[str]) -> None:
    """Take torchvision's auxiliary heads, which only training uses, off a network whose weights have none."""
    tops = {name.partition(".")[0] for name in names}
    for name in AUXILIARIES - tops:
        if isinstance(getattr(network, name, None), nn.Module):
            setattr(network, name, None)
            network.aux_logits = False  # type: ignore[assignment]


def fit_spec(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    *,
    num_classes: int | None = None,
    small_stem: bool | None = None,
    template: nn.Module | None = None,
) -> ModelSpec:
    """``spec`` of an architecture with what a checkpoint's shapes tell.

    Args:
        spec: What is known; stays where the checkpoint lacks the tensor that tells.
        tensors: The checkpoint.
        template: What `build_model` makes of `spec`, if it is there already.
        num_classes: Wins over the checkpoint.
        small_stem: Wins over the checkpoint.

    Raises:
        ModelError: As `build_model`, or the checkpoint is for another number of channels.
    """
    template = build_model(spec) if template is None else template
    linears = [name for name, module in template.named_modules() if isinstance(module, nn.Linear)]
    if num_classes is None and linears and f"{linears[-1]}.weight" in tensors:
        num_classes = len(tensors[f"{linears[-1]}.weight"])
    stem, conv = _first_conv(template)
    weight = tensors.get(f"{stem}.weight")
    if weight is not None and weight.ndim == 4:
        if weight.shape[1] != spec.in_channels:
            raise ModelError(
                f"expected images of {weight.shape[1]} channels, as the weights do, got image shape {spec.image_shape} "
                f"({channels_hint(weight.shape[1])}, or choose other weights)"
            )
        if small_stem is None and not is_library(spec.architecture):
            small_stem = spec.small_stem or (weight.shape[2:] == (3, 3) and conv.kernel_size != (3, 3))
    return replace(
        spec,
        num_classes=spec.num_classes if num_classes is None else num_classes,
        small_stem=spec.small_stem if small_stem is None else small_stem,
    )


def channels_hint(channels: int) -> str:
    """How images are converted to what a model takes."""
    if channels not in (1, 3):
        return "images have 1 or 3 channels here: wrap the model"
    shape = "`image_shape=(1, h, w)`" if channels == 1 else "`image_shape=(3, h, w)`"
    return f"convert the images with {shape}"


def _torchvision_model(spec: ModelSpec) -> nn.Module:
    import torchvision.models as zoo

    names = [VIT_TINY, *zoo.list_models(module=zoo)]
    if spec.architecture not in names:
        raise ModelError(
            f"expected a torchvision classification model, {VIT_TINY!r} or 'package.module:factory', "
            f"got {spec.architecture!r}{nearest(spec.architecture, names)}"
        )
    options: dict[str, Any] = {"num_classes": spec.num_classes}
    if spec.architecture.startswith("vit_"):
        height, width = spec.image_size
        if height != width or spec.small_stem:
            got = "small_stem" if spec.small_stem else f"{height}×{width}"
            raise ModelError(f"expected square images and no small_stem for {spec.architecture!r}, got {got}")
        options["image_size"] = height
    if spec.architecture == VIT_TINY:
        options |= {"patch_size": 4, "num_layers": 6, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 384}
        return zoo.VisionTransformer(**options)
    return zoo.get_model(spec.architecture, weights=None, **options)


def _first_conv(model: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def _with_stem(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """``model`` with its first convolution replaced where channels or stem ask for another, and without a max-pool."""
    if not spec.max_pool:
        pool = max_pool_of(model)
        if pool is None:
            raise ModelError(f"expected an architecture with a max-pool to leave out, got {spec.architecture!r}")
        model.set_submodule(pool, nn.Identity(), strict=True)
    name, conv = _first_conv(model)
    if conv.in_channels == spec.in_channels and not spec.small_stem:
        return model
    small = {"kernel_size": 3, "stride": 1, "padding": 1}
    same = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}
    geometry: dict[str, Any] = small if spec.small_stem else same
    model.set_submodule(
        name, nn.Conv2d(spec.in_channels, conv.out_channels, **geometry, bias=conv.bias is not None), strict=True
    )
    return model


def max_pool_of(model: nn.Module) -> str | None:
    """The name of the first max-pool among the model's own children, as ResNets have one after the stem."""
    pools = (name for name, module in model.named_children() if isinstance(module, nn.MaxPool2d))
    return next(pools, None)


def _call_factory(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        model = operator.attrgetter(attribute)(importlib.import_module(module_name))()
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            f"expected {name!r} to name a function without arguments that returns a model (module:function, importable "
            f"from {folder}), got {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected {name!r} to return an nn.Module, got {type(model).__name__}")
    return model
