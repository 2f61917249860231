"""What a setting is: a field of a frozen dataclass that knows its name, its meaning, its range and its source."""

import math
from dataclasses import Field, dataclass, field, fields
from enum import StrEnum
from typing import Any

from tmm_engine.index.errors import InputError, member

MAX_SEED = 2**63 - 1  # what torch and NumPy both take


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting, described for people.

    Attributes:
        name: As `--set` takes it.
        meaning: In words.
        values: Its range, or the values that it may have.
        default: Of the class that has it; a preset may say otherwise.
        source: Where in the paper it is from, or ``ours``.
        goes_with: The kinds it belongs to, as in ``trigger=query``; empty where it always has an effect.
    """

    name: str
    meaning: str
    values: str
    default: str
    source: str
    goes_with: tuple[str, ...] = ()


def setting(
    name: str,
    default: Any,
    meaning: str,
    *,
    low: int | float | None = None,
    high: int | float | None = None,
    source: str = "ours",
) -> Any:
    """A field that is a setting: as the command line calls it, what it means, its range, and where it is from."""
    return field(
        default=default, metadata={"name": name, "meaning": meaning, "low": low, "high": high, "source": source}
    )


class Stage:
    """Settings that check themselves when they are made.

    Raises:
        InputError: a value of another type, or out of its range.
    """

    __slots__ = ()

    @classmethod
    def settings(cls) -> tuple[Field[Any], ...]:
        """Its fields."""
        return fields(cls)  # type: ignore[arg-type]  # every stage is a dataclass

    def __post_init__(self) -> None:
        for each in self.settings():
            object.__setattr__(self, each.name, checked(each, getattr(self, each.name)))


def described_field(each: Field[Any], goes_with: tuple[str, ...]) -> Setting:
    """A setting for people, with the kinds it belongs to."""
    about, default = each.metadata, each.default
    if isinstance(default, StrEnum):
        values = ", ".join(type(default))
    elif isinstance(default, bool):
        values = "true, false"
    else:
        what = "whole number" if each.type is int else "number"
        high = "" if about["high"] in (None, MAX_SEED) else f" to {about['high']:g}"
        values = f"{what}, {about['low']:g}{high or ' or more'}" + (", or none" if default is None else "")
    shown = str(default).lower() if isinstance(default, bool) or default is None else str(default)
    return Setting(about["name"], about["meaning"], values, shown, about["source"], goes_with)


def checked(each: Field[Any], value: Any) -> Any:
    """A setting's value, of its type and in its range."""
    name, low, high = (each.metadata[key] for key in ("name", "low", "high"))
    if isinstance(each.default, StrEnum):
        return member(type(each.default), value, name=name)
    if each.type is bool:
        if not isinstance(value, bool):
            raise InputError(f"{name}: expected True or False, got {value!r}")
        return value
    if value is None and each.default is None:
        return value
    whole = each.type is int
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise InputError(f"{name}: expected a {'whole ' if whole else ''}number, got {value!r}")
    high = math.inf if high is None else high
    if not low <= value <= high or value == math.inf:
        raise InputError(f"{name}: expected a finite value in [{low:g}, {high:g}], got {value!r}")
    return value


def parsed(each: Field[Any], text: str) -> Any:
    """A setting's value from a text; its range is checked where it is set.

    Raises:
        InputError: the text is not of the setting's type.
    """
    name = each.metadata["name"]
    if isinstance(each.default, StrEnum):
        return member(type(each.default), text, name=name)
    try:
        if each.type is bool:
            return {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}[text.lower()]
        if each.type is int:
            return int(text.replace("_", ""))
        return None if text.lower() == "none" and each.default is None else float(text)
    except (KeyError, ValueError):
        raise InputError(f"{name}: cannot read {text!r} as {getattr(each.type, '__name__', each.type)}") from None
