"""Exemplars from rows of (image, label) in Python: a torch `Dataset`, or a list of pairs."""

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Subset

from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.labels import numbered
from tmm_engine.index.sources.records import Encoded, EncodedSource, UnreadableImage


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
    attribute ``classes`` where the rows have one, or names, for which all rows are looked at once; the class names are
    then the sorted distinct ones. Ids are the row in eight digits; there is no metadata. A row that raises an exception
    is an image that cannot be read.

    Args:
        rows: A torch `Dataset` with a length, or a list.
        limit: Only the first so many rows.
        name: What an index records as its origin. Default: the kind of the rows.

    Raises:
        InputError: no rows, rows that are neither images nor pairs, or labels that are neither integers nor names.
    """

    def __init__(self, rows: Rows, *, limit: int | None = None, name: str | None = None) -> None:
        self.name = name or type(rows).__name__
        self.metadata_types: Mapping[str, type] = {}
        self._rows = rows
        self._length = min(len(rows), limit or len(rows))
        if not self._length:
            raise InputError(f"{self.name}: expected at least one row, got none")
        _, label = _pair(rows[0])
        self.labelled = label is not None
        self.class_names = _class_names(rows) if self.labelled else None
        self._numbers: dict[str, int] | None = None
        if isinstance(label, str):
            found = [str(_pair(rows[row])[1]) for row in range(len(rows))]
            self.class_names, labels = numbered(found, None)
            self._numbers = dict(zip(found, labels, strict=True))
            self._remark(f"{self.name}: labels are names: all rows were looked at for {len(self.class_names)} classes")

    def __len__(self) -> int:
        return self._length

    def _encoded(self) -> Iterator[Encoded | UnreadableImage]:
        for row in range(self._length):
            id_ = f"{row:08d}"
            try:
                image, label = _pair(self._rows[row])
                yield Encoded(id_, image, self._number(label), {})
            except Exception as error:  # somebody else's code, which may raise anything
                yield UnreadableImage(id_, f"row {row} of {self.name} cannot be read: {error or type(error).__name__}")

    def _number(self, label: object) -> int | None:
        if not self.labelled:
            return None
        if self._numbers is not None:
            return self._numbers[str(label)]
        number = label.item() if isinstance(label, torch.Tensor | np.generic | np.ndarray) else label
        if not isinstance(number, Integral):
            raise InputError(f"expected an integer or a name as label, got {label!r}")
        return int(number)


def _pair(row: object) -> tuple[Any, Any]:
    """The image and the label, None where there is none.

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
    """As torchvision's data sets have them; those of what a subset is of."""
    while isinstance(rows, Subset):
        rows = rows.dataset
    names = getattr(rows, "classes", None)
    return tuple(map(str, names)) if isinstance(names, list | tuple) else None
