"""What a public function is called with, held to its annotations: a wrong kind is an error that names the argument."""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, Union

import numpy as np
from beartype import BeartypeConf
from beartype.door import is_bearable

from tmm_engine.index.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

_TOWER = BeartypeConf(is_pep484_tower=True)  # a whole number is a number
_WORDS: dict[object, str] = {
    str: "text",
    Path: "a path",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    np.ndarray: "an array",
    types.NoneType: "None",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, for whose arguments an InputError says which is not what its annotation promises to take.

    NumPy's scalars count as Python's, arrays as sequences of what is in them; text is no sequence of texts.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        told = {
            name: each.annotation
            for name, each in signature.parameters.items()
            if each.kind is not each.VAR_KEYWORD and each.annotation is not each.empty
        }
        parameters = types.SimpleNamespace(__annotations__=told)  # what is returned may name what is not imported
        return typing.get_type_hints(parameters, inspect.unwrap(function).__globals__)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        for name, hint in hints().items():
            if name in given and not _fits(given[name], hint):
                expected = " or ".join(dict.fromkeys(_in_words(hint)))
                got = _shown(given[name])
                if is_stream(given[name]):
                    got += f", a stream, whose rows have no numbers; {how_to_collect(given[name])}"
                raise InputError(f"{function.__qualname__}: {name}: expected {expected}, got {got}")
        return function(*args, **kwargs)

    return called


def is_stream(value: object) -> bool:
    """Whether something can be gone through, but has no length, as a generator or a data set that is streamed."""
    return hasattr(value, "__iter__") and not hasattr(value, "__len__") and not isinstance(value, type)


def how_to_collect(stream: object) -> str:
    """What makes rows with numbers of a stream, as advice."""
    if type(stream).__module__.split(".")[0] == "datasets":
        return "make a data set of it: `datasets.Dataset.from_list(list(stream), features=stream.features)`"
    return "make a list of it: `list(stream)`"


def _fits(value: object, hint: Any) -> bool:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and Path in _alternatives(hint):
        return bool(value) and "\0" not in value  # which would be the current folder, or no path
    if isinstance(value, str | bytes) and not any(each in (str, bytes, object) for each in _alternatives(hint)):
        return typing.get_origin(hint) is None and is_bearable(value, hint)
    if isinstance(value, np.ndarray) and not is_bearable(value, hint):
        value = value.tolist()
    return is_bearable(value, hint, conf=_TOWER)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _in_words(hint: Any) -> list[str]:
    words = []
    for each in _alternatives(hint):
        origin, inner = typing.get_origin(each), typing.get_args(each)
        if isinstance(origin, type) and issubclass(origin, Collection) and inner and origin is not tuple:
            words.append(f"a list of {' or '.join(_in_words(inner[0]))}")
        else:
            words.append(_WORDS.get(each) or str(getattr(each, "__name__", each)))
    return words


def _shown(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__} itself (is an instance meant, {value.__name__}()?)"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:79] + '…'} ({type(value).__name__})"
