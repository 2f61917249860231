"""φ as fast as it goes: specialised to one image shape, in one pass from stored pixels to triggered features."""

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier

TOLERANCE = 1e-3  # of the largest feature; float32 rounding stays two orders of magnitude below


class Precision(StrEnum):
    """Arithmetic of the pass over the exemplars; the best of a bf16 pass are scored again in fp32."""

    FP32 = "fp32"  # the classifier's own: float32, or float64 in tests
    BF16 = "bf16"


@runtime_checkable
class Backbone(Protocol):
    """φ(x^t) for exemplars as stored.

    Attributes:
        name: What computes it, for people: ``torch fp32 on cpu``.
        exact: Whether its features are good to single precision, so that nothing needs scoring again.
    """

    name: str
    exact: bool

    def __call__(
        self,
        images: UInt8[Tensor, "n c h w"],
        trigger: Float[Tensor, "c h w"],
        *,
        image_weight: float,
        trigger_weight: float,
        clamp: bool,
    ) -> Float[Tensor, "n d"]:
        """Features of image_weight · x + trigger_weight · τ, clamped to [0, 1] if asked, with x = images / 255."""


class TorchBackbone:
    """A `Backbone` in PyTorch.

    Args:
        classifier: f, best `specialised`; not modified.
        precision: ``bf16`` runs the network in bfloat16; blending and normalisation stay in the classifier's dtype.

    Raises:
        InputError: the device has no bfloat16.
    """

    def __init__(self, classifier: Classifier, precision: Precision = Precision.FP32) -> None:
        if precision is Precision.BF16 and classifier.device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise InputError(
                f"{torch.cuda.get_device_name(classifier.device)} has no bfloat16; use the precision 'fp32'"
            )
        self.name = f"torch {precision} on {classifier.device}"
        self.exact = precision is Precision.FP32
        self._normalise = classifier.backbone.get_submodule("normalise")
        self._dtype = classifier.head.weight.dtype if self.exact else torch.bfloat16
        network = classifier.backbone.get_submodule("network")
        if precision is Precision.BF16:
            network = copy.deepcopy(network).to(torch.bfloat16)
        self._network = network

    @torch.inference_mode()
    def __call__(
        self,
        images: UInt8[Tensor, "n c h w"],
        trigger: Float[Tensor, "c h w"],
        *,
        image_weight: float,
        trigger_weight: float,
        clamp: bool,
    ) -> Float[Tensor, "n d"]:
        """See `Backbone`."""
        triggered = images.to(trigger.dtype).mul_(image_weight / 255.0).add_(trigger * trigger_weight)
        if clamp:
            triggered.clamp_(0.0, 1.0)
        features: Tensor = self._network(self._normalise(triggered).to(self._dtype))
        return features.to(trigger.dtype)


@dataclass(frozen=True, eq=False)
class SpecialisedClassifier(Classifier):
    """A classifier as `specialised` returns it."""


@torch.inference_mode(False)  # the copy must serve `make_trigger`'s gradients, whatever the caller's mode
def specialised(classifier: Classifier) -> SpecialisedClassifier:
    """The same f, cheaper to run at its image shape; differentiable, never trained.

    Batch norms are folded into the convolutions before them, kernels lose the taps that only ever meet padding (on a
    1×1 map a 3×3 kernel is a 1×1 kernel), and weights are laid out channels last. What comes out is compared with the
    original. If it differs, or if the network cannot be traced (its control flow depends on the images, say), the
    original stays. Of a classifier that is specialised already nothing is done again.
    """
    if isinstance(classifier, SpecialisedClassifier):
        return classifier
    normalise, original = classifier.backbone.get_submodule("normalise"), classifier.backbone.get_submodule("network")
    generator = torch.Generator().manual_seed(0)
    probe = torch.rand((2, *classifier.image_shape), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        pixels = normalise(probe.to(classifier.head.weight))
        expected = original(pixels)
        try:
            network = _cut_kernels(_fold_batch_norms(_traced(copy.deepcopy(original))), pixels)
            network = network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
            difference = max(float((network(pixels[:n]) - expected[:n]).abs().max()) for n in (1, 2))
        except Exception:  # the user's code may hold anything
            difference, network = math.inf, original
    if not difference <= TOLERANCE * float(expected.abs().max()):
        network = original
    backbone = nn.Sequential(OrderedDict(normalise=normalise, network=network)).eval()
    own = {each.name: getattr(classifier, each.name) for each in fields(classifier)}
    return SpecialisedClassifier(**own | {"backbone": backbone})


_one_at_a_time = threading.Lock()


class _Tracer(fx.Tracer):
    """Leaves other threads' modules alone: while one traces, PyTorch sends the calls of all modules to its tracer."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The call recorded, or another thread's call carried out."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """The attribute recorded, or another thread's attribute."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _traced(network: nn.Module) -> fx.GraphModule:
    """The network as a graph that takes any memory layout: `view`, which does not, becomes `reshape`."""
    with _one_at_a_time:
        traced = fx.GraphModule(network, _Tracer().trace(network))
    for node in traced.graph.nodes:
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"
    traced.recompile()
    return traced


def _fold_batch_norms(traced: fx.GraphModule) -> fx.GraphModule:
    modules = dict(traced.named_modules())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.args else None
        if not (node.op == "call_module" and isinstance(before, fx.Node) and before.op == "call_module"):
            continue
        norm, conv = modules[node.target], modules[str(before.target)]
        used_once = len(before.users) == calls.count(before.target) == calls.count(node.target) == 1
        if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d) and used_once:
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _cut_kernels(network: nn.Module, pixels: Float[Tensor, "n c h w"]) -> nn.Module:
    """Replace convolutions whose outermost taps meet nothing but zero padding at this input size."""
    seen: dict[str, list[tuple[tuple[int, int], tuple[int, int]]]] = {}
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: seen.setdefault(name, []).append(
                (tuple(inputs[0].shape[2:]), tuple(output.shape[2:]))
            )
        )
        for name, module in convolutions.items()
    ]
    network(pixels)
    for hook in hooks:
        hook.remove()
    for name, sizes in seen.items():
        conv = convolutions[name]
        if len(set(sizes)) == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            _cut_kernel(conv, *sizes[0])
    return network


def _cut_kernel(conv: nn.Conv2d, inputs: tuple[int, int], outputs: tuple[int, int]) -> None:
    """Drop the outermost taps that never meet an input of this size, where the same padding on both sides allows it."""
    used, paddings = [], []
    for axis in (0, 1):
        kernel, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
        starts = [position * stride - int(conv.padding[axis]) for position in range(outputs[axis])]
        taps = [tap for tap in range(kernel) if any(0 <= start + tap * dilation < inputs[axis] for start in starts)]
        if not taps:  # a convolution of padding alone
            return
        padding = -starts[0] - taps[0] * dilation
        extent = dilation * (taps[-1] - taps[0]) + 1
        if padding < 0 or (inputs[axis] + 2 * padding - extent) // stride + 1 != outputs[axis]:
            return
        used.append(slice(taps[0], taps[-1] + 1))
        paddings.append(padding)
    conv.weight = nn.Parameter(conv.weight[:, :, used[0], used[1]].contiguous(), requires_grad=False)
    conv.kernel_size = (conv.weight.shape[2], conv.weight.shape[3])
    conv.padding = (paddings[0], paddings[1])
