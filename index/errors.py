"""The exceptions a caller may see. Each message says what was expected, what was found, and what to do."""

import difflib
import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from tmm_engine.index.names import composed

Choice = TypeVar("Choice", bound=StrEnum)

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


class TmmEngineError(Exception):
    """The root of every error this project raises on purpose."""


class InputError(TmmEngineError, ValueError):
    """An argument, an image, a source or a configuration that cannot be used."""


class ImageError(InputError):
    """An image that cannot be read or does not have the expected form."""


class ModelError(TmmEngineError, ValueError):
    """A classifier that cannot be built, loaded, split into backbone and head, or that is not the index's."""


class IndexStateError(TmmEngineError):
    """An index on disk that is missing, of another format, damaged, locked, or in the way."""


class WriterBusyError(IndexStateError):
    """Another process goes on writing the index; trying again may do."""


def printable(name: str | Path) -> str:
    """A name with whatever is not UTF-8 in it escaped."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


def visible(text: str) -> str:
    """A text whose control characters are spelled out: in a name they could steer a terminal, or hide."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def nearest(name: str, known: Iterable[str]) -> str:
    """A ' (did you mean …?)' for an unknown name, or an empty string when nothing known is near.

    Of a name that only looks like the known one, both are spelled out.
    """
    matches = difflib.get_close_matches(name, list(known), n=1)
    if matches and composed(matches[0]) == composed(name):
        return f" (did you mean {matches[0]!a}? It looks the same in another Unicode form, {name!a})"
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _spoken(kind: type) -> str:
    """A class's name as words: ``SearchPrecision`` is "search precision"."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", kind.__name__).lower()


def member(kind: type[Choice], value: str, *, name: str | None = None) -> Choice:
    """The member of an enumeration that has this value.

    Args:
        kind: The enumeration.
        value: The member's.
        name: What the user calls the choice; by default as the enumeration is called.

    Raises:
        InputError: none has; the message suggests the nearest and lists all.
    """
    try:
        return kind(value)
    except ValueError:
        known = [str(choice) for choice in kind]
        raise InputError(
            f"unknown {name or _spoken(kind)} {str(value)!r}{nearest(str(value), known)}; known: {', '.join(known)}"
        ) from None
