"""What sources of exemplars have in common: records, metadata columns, and decoding in order by a few threads."""

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from tmm_engine.index.columns import is_column_name
from tmm_engine.index.errors import ImageError, InputError, printable
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.sources.images import decode_image, natural_shape
from tmm_engine.index.sources.shapes import common_shape, said_shapes
from tmm_engine.index.types import ImageLike, ImageShape

if TYPE_CHECKING:
    import pyarrow as pa

Metadata = dict[str, str | int | float | bool | None]

RESERVED_COLUMNS = frozenset(("id", "label", "image", "label_is_predicted", "predicted", "row_digest"))

_CHUNK = 32  # images that one thread decodes at a time
_THREADS = min(8, os.cpu_count() or 1)
_HEADERS = 64  # images that are asked for their shape where nobody says one
_MOST_HEADERS = 256  # … and so many at most, where some of them cannot be read


def is_reserved(name: str) -> bool:
    """Whether no column of metadata can have this name: the store's own, those of features, and Lance's."""
    return name in RESERVED_COLUMNS or is_column_name(name) or name.startswith("_row")


@dataclass(frozen=True, slots=True, eq=False)
class ImageRecord:
    """One readable image.

    Attributes:
        id: Unique within its source.
        image: uint8 (c, h, w) in the shape that was asked for.
        label: Among the source's classes, 0 or more; None for an image without a label.
        metadata: A value for every column of the source's ``metadata_types``.
    """

    id: str
    image: UInt8[np.ndarray, "c h w"]
    label: int | None
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class UnreadableImage:
    """An image that could not be read, in the place where its record would have come.

    Attributes:
        id: Its own; of a shard its file's name.
        reason: What is wrong.
        is_shard: Whether it stands for a file of several images, nobody knows which.
    """

    id: str
    reason: str
    is_shard: bool = False


@runtime_checkable
class ImageSource(Protocol):
    """A finite, repeatable stream of images in a fixed order.

    Attributes:
        name: What an index records as its origin, as in ``cifar10 (train)``.
        class_names: In label order; None where labels are numbers only.
        labelled: Whether records have labels; some may have none.
        metadata_types: Column -> str, int, float or bool. No column has a reserved name (`is_reserved`).
    """

    name: str
    class_names: tuple[str, ...] | None
    labelled: bool
    metadata_types: Mapping[str, type]

    def __len__(self) -> int:
        """How many records and unreadable images `read` yields."""

    def natural_shape(self) -> ImageShape:
        """The shape that images are brought to where nobody says one: that of most of the first.

        It is (c, 224, 224) where a side is longer than that, except for arrays.

        Raises:
            InputError: No image is readable.
        """

    def read(self, shape: Target) -> Iterator[ImageRecord | UnreadableImage]:
        """All images in order, each brought to a shape as `index.sources.images.decode_image` does.

        Args:
            shape: (c, h, w), or a classifier's preprocessing where it asks for more than the usual.
        """


@runtime_checkable
class Remarking(Protocol):
    """A source that says what it guessed, left out or converted.

    Attributes:
        remarks: Sentences for the user; those of its opening first, more may come while it is read.
    """

    @property
    def remarks(self) -> tuple[str, ...]:
        """As above."""


def remarks_of(source: ImageSource) -> tuple[str, ...]:
    """What a source has to say so far; most have nothing."""
    return source.remarks if isinstance(source, Remarking) else ()


