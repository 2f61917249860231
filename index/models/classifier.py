"""The user's classifier as the index needs it: f = head ∘ φ, split, checked, frozen, with a fingerprint."""

import copy
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError, ModelError, nearest
from tmm_engine.index.files import write_file
from tmm_engine.index.models.architectures import (
    ModelSpec,
    Normalise,
    build_model,
    channels_hint,
    drop_missing_auxiliaries,
    own_copy,
    run_once,
)
from tmm_engine.index.models.checkpoints import apply_state_dict, load_state_dict
from tmm_engine.index.models.drafting import METADATA_KEY, Asked, draft, draft_of_module, read_saved
from tmm_engine.index.models.fingerprints import fingerprint, former_fingerprint
from tmm_engine.index.models.outputs import take_logits
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.types import ImageShape

LISTED = 10
DRIFT = 1e-2  # of the largest logit: what rounding, in TF32 too, may change from one pass to another
TOLERANCE = 1e-4  # of the largest logit; the two ways to compute it normally agree bit for bit


@dataclass(frozen=True, eq=False)
class Classifier:
    """φ and head of the user's model. Immutable: `to` and `double` return new ones.

    Attributes:
        spec: How to build the model again.
        class_names: One per class, in order.
        backbone: (n, c, h, w) in [0, 1] -> (n, d): `Normalise`, then φ (its child ``network``); in eval mode, no
            parameter requires a gradient.
        head: d -> C, as frozen as the backbone; it may have no bias.
        fingerprint: Hexadecimal SHA-256 over float32 weights, architecture, preprocessing and the head's name. The
            same after save and load, on every device and in every precision.
        former_fingerprint: By the rule of before, where that is another: of the user's code.
        notes: What was guessed or left out when it was made, in words.
        max_pool_assumed: Nothing told whether the small stem is followed by a max-pool; it was taken to be there.
        names_given: The class names were given by the user, so they are names even if they are numbers.
    """

    spec: ModelSpec
    class_names: tuple[str, ...]
    backbone: nn.Sequential
    head: nn.Linear
    fingerprint: str
    former_fingerprint: str = ""
    notes: tuple[str, ...] = ()
    max_pool_assumed: bool = False
    names_given: bool = False

    @classmethod
    @checked
    def from_module(
        cls,
        model: nn.Module,
        *,
        image_shape: Sequence[int] | None = None,
        processor: object = None,
        head: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> "Classifier":
        """From a model that maps (n, c, h, w) to logits (n, C). The model is copied and stays as it is.

        Models of timm and transformers bring what is done to a picture before, unless `image_shape` is given without a
        processor; an index of theirs opens without the model.

        Args:
            model: Any module whose logits a Linear layer makes; DataParallel and compiled wrappers are taken off. It
                may return a structure with one part that can be the logits, or one called ``logits``.
            image_shape: (c, h, w).
            processor: What makes a picture the model's input: an image processor of transformers, torchvision's
                ``weights.transforms()``, or a transform of timm's. It says image shape, mean and std.
            head: Dotted name of that layer; by default the last one that proves to be it.
            mean: Per channel, 0 by default; for a model that expects normalised images.
            std: Per channel, 1 by default.
            class_names: One per class; by default '0', '1', ….

        Raises:
            ModelError: The model cannot be copied, run at this shape, or split into backbone and Linear head.
        """
        network = own_copy(model)
        asked = Asked(image_shape=image_shape, processor=processor, head=head, mean=mean, std=std)
        made = draft_of_module(network, asked)
        classifier = _assemble(network, made.spec, class_names, told_names=made.class_names, notes=made.notes)
        return replace(classifier, names_given=class_names is not None)

    @classmethod
    @checked
    def from_architecture(
        cls,
        architecture: str,
        *,
        image_shape: Sequence[int] | None = None,
        processor: object = None,
        weights: str | Path | None = None,
        ema: bool = False,
        seed: int | None = None,
        num_classes: int | None = None,
        small_stem: bool | None = None,
        max_pool: bool | None = None,
        head: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> "Classifier":
        """From the name of an architecture and a checkpoint.

        What is not given comes from the checkpoint: from what `save` wrote beside the weights, else from their shapes.

        Args:
            architecture: A torchvision classification model, ``vit_tiny_32``, ``timm:NAME``, ``hf:FOLDER`` of a model
                of transformers with its image processor, or ``package.module:factory``.
            image_shape: (c, h, w). A library's model brings its own, and what is done to pictures before it; so does a
                checkpoint that is torchvision's own.
            processor: As in `from_module`.
            weights: A checkpoint; for timm also a folder that it saved. A factory may do without and return a model
                that has its weights already, and the folder of transformers holds them.
            ema: Of a checkpoint with raw and averaged weights, take the averaged ones.
            seed: Random weights instead, for tests and demonstrations; needs ``num_classes``. Not for a factory.
            num_classes: How many classes (C); for a factory a check only.
            small_stem: First convolution 3×3 with stride 1. Not for a factory. Weights do not show a stride: say it
                for an architecture whose first convolution is 3×3 by itself, with another stride.
            max_pool: Whether there is a max-pool after it, which weights do not show either. Default: there is, and
                `notes` say so where the stem makes one doubt.
            head: As in `from_module`; so are the others.
            mean: Per channel.
            std: Per channel.
            class_names: One per class.

        Raises:
            ModelError: The name, the weights and the arguments do not go together, or as `from_module`.
        """
        made = draft(
            architecture,
            None if weights is None else Path(weights),
            Asked(
                image_shape=image_shape,
                processor=processor,
                num_classes=num_classes,
                small_stem=small_stem,
                max_pool=max_pool,
                head=head,
                mean=mean,
                std=std,
            ),
            seed=seed,
            ema=ema,
        )
        classifier = _assemble(
            made.network,
            made.spec,
            class_names,
            told_names=made.class_names,
            num_classes=num_classes,
            notes=made.notes,
        )
        return replace(classifier, max_pool_assumed=made.max_pool_assumed, names_given=class_names is not None)

    @checked
    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically: the user's tensor names, and beside them what `load` needs.

        Weights are float32. `from_architecture` takes the file as ``weights`` too.

        Raises:
            InputError: the path is a folder's, or cannot be written.
        """
        write_file(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes."""
        # Clones: safetensors refuses tensors that share memory.
        tensors = {name: tensor.detach().clone().cpu() for name, tensor in self._tensors().items()}
        tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        saved = json.dumps({"spec": self.spec.to_json(), "class_names": self.class_names})
        return safetensors.torch.save(tensors, metadata={METADATA_KEY: saved})

    @classmethod
    @checked
    def load(cls, path: str | Path, *, model: nn.Module | str | None = None) -> "Classifier":
        """Read what `save` wrote.

        Args:
            path: The safetensors file.
            model: For a classifier made from code of yours: that code again, as a module or ``package.module:factory``.
                It is never imported because a file names it.

        Raises:
            ModelError: A damaged file, one that `save` did not write, weights that do not fit, or the model is missing.
        """
        path = Path(path)
        spec, class_names = read_saved(path)
        if spec is None:
            raise ModelError(f"expected a file that Classifier.save wrote, got {path} (use from_architecture)")
        if isinstance(model, nn.Module):
            network = own_copy(model)
        elif model is not None:
            network = own_copy(build_model(replace(spec, architecture=model)))
        elif spec.is_user_code:
            raise ModelError(
                f"expected the model of {path} again, which is code of yours ({spec.architecture!r}): pass it as "
                "model=... or name its package.module:factory"
            )
        else:
            network = build_model(spec)
        state = load_state_dict(path)
        run_once(network, spec.image_shape)
        drop_missing_auxiliaries(network, state)
        apply_state_dict(network, state)
        return _assemble(network, spec, class_names)

    @checked
    def known_as(self, stored: str) -> "Classifier | None":
        """Under a stored fingerprint, if it is its own, by today's rule or by the one of before; else None."""
        if stored == self.fingerprint:
            return self
        return replace(self, fingerprint=stored) if stored == self.former_fingerprint else None

    @property
    def num_classes(self) -> int:
        """C, without the dummy class."""
        return self.head.out_features

    @property
    def feature_dim(self) -> int:
        """The length d of a feature."""
        return self.head.in_features

    @property
    def image_shape(self) -> ImageShape:
        """(c, h, w)."""
        return self.spec.image_shape

    @property
    def target(self) -> Target:
        """What pictures are brought to: the bare image shape where the usual way does."""
        return self.spec.preprocessing or self.image_shape

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def features(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """φ(x), differentiable with respect to the images.

        Args:
            images: Pixels in [0, 1], of this device and precision.

        Raises:
            InputError: Images of another shape.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise InputError(
                f"expected images of shape (n, {', '.join(map(str, self.image_shape))}), got {tuple(images.shape)} "
                "(resize or convert them)"
            )
        features: Tensor = self.backbone(images)
        return features

    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """head(φ), not normalised."""
        logits: Tensor = self.head(features)
        return logits

    @checked
    def to(self, device: torch.device | str) -> "Classifier":
        """A copy on ``device``.

        Raises:
            InputError: torch has no such device here.
        """
        backbone, head = copy.deepcopy((self.backbone, self.head))
        try:
            return replace(self, backbone=backbone.to(device), head=head.to(device))
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error

    def double(self) -> "Classifier":
        """A copy in float64."""
        backbone, head = copy.deepcopy((self.backbone, self.head))
        return replace(self, backbone=backbone.double(), head=head.double())

    def _tensors(self) -> dict[str, Tensor]:
        return _named_tensors(self.backbone.get_submodule("network"), self.head, self.spec.head)


def _assemble(
    network: nn.Module,
    draft: ModelSpec,
    class_names: Sequence[str] | None,
    *,
    told_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    notes: tuple[str, ...] = (),
) -> Classifier:
    """Split, check and freeze ``network``, which is ours from here on; every way to make a classifier ends here.

    Names that are told stand in for those of a caller, and are left out where they are of another number of classes.
    """
    network.float().eval().requires_grad_(False)
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    normalise = Normalise(draft.mean, draft.std, bgr=draft.bgr).to(device)
    probe = torch.rand(2, *draft.image_shape, generator=torch.Generator().manual_seed(0))
    probe[1] *= 0.25  # unlike the first, so that it shows where one image's logits depend on the other
    images = normalise(probe.to(device))
    logits = _forward(network, images)
    _require_own_logits(network, images, logits)
    if num_classes not in (None, logits.shape[1]):
        raise ModelError(f"expected {num_classes} classes, got a model of {logits.shape[1]} (correct num_classes)")
    spec = replace(draft, num_classes=logits.shape[1])
    if class_names is None and told_names is not None and len(told_names) != spec.num_classes:
        notes += (f"{len(told_names):,} known class names are left out: the model has {spec.num_classes:,} classes",)
        told_names = None
    known = class_names if class_names is not None else told_names
    names = tuple(map(str, range(spec.num_classes))) if known is None else tuple(map(str, known))
    if len(names) != spec.num_classes:
        raise ModelError(f"expected {spec.num_classes} class names, one per class, got {len(names)}")
    spec = replace(spec, head=_find_head(network, images, logits, draft.head))
    tensors = network.state_dict()
    identity, former = fingerprint(spec, network, tensors), former_fingerprint(spec, network, tensors)
    head = network.get_submodule(spec.head)
    assert isinstance(head, nn.Linear)
    network.set_submodule(spec.head, nn.Identity())
    backbone = nn.Sequential(OrderedDict(normalise=normalise, network=network)).eval()
    return Classifier(spec, names, backbone, head, identity, former, notes)


@torch.no_grad()
def _forward(network: nn.Module, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
    """The logits, or what is wrong with them; the network returns nothing else from here on."""
    try:
        logits = network(images)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            f"expected a model that takes images of shape {tuple(images.shape[1:])}, got in its forward pass "
            f"{type(error).__name__}: {error} ({_advice(network, images)})"
        ) from error
    if not isinstance(logits, Tensor):
        take_logits(network, logits, len(images))
        logits = network(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"expected logits of shape ({len(images)}, classes), got {got} (wrap the model)")
    if logits.dtype != images.dtype:
        raise ModelError(
            f"expected logits as {images.dtype}, like the images, got {logits.dtype}: the model converts by itself, as "
            "torch.autocast in its forward does (take that out: precision is chosen when searching)"
        )
    if not torch.isfinite(logits).all():
        raise ModelError("expected finite logits for images in [0, 1], got NaN or infinity (check weights and std)")
    return logits


def _require_own_logits(
    network: nn.Module, images: Float[Tensor, "n c h w"], logits: Float[Tensor, "n classes"]
) -> None:
    """Refuse a network whose logits of an image are others beside other images, or in another pass."""

    def difference(others: Float[Tensor, "m classes"]) -> float:
        return (others - logits[: len(others)]).abs().max().item()

    bound = DRIFT * max(1e-3, logits.abs().max().item())
    try:
        alone = difference(_forward(network, images[:1]))
    except ModelError as error:
        raise ModelError(f"expected a model that takes a single image as well as several, got: {error}") from error
    if alone <= bound:
        return
    if (again := difference(_forward(network, images))) > bound:
        raise ModelError(
            f"expected the same logits for the same images in every pass, got some that differ by {again:.3g} "
            "(dropout left on in its forward, other randomness, or a state that a pass changes)"
        )
    raise ModelError(
        f"expected logits of an image that do not depend on the others it is passed with, got some that differ by "
        f"{alone:.3g} (a batch norm with track_running_stats=False, or a mean over the batch in its forward)"
    )


def _advice(network: nn.Module, images: Float[Tensor, "n c h w"]) -> str:
    """What to try when a network cannot take images of a shape."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels != images.shape[1] and first.groups == 1:
        return f"its first convolution takes {first.in_channels} channels: {channels_hint(first.in_channels)}"
    return "check `image_shape=(c, h, w)`"


def _find_head(
    network: nn.Module, images: Float[Tensor, "n c h w"], logits: Float[Tensor, "n classes"], name: str
) -> str:
    """The dotted name of the Linear layer with head(φ(x)) = f(x): ``name``, or the last one."""
    named = network.named_modules(remove_duplicate=False)
    linears = [candidate for candidate, module in named if isinstance(module, nn.Linear)]
    if name and name not in linears:
        raise ModelError(
            f"expected a head among the Linear layers {', '.join(linears)}, got {name!r}{nearest(name, linears)}"
        )
    refusals = []
    for candidate in [name] if name else reversed(linears):
        refusal = _refusal(network, candidate, images, logits)
        if refusal is None:
            return candidate
        refusals.append(f"{candidate}: {refusal}")
    listed = "; ".join(refusals[:LISTED]) + ("; …" if len(refusals) > LISTED else "")
    raise ModelError(
        f"expected a model whose logits are a Linear layer of its (n, d) features, got {listed or 'no Linear layer'} "
        "(name the layer with `head=…`, or wrap the model to return the logits of its last Linear layer)"
    )


@torch.no_grad()
def _refusal(
    network: nn.Module, candidate: str, images: Float[Tensor, "n c h w"], logits: Float[Tensor, "n classes"]
) -> str | None:
    """Why the Linear layer of that name is not the head; None if it is."""
    head = network.get_submodule(candidate)
    assert isinstance(head, nn.Linear)
    if head.out_features != logits.shape[1]:
        return f"{head.out_features} outputs, not {logits.shape[1]}"
    network.set_submodule(candidate, nn.Identity())
    try:
        features = network(images)
    except Exception as error:  # a model that does more with its head than call it
        return f"without it the forward pass fails ({type(error).__name__}: {error})"
    finally:
        network.set_submodule(candidate, head)
    if not isinstance(features, Tensor) or features.shape != (len(images), head.in_features):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        return f"features of {got}, not {(len(images), head.in_features)}"
    difference = (head(features) - logits).abs().max().item()
    if difference > TOLERANCE * max(1e-3, logits.abs().max().item()):
        return f"its output differs from the model's by {difference:.3g} (something follows it, such as a softmax)"
    return None


def _named_tensors(network: nn.Module, head: nn.Linear, name: str) -> dict[str, Tensor]:
    """The user's state dict: φ's tensors and the head's under the names that they had together."""
    tensors: dict[str, Tensor] = network.state_dict()
    return tensors | {f"{name}.{part}": tensor for part, tensor in head.state_dict().items()}
