"""What sources of exemplars have in common: records, metadata columns, and decoding in order by a few threads."""

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tmm_engine.index.columns import is_column_name
from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.sources.images import decode_image, natural_shape
from tmm_engine.index.types import ImageShape

if TYPE_CHECKING:
    import pyarrow as pa

Metadata = dict[str, str | int | float | bool | None]

RESERVED_COLUMNS = frozenset(("id", "label", "image", "label_is_predicted", "row_digest"))
MAX_NATURAL_SIDE = 224

_CHUNK = 32  # images that one thread decodes at a time
_THREADS = min(8, os.cpu_count() or 1)


def is_reserved(name: str) -> bool:
    """Whether no column of metadata can have this name: the store's own, those of features, and Lance's."""
    return name in RESERVED_COLUMNS or is_column_name(name) or name.startswith("_row")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One readable image.

    Attributes:
        id: Unique within its source.
        image: uint8 (c, h, w) in the shape that was asked for.
        label: Class index, 0 or more; None where the source has no labels.
        metadata: A value for every column of the source's ``metadata_types``.
    """

    id: str
    image: UInt8[np.ndarray, "c h w"]
    label: int | None
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class UnreadableImage:
    """An image that could not be read, in the place where its record would have come."""

    id: str
    reason: str


@runtime_checkable
class ImageSource(Protocol):
    """A finite, repeatable stream of images in a fixed order.

    Attributes:
        name: What an index records as its origin, as in ``cifar10 (train)``.
        class_names: In label order; None where unknown.
        labelled: Whether every record has a label.
        metadata_types: Column -> str, int, float or bool. No column has a reserved name (`is_reserved`).
    """

    name: str
    class_names: tuple[str, ...] | None
    labelled: bool
    metadata_types: Mapping[str, type]

    def __len__(self) -> int:
        """How many records and unreadable images `read` yields."""

    def natural_shape(self) -> ImageShape:
        """The shape of the first readable image; (c, 224, 224) where a side is longer than that, except for arrays.

        Raises:
            InputError: No image is readable.
        """

    def read(self, shape: Target) -> Iterator[ImageRecord | UnreadableImage]:
        """All images in order, each brought to a shape as `index.sources.images.decode_image` does.

        Args:
            shape: (c, h, w), or a classifier's preprocessing where it asks for more than the usual.
        """


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image still to be decoded; `source` is None where there are no bytes."""

    id: str
    source: Path | bytes | Image.Image | None
    label: int | None
    metadata: Metadata


class EncodedSource(ABC):
    """A source whose images go through `decode_image`."""

    name: str
    class_names: tuple[str, ...] | None
    labelled: bool
    metadata_types: Mapping[str, type]

    @abstractmethod
    def _encoded(self) -> Iterator[Encoded]:
        """All images in order, not decoded."""

    def natural_shape(self) -> ImageShape:
        """The shape of the first readable image; (c, 224, 224) where a side is longer than that."""
        for item in self._encoded():
            with contextlib.suppress(ImageError):
                if item.source is not None:
                    channels, height, width = natural_shape(item.source)
                    return _capped(channels, height, width)
        raise InputError(f"{self.name}: expected at least one readable image, got none; check the files")

    def read(self, shape: Target) -> Iterator[ImageRecord | UnreadableImage]:
        """All images in order, decoded by a few threads that run a bounded number of images ahead."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="decode") as pool:
            pending: deque[Future[list[ImageRecord | UnreadableImage]]] = deque()
            for chunk in _chunks(self._encoded(), _CHUNK):
                pending.append(pool.submit(_decode, chunk, shape))
                if len(pending) > _THREADS:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()


def _capped(channels: int, height: int, width: int) -> ImageShape:
    if max(height, width) > MAX_NATURAL_SIDE:
        return channels, MAX_NATURAL_SIDE, MAX_NATURAL_SIDE
    return channels, height, width


def _chunks(items: Iterable[Encoded], size: int) -> Iterator[list[Encoded]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _decode(chunk: Sequence[Encoded], shape: Target) -> list[ImageRecord | UnreadableImage]:
    records: list[ImageRecord | UnreadableImage] = []
    for item in chunk:
        try:
            if item.source is None:
                raise ImageError("expected an image, got null; embed the image's bytes in the Parquet file")
            if printable(item.id) != item.id:
                raise ImageError("expected a name in UTF-8; rename the file")
            records.append(ImageRecord(item.id, decode_image(item.source, shape=shape), item.label, item.metadata))
        except ImageError as error:
            records.append(UnreadableImage(printable(item.id), printable(str(error))))
    return records


def printable(name: str | Path) -> str:
    """A name with whatever is not UTF-8 in it escaped."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


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
