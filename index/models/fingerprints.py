"""What identifies a classifier: a digest of its specification and weights, the same on every machine."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from tmm_engine.index.models.architectures import ModelSpec

# Attributes that change what a module of PyTorch's computes. Others come and go with its versions.
TELLING = (
    "stride", "padding", "dilation", "groups", "padding_mode", "output_padding", "kernel_size", "ceil_mode",
    "count_include_pad", "output_size", "eps", "num_groups", "normalized_shape", "negative_slope", "approximate", "p",
    "size", "scale_factor", "mode", "align_corners", "start_dim", "end_dim", "dim", "num_heads", "batch_first",
    "norm_first", "upscale_factor", "alpha", "beta", "threshold", "lambd",
)  # fmt: skip

CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Classes of PyTorch's that compute nothing themselves: what is derived from them is somebody else's code."""

Scalar = int | float | bool | str | None


def fingerprint(spec: ModelSpec, network: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hexadecimal, over specification and float32 weights.

    For the user's code stands what its modules are, so that a module and the factory that makes it agree.

    Args:
        spec: With the head's name.
        network: Whole, its head included.
        tensors: Its state dict.
    """
    return _digest(spec, "\n".join(_structure(network)) if spec.is_user_code else spec.architecture, tensors)


def former_fingerprint(spec: ModelSpec, network: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """As before: with the printed form of the user's code, which depends on PyTorch's version."""
    printed = re.sub(r" at 0x[0-9a-f]+", "", repr(network))
    return _digest(spec, printed if spec.is_user_code else spec.architecture, tensors)


def _digest(spec: ModelSpec, architecture: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(replace(spec, architecture=architecture).to_json(), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _structure(network: nn.Module) -> Iterator[str]:
    """A line for every module: name, class, plain values; of PyTorch's only those that tell what it computes."""
    for name, module in network.named_modules(remove_duplicate=False):
        kind = type(module)
        held = {key: value for key, value in vars(module).items() if _is_plain(value) and key != "training"}
        computes = any(base.__module__.startswith("torch.nn.") and base not in CONTAINERS for base in kind.__mro__)
        told = {key: value for key, value in held.items() if (key in TELLING if computes else key[0] != "_")}
        where = kind.__module__ if kind.__module__.startswith("torch.nn.") else ""
        yield f"{name} {where}.{kind.__qualname__} {json.dumps(told, sort_keys=True)}"


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, Scalar)
