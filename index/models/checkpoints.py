"""Checkpoints, read without ever running what is in them."""

import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from tmm_engine.index.errors import ModelError

EMA_UNDER = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model", "shadow_params", "averaged_model")
EMA_WORDS = ("ema", "averaged", "swa", "teacher", "shadow")
NESTED_UNDER = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "weights")
BESIDE = (
    "criterion",
    "loss",
    "losses",
    "metric",
    "metrics",
    "optimizer",
    "scheduler",
    "decay",
    "updates",
    "step",
    "epoch",
)
"""Words of what a trainer keeps beside a model and that is no part of it."""
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
LISTED = 10

OTHER_FORMATS = {  # how a file begins, and what it is
    b"\x89HDF": "HDF5, as Keras writes it",
    b"GGUF": "GGUF",
    b"\x93NUMPY": "a NumPy array",
}
CONVERT = "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A checkpoint under a model's own names.

    Attributes:
        tensors: By name.
        notes: What was taken off or left out, and chosen, in words.
        averaged: They are known to be averaged (EMA) ones.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    averaged: bool = False


def load_state_dict(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without what was said of it; see `load_checkpoint`."""
    return load_checkpoint(path).tensors


def load_checkpoint(path: Path | str, *, ema: bool = False) -> Fitted:
    """The tensors of a checkpoint: safetensors, the index of its shards, or a PyTorch file that holds tensors only.

    A state dict may lie under a usual key (``state_dict``, ``model``, …); prefixes that a wrapper put before every
    name are removed.

    Args:
        path: The file.
        ema: Of a file that holds raw and averaged (EMA) weights under keys of their own, take the averaged ones.

    Returns:
        By name, on the CPU; floating point as float32, finite; integers as they are.

    Raises:
        ModelError: A missing or damaged file, pickled objects (they are never run), no tensors, NaN or infinity.
    """
    path = Path(path)
    content, notes, averaged = _ema_chosen(_read(path), ema=ema)
    tensors = _plain_names(_find_tensors(path, content))
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
    return Fitted(state, notes, averaged)


def fit_names(state: Mapping[str, Tensor], model: nn.Module, *, ema: bool = False) -> Fitted:
    """A checkpoint under the model's own names, where these are there, as they are or below a prefix.

    Args:
        state: The checkpoint.
        model: What it is for; shapes do not matter.
        ema: Where a prefix of raw and one of averaged (EMA) weights fit, take the averaged ones.

    Returns:
        Without what a trainer keeps beside them; as it was where nothing fits, which `apply_state_dict` then says.

    Raises:
        ModelError: several prefixes fit, and nothing tells which is meant.
    """
    names = set(_plain_names(model.state_dict()))
    fitting = _fitting(state, names)
    averaged = [prefix for prefix in fitting if any(word in prefix.lower() for word in EMA_WORDS)]
    raw = [prefix for prefix in fitting if prefix not in averaged]
    chosen = (averaged if ema else raw) or fitting
    if not chosen:
        return Fitted(dict(state))
    if len(chosen) > 1:
        raise ModelError(
            f"expected weights of one model, got several that fit, {_under(chosen)} (save the one that is meant by "
            f"itself: {CONVERT})"
        )
    notes = []
    if averaged and raw:
        notes.append(_both(_under(chosen), _under((raw if ema else averaged)[:1]), ema=ema))
    elif chosen[0]:
        notes.append(f"weights: the prefix {chosen[0]!r} was taken off their names")
    tensors = {name: tensor for name, tensor in _below(state, chosen[0]).items() if name in names}
    taken = {chosen[0] + name for name in tensors}
    others = tuple(prefix for prefix in fitting if prefix and prefix != chosen[0])
    mine = names if "" in fitting else ()
    if left := [name for name in state if name not in taken and name not in mine and not name.startswith(others)]:
        notes.append(f"weights: what is not the model's was left out: {_some(left)}")
    return Fitted(tensors, tuple(notes), chosen[0] in averaged)


def _fitting(state: Mapping[str, Tensor], names: Set[str]) -> list[str]:
    """The prefixes, none among them, below which the whole model lies, and nothing else that might be a part of one.

    What a trainer keeps beside a model may lie there, and other copies of it; all else would be a larger model's.
    """
    expected = {name for name in names if _must_be_there(name)}
    whole = [prefix for prefix in ("", *_prefixes(state)) if expected <= _below(state, prefix).keys()]

    def is_beside(name: str, prefix: str) -> bool:
        if any(name.startswith(other) for other in whole if len(other) > len(prefix)):
            return True
        top = name.removeprefix(prefix).partition(".")[0]
        return any(word in top.lower().split("_") for word in (*BESIDE, *EMA_WORDS))

    return [
        prefix
        for prefix in whole
        if all(is_beside(prefix + name, prefix) for name in _below(state, prefix).keys() - names)
    ]


def _both(taken: str, other: str, *, ema: bool) -> str:
    if ema:
        return f"weights: the averaged (EMA) ones {taken} were taken, not the raw ones {other}"
    return (
        f"weights: there are raw and averaged (EMA) ones; the raw ones {taken} were taken, `ema=True` takes the "
        f"averaged ones {other}"
    )


def _under(prefixes: Sequence[str]) -> str:
    return " and ".join(f"under {prefix!r}" if prefix else "without a prefix" for prefix in prefixes)


def _must_be_there(name: str) -> bool:
    return not name.endswith("num_batches_tracked") and name.partition(".")[0] not in ("aux1", "aux2", "AuxLogits")


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Everything up to a dot that names begin with, the shortest first."""
    found = {name[: place + 1] for name in state for place, letter in enumerate(name) if letter == "."}
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _ema_chosen(content: object, *, ema: bool) -> tuple[object, tuple[str, ...], bool]:
    """The raw or the averaged weights of a file that has both, or averaged ones only, under keys of their own."""
    if not isinstance(content, dict):
        return content, (), False
    averaged = next((key for key in EMA_UNDER if isinstance(content.get(key), dict) and content[key]), None)
    raw = next((key for key in NESTED_UNDER if isinstance(content.get(key), dict)), None)
    if averaged is None:
        return content, (), False
    if raw is None or ema:
        both = _both(f"under {averaged!r}", f"under {raw!r}", ema=True)
        note = both if raw else f"weights: those under {averaged!r} are averaged (EMA) ones"
        return content[averaged], (note,), True
    return content, (_both(f"under {raw!r}", f"under {averaged!r}", ema=False),), False


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
    if not missing and not unexpected:
        _check_positions(expected, state)
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


def _check_positions(expected: Mapping[str, tuple[str, Tensor]], state: Mapping[str, Tensor]) -> None:
    """Refuse a transformer's weights for images of another size, which differ in their positions alone."""
    wrong = [name for name in state if expected[name][1].shape != state[name].shape]
    if len(wrong) != 1 or "pos" not in wrong[0] or state[wrong[0]].ndim != 3:
        return
    have, want = (shape[1] for shape in (state[wrong[0]].shape, expected[wrong[0]][1].shape))
    side = math.isqrt(have - 1)
    patches = f" ({side} × {side} patches and a class token)" if side * side == have - 1 else ""
    raise ModelError(
        f"the weights are for images of another size: {wrong[0]} has {have} positions{patches}, this size has "
        f"{want} (give the size that they were trained with as `image_shape=(c, h, w)`)"
    )


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
    return _start(path)[8:9] == b"{" or path.suffix == ".safetensors"  # eight bytes of length, then a JSON header


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise ModelError(f"expected a file of weights, got {path}: {error.strerror} (check the path)") from error


def _read(path: Path) -> object:
    if _is_safetensors(path):
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    if path.suffix == ".json" or _start(path).lstrip()[:1] == b"{":
        return _read_shards(path)
    if other := _other_format(path):
        raise ModelError(f"expected weights as safetensors or a PyTorch checkpoint, got {path}, which is {other}")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever bytes make the restricted unpickler raise
        raise ModelError(
            f"expected tensors only in {path}, got pickled objects, which are never run, or a damaged file. "
            f"Where you trust it, load it yourself and convert it: {CONVERT}"
        ) from error


def _read_shards(path: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files that an index names, which lie beside it."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(
            f"expected weights, or the index of their shards with a 'weight_map', got JSON without one in {path} "
            "(give the file of weights beside it)"
        ) from None
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(map(str, names))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{path}: expected names of safetensors files beside it, got {name!r}")
        found: Any = _read(path.parent / name)
        tensors |= found
    return tensors


def _other_format(path: Path) -> str | None:
    """What a file is, if it is known and no checkpoint, and what to do about it."""
    start = _start(path)
    known = next((kind for beginning, kind in OTHER_FORMATS.items() if start.startswith(beginning)), None)
    if known is not None:
        return f"{known} (save the weights with PyTorch: {CONVERT})"
    if path.suffix == ".onnx" or (start[:1] == b"\x08" and start[1:2] < b"\x20" and start[2:3] in b"\x12\x3a"):
        return f"an ONNX graph (give the weights of the model that it was exported from: {CONVERT})"
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return (
            "TorchScript, a model with its code (where you trust it: "
            "safetensors.torch.save_file(torch.jit.load(file).state_dict(), 'model.safetensors'))"
        )
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return f"a program of torch.export (give the weights of the model that it was exported from: {CONVERT})"
    return None


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
