"""Checkpoints, read without ever running what is in them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from tmm_engine.index.errors import ModelError

NESTED_UNDER = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "weights")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
LISTED = 10

T = TypeVar("T")


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: safetensors, or a PyTorch file that holds tensors only.

    A state dict may lie under a usual key (``state_dict``, ``model``, …); prefixes that a wrapper put before every
    name are removed.

    Returns:
        By name, on the CPU; floating point as float32, finite; integers as they are.

    Raises:
        ModelError: A missing or damaged file, pickled objects (they are never run), no tensors, NaN or infinity.
    """
    tensors = _plain_names(_find_tensors(path, _read(path)))
    odd = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if odd:
        raise ModelError(
            f"expected dense tensors in {path}, got sparse, quantised, expanded or complex ones: {_some(odd)} "
            "(save them dense, as floating point)"
        )
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"expected finite weights in {path}, got NaN or infinity in {_some(broken)} (train them again)"
        )
    return state


def apply_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into ``model``, all or nothing; only counters of batches (``num_batches_tracked``) may be missing.

    Raises:
        ModelError: Names that are missing or unexpected, shapes that differ; the model is unchanged.
    """
    # The model's own names lose prefixes too: a user's class may call its only child "module".
    expected = _plain_names(
        {name: (name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    )
    missing = [name for name in expected.keys() - state.keys() if not name.endswith("num_batches_tracked")]
    unexpected = state.keys() - expected.keys()
    misshapen = [
        f"{name} (expected {tuple(expected[name][1].shape)}, got {tuple(state[name].shape)})"
        for name in expected.keys() & state.keys()
        if expected[name][1].shape != state[name].shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    found = [f"{what}: {_some(sorted(names))}" for what, names in problems if names]
    if found:
        raise ModelError(
            f"the weights do not fit the model; {'; '.join(found)} (check architecture, classes, channels and stem)"
        )
    full = model.state_dict()  # with the layout versions that some architectures insist on
    full.update({expected[name][0]: tensor for name, tensor in state.items()})
    model.load_state_dict(full)


def read_metadata(path: Path) -> dict[str, str]:
    """The strings stored beside the tensors of a safetensors file; none for other files.

    Raises:
        ModelError: A missing or damaged file.
    """
    if not _is_safetensors(path):
        return {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _is_safetensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ModelError(f"expected a file of weights, got {path}: {error.strerror} (check the path)") from error
    return start[8:] == b"{" or path.suffix == ".safetensors"  # eight bytes of length, then a JSON header


def _read(path: Path) -> object:
    if _is_safetensors(path):
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever bytes make the restricted unpickler raise
        raise ModelError(
            f"expected tensors only in {path}, got pickled objects, which are never run, or a damaged file. "
            "Where you trust it, load it yourself and convert it: "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from error


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(f"expected a complete safetensors file, got {path}: {error} (copy or download it again)")


def _find_tensors(path: Path, content: object) -> dict[str, Tensor]:
    """The state dict in what a file holds, at most three levels deep."""
    for _ in range(3):
        if not isinstance(content, dict):
            break
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(name): tensor for name, tensor in content.items()}
        content = next((content[key] for key in NESTED_UNDER if isinstance(content.get(key), dict)), content)
    got = f"a dict with {_some(map(str, content))}" if isinstance(content, dict) else type(content).__name__
    raise ModelError(
        f"expected a dict of tensors in {path}, plain or under one of {NESTED_UNDER}, got {got} "
        "(save model.state_dict() with safetensors.torch.save_file)"
    )


def _is_plain(tensor: Tensor) -> bool:
    """Dense, real, and as large in memory as its shape says: with strides of 0 a few bytes claim any shape."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _plain_names(values: Mapping[str, T]) -> dict[str, T]:
    """Without the prefixes that a wrapper puts before every name."""
    plain = dict(values)
    while plain and (prefix := _shared_prefix(plain)):
        plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain


def _shared_prefix(names: Iterable[str]) -> str:
    return next((prefix for prefix in WRAPPER_PREFIXES if all(name.startswith(prefix) for name in names)), "")


def _some(names: Iterable[str]) -> str:
    """The first few names, then how many more."""
    listed = list(names)
    rest = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return ", ".join(listed[:LISTED]) + rest
