"""Exemplars from rows of (image, label) in Python: a torch `Dataset`, or a list of pairs."""

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.labels import numbered
from tmm_engine.index.sources.records import Encoded, EncodedSource, UnreadableImage
from tmm_engine.index.wording import some


@runtime_checkable
class Rows(Protocol):
    """Anything with a length and rows by number, as a torch `Dataset` that is no stream."""

    def __len__(self) -> int:
        """How many rows."""

    def __getitem__(self, row: Any, /) -> Any:
        """One of them."""


class PairSource(EncodedSource):
    """Rows of an image and its label, or of an image alone; they are asked for one by one, in order.

    Images are whatever `decode_image` takes: PIL images, arrays, tensors, paths. Labels are integers, named by the
    attribute ``classes`` or ``class_to_idx`` where the rows, or what they are put together of, have one, or names, of
    which these or else the sorted distinct ones are the class names; a label that is None or empty is none. Where the
    first label is a name, all rows up to the limit are looked at when the source is opened, else only those up to it.
    Ids are the row in eight digits; there is no metadata. A row that raises an exception is an image that cannot be
    read.

    Args:
        rows: A torch `Dataset` with a length, or a list.
        limit: Only the first so many rows.
        name: What an index records as its origin. Default: the kind of the rows.

    Raises:
        InputError: no rows, rows that are neither images nor pairs, or labels that are neither integers nor names, or
            some one and some the other; when the source is read, for what was not looked at before.
    """

    def __init__(self, rows: Rows, *, limit: int | None = None, name: str | None = None) -> None:
        self.name = name or type(rows).__name__
        self.metadata_types: Mapping[str, type] = {}
        if isinstance(rows, Mapping):
            raise InputError(f"{self.name}: expected rows (image, label), got a mapping; pass a list of pairs")
        self._rows = rows
        self._length = min(len(rows), limit or len(rows))
        self.limited = limit is not None
        if not self._length:
            raise InputError(f"{self.name}: expected at least one row, got none")
        kind = self._kind()
        self.labelled = kind is not None
        self.class_names = _class_names(rows) if self.labelled else None
        self._places: Mapping[str, int] | None = None
        if kind is str:
            found = self._names()
            known = self.class_names if set(found) <= {*(self.class_names or ())} else None
            self.class_names, places = numbered(found, known)
            self._places = dict(zip(found, places, strict=True))
            self._remark(f"{self.name}: labels are names: all rows were looked at for {len(self.class_names)} classes")

    def __len__(self) -> int:
        return self._length

    def _encoded(self) -> Iterator[Encoded | UnreadableImage]:
        for row in range(self._length):
            id_, read = f"{row:08d}", self._row(row)
            if isinstance(read, UnreadableImage):
                yield read
                continue
            image, label = self._pair(row, read)
            yield Encoded(id_, image, self._number(row, label), {})

    def _row(self, row: int) -> Any:
        """What somebody else's code, which may raise anything, gives for a row."""
        try:
            return self._rows[row]
        except Exception as error:
            reason = f"row {row} of {self.name} cannot be read: {error or type(error).__name__}"
            return UnreadableImage(f"{row:08d}", reason)

    def _labels(self) -> Iterator[int | str]:
        """Those of the rows that can be read and have one."""
        for row in range(self._length):
            read = self._row(row)
            if not isinstance(read, UnreadableImage):
                _, label = self._pair(row, read)
                if label is not None:
                    yield label

    def _kind(self) -> type | None:
        """Of the first label; None where there is none: of images alone only the first is looked at."""
        for row in range(self._length):
            read = self._row(row)
            if isinstance(read, UnreadableImage):
                continue
            _, label = self._pair(row, read)
            if label is not None:
                return str if isinstance(label, str) else int
            if not isinstance(read, tuple | list):
                return None
        return None

    def _names(self) -> list[str]:
        """All labels, which are names; each once.

        Raises:
            InputError: one is a number.
        """
        names = dict.fromkeys(self._labels())
        if numbers := [name for name in names if not isinstance(name, str)]:
            raise InputError(f"{self.name}: expected labels all integers or all names, got {numbers[0]} among names")
        return [str(name) for name in names]

    def _pair(self, row: int, read: Any) -> tuple[Any, int | str | None]:
        """The image and the label of a row.

        Raises:
            InputError: the row is neither an image nor a pair, or its label is no label.
        """
        image, label = _split(read)
        if isinstance(label, torch.Tensor | np.generic | np.ndarray):
            label = label.tolist()
        if label is None or label == "":
            return image, None
        if not isinstance(label, Integral | str):
            raise InputError(f"row {row} of {self.name}: expected an integer or a name as label, got {label!r}")
        return image, label if isinstance(label, str) else int(label)

    def _number(self, row: int, label: int | str | None) -> int | None:
        if not self.labelled or label is None:
            return None
        if self._places is None and not isinstance(label, str):
            return label
        if self._places is None or label not in self._places:
            raise InputError(
                f"row {row} of {self.name}: expected labels all integers or all names, and the same each time, got "
                f"{label!r}"
            )
        return self._places[str(label)]


def _split(row: object) -> tuple[Any, Any]:
    """The image and the label as they are, None where there is none.

    Raises:
        InputError: the row is neither an image nor a pair.
    """
    if not isinstance(row, tuple | list):
        if isinstance(row, dict):
            raise InputError(f"expected rows (image, label), or images, got dict with {', '.join(map(str, row))}")
        return row, None
    if len(row) != 2:
        raise InputError(f"expected rows (image, label), or images, got {len(row)} values")
    return row[0], row[1]


def _class_names(rows: object) -> tuple[str, ...] | None:
    """As torchvision's data sets have them; those of what a subset is of, or of what all parts have."""
    while isinstance(rows, Subset):
        rows = rows.dataset
    if isinstance(rows, ConcatDataset):
        parts = {_class_names(part) for part in rows.datasets}
        if len(parts) > 1:
            raise InputError(
                f"{type(rows).__name__}: expected parts with the same classes in the same order, got "
                f"{' and '.join(_listed(part) for part in parts)}: a number would mean another class in each; give "
                f"pairs (image, name)"
            )
        return parts.pop()
    for names in (getattr(rows, "classes", None), getattr(rows, "class_to_idx", None)):
        if isinstance(names, list | tuple):
            return tuple(map(str, names))
        if isinstance(names, Mapping) and (found := _by_number(names)):
            return found
    return None


def _by_number(names: Mapping[Any, Any]) -> tuple[str, ...] | None:
    """The names of classes 0 to n−1, of a mapping from names to numbers or from numbers to names; else None."""
    turned: dict[Any, Any] = {value: key for key, value in names.items() if isinstance(value, Integral)}
    for by_number in (names, turned):
        if set(by_number) == set(range(len(names))):
            return tuple(str(by_number[number]) for number in range(len(names)))
    return None


def _listed(names: tuple[str, ...] | None) -> str:
    return "none" if names is None else some(map(repr, names))
