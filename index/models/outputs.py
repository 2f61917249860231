"""Which part of what a model returns are its logits, where that is not a tensor: one obvious choice, or none."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass

from torch import Tensor, nn

from tmm_engine.index.errors import ModelError

LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class PartOfOutput:
    """A forward hook that puts one part of a model's output in the place of all of it.

    Attributes:
        key: Of a mapping, a field's name, or a position.
    """

    key: str | int

    def __call__(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> Tensor:
        """That part."""
        part = dict(_parts(output))[self.key]
        assert isinstance(part, Tensor)
        return part


def logits_of(output: object) -> Tensor:
    """What `take_logits` would let a network return for one image."""
    if isinstance(output, Tensor):
        return output
    return PartOfOutput(_chosen(output, 1))(nn.Identity(), (), output)


def take_logits(network: nn.Module, output: object, n: int) -> None:
    """Let a network return its logits alone.

    Args:
        network: Gets a hook, where it returns anything but a tensor.
        output: What it returned for `n` images.
        n: How many.

    Raises:
        ModelError: a structure in which no part, or more than one, could be the logits; it lists what there is.
    """
    if not isinstance(output, Tensor):
        network.register_forward_hook(PartOfOutput(_chosen(output, n)))


def _chosen(output: object, n: int) -> str | int:
    parts = _parts(output)
    possible = [key for key, part in parts if isinstance(part, Tensor) and part.ndim == 2 and len(part) == n]
    chosen = LOGITS if LOGITS in possible else possible[0] if len(possible) == 1 else None
    if chosen is None:
        listed = ", ".join(f"{key}: {_form(part)}" for key, part in parts) or "nothing"
        raise ModelError(
            f"expected logits ({n}, classes), or a structure with one such part, or one called 'logits', got "
            f"{type(output).__name__} with {listed} (wrap the model so that it returns one of them)"
        )
    return chosen


def _parts(output: object) -> list[tuple[str | int, object]]:
    if isinstance(output, Mapping):
        return [(key, part) for key, part in output.items() if isinstance(key, str | int)]
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return list(zip(output._fields, output, strict=True))
    if isinstance(output, tuple | list):
        return list(enumerate(output))
    if is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in fields(output)]
    return []


def _form(part: object) -> str:
    return str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__