def label_values_of(source: ImageSource) -> tuple[int, ...] | None:
    """The numbers that a table has as labels, which may be names; None where labels have names, or are positions."""
    return source.label_values if isinstance(source, EncodedSource) else None


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image still to be decoded; `source` is None where there are no bytes."""

    id: str
    source: ImageLike | None
    label: int | None
    metadata: Metadata


Item = Encoded | ImageRecord | UnreadableImage
"""An image on its way: still to be decoded, decoded, or why not."""


class EncodedSource(ABC):
    """A source whose images go through `decode_image`."""

    name: str
    class_names: tuple[str, ...] | None
    labelled: bool
    metadata_types: Mapping[str, type]
    remarks: tuple[str, ...] = ()
    label_values: tuple[int, ...] | None = None
    """Of a table whose labels are numbers without names, each once, in order: they may be names."""
    assumed: Mapping[str, str] = MappingProxyType({})
    """What was assumed of images, as `remarks` say it, with the id of the first."""
    limited = False
    """Whether a limit was given: what comes after it is not missing."""
    within: Path | None = None
    """Where files have to lie, links followed, for whoever reads what others name; ``path`` is then said from there."""

    def _remark(self, *remarks: str) -> None:
        """Add to what the user is told; nothing twice."""
        self.remarks = tuple(dict.fromkeys((*self.remarks, *remarks)))

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def _encoded(self) -> Iterator[Item]:
        """All images in order, not decoded; in the place of what cannot even be reached, why."""

    def _allowed(self) -> Iterator[Item]:
        """All images in order; what lies outside of where it has to is not to be read."""
        items = self._encoded()
        return items if self.within is None else (_confined(item, self.within.resolve()) for item in items)

    def natural_shape(self) -> ImageShape:
        """The commonest shape of the first images; (c, 224, 224) where a side is longer than that."""
        shapes: list[ImageShape] = []
        for looked_at, item in enumerate(self._allowed()):
            if len(shapes) == _HEADERS or (shapes and looked_at >= _MOST_HEADERS):
                break
            with contextlib.suppress(ImageError):
                if isinstance(item, Encoded) and item.source is not None:
                    shapes.append(natural_shape(item.source))
        if not shapes:
            raise InputError(f"{self.name}: expected at least one readable image, got none; check the files")
        if remark := said_shapes(shapes):
            self._remark(remark)
        return common_shape(shapes)

    def read(self, shape: Target) -> Iterator[ImageRecord | UnreadableImage]:
        """All images in order, decoded by a few threads that run a bounded number of images ahead."""
        return self._decoded(self._allowed(), shape)

    def read_at(self, shape: Target, positions: Set[int]) -> Iterator[ImageRecord | UnreadableImage]:
        """Those images that `read` would give at these positions, 0 to n−1; no other is decoded."""
        chosen = (item for position, item in enumerate(self._allowed()) if position in positions)
        return self._decoded(chosen, shape)

    def _decoded(self, items: Iterable[Item], shape: Target) -> Iterator[ImageRecord | UnreadableImage]:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="decode") as pool:
            pending: deque[Future[_Decoded]] = deque()
            for chunk in _chunks(items, _CHUNK):
                pending.append(pool.submit(_decode, chunk, shape))
                if len(pending) > _THREADS:
                    yield from self._told(pending.popleft().result())
            while pending:
                yield from self._told(pending.popleft().result())

    def undecoded(self) -> Iterator[Item]:
        """What `read` decodes, for whoever decodes it elsewhere (`PartSource`); paths of files are whole."""
        for item in self._allowed():
            if isinstance(item, Encoded) and isinstance(item.source, Path):
                yield replace(item, source=item.source.absolute())
            else:
                yield item

    def told(self, assumed: Mapping[str, str]) -> None:
        """Say what was assumed of images, once, with the id of the first of which it was."""
        self.assumed = {**assumed, **self.assumed}
        for assumption, first in assumed.items():
            if not any(remark.endswith(assumption) for remark in self.remarks):
                self._remark(f"images such as {first} were {assumption}")

    def _told(self, decoded: "_Decoded") -> list[ImageRecord | UnreadableImage]:
        self.told(decoded.assumed)
        return decoded.records


class PartSource(EncodedSource):
    """Some of a source's images, which another process went through.

    Args:
        name: The source's; so are the others.
        items: In order: still to be decoded, or in the shape that is asked for.
        labelled: Whether records have labels.
        metadata_types: Of the columns.
    """

    def __init__(self, name: str, items: Sequence[Item], *, labelled: bool, metadata_types: Mapping[str, type]) -> None:
        self.name, self._items = name, items
        self.class_names: tuple[str, ...] | None = None
        self.labelled, self.metadata_types = labelled, metadata_types

    def __len__(self) -> int:
        return len(self._items)

    def _encoded(self) -> Iterator[Item]:
        return iter(self._items)


def _confined(item: Item, folder: Path) -> Item:
    if not isinstance(item, Encoded) or not isinstance(item.source, Path):
        return item
    try:
        file = item.source.resolve()
    except (OSError, RuntimeError, ValueError):  # a link to itself, or no path at all
        return UnreadableImage(printable(item.id), "expected the path of a file, got another")
    if not file.is_relative_to(folder):
        return UnreadableImage(printable(item.id), "lies outside of the folder that images may come from")
    said = {"path": str(file.relative_to(folder))} if "path" in item.metadata else {}
    return replace(item, source=file, metadata={**item.metadata, **said})


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A chunk of images, and what was assumed of them with the id of the first of which it was."""

    records: list[ImageRecord | UnreadableImage]
    assumed: dict[str, str]


def _decode(chunk: Sequence[Item], shape: Target) -> _Decoded:
    decoded = _Decoded([], {})
    for item in chunk:
        if not isinstance(item, Encoded):
            decoded.records.append(item)
            continue
        assumed: list[str] = []
        try:
            if item.source is None:
                raise ImageError("expected an image, got null; give its bytes, or its path, or leave it out")
            if printable(item.id) != item.id:
                raise ImageError("expected a name in UTF-8; rename the file")
            image = decode_image(item.source, shape=shape, assumed=assumed)
            decoded.records.append(ImageRecord(item.id, image, item.label, item.metadata))
        except ImageError as error:
            decoded.records.append(UnreadableImage(printable(item.id), printable(str(error))))
        for assumption in assumed:
            decoded.assumed.setdefault(assumption, printable(item.id))
    return decoded


def python_type(kind: "pa.DataType") -> type | None:
    """The metadata type of an Arrow type; None for what metadata cannot hold."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests: dict[type, Callable[[pa.DataType], bool]] = {
        bool: pa.types.is_boolean,
        int: pa.types.is_integer,
        float: pa.types.is_floating,
        str: lambda kind: kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null()),
    }
    return next((python for python, matches in tests.items() if matches(kind)), None)


def free_name(name: str, taken: Iterable[str]) -> str:
    """The name of a metadata column: letters, digits and underscores, prefixed ``source_`` while taken or reserved.

    Lance takes no dots, no empty names, and keeps names like ``_rowid`` for itself.
    """
    name = re.sub(r"\W", "_", name) or "unnamed"
    while name in taken or is_reserved(name):
        name = f"source_{name}"
    return name
