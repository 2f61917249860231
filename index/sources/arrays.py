"""Exemplars from arrays and tensors."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.preprocessing import Target, shape_of
from tmm_engine.index.sources.images import channels_first, to_numpy, to_uint8
from tmm_engine.index.sources.labels import numbered
from tmm_engine.index.sources.records import ImageRecord, free_name, python_type
from tmm_engine.index.types import ImageShape

_BATCH = 1024  # array rows converted at a time


class ArraySource:
    """Images held in memory. They are never resized: their own shape, whatever its size, is the only one they have.

    Args:
        images: (n, c, h, w), (n, h, w, c) or (n, h, w), or a list of n alike; uint8 or floating point in [0, 1]. Not
            copied if an array of uint8.
        labels: n integers, 0 or more, or n names; None among them, or an empty name, for an image without a label.
        ids: n different strings. Default: the row in eight digits.
        class_names: In label order. Default: unknown; of labels that are names, the sorted distinct ones.
        metadata: Column -> n strings, integers, floats or booleans, or None; renamed as in `ParquetSource`.
        name: What an index records as its origin.

    Raises:
        InputError: Other shapes, types, lengths or ranges.
    """

    @checked
    def __init__(
        self,
        images: np.ndarray | torch.Tensor | Sequence[np.ndarray | torch.Tensor],
        labels: Sequence[int | str | None] | np.ndarray | torch.Tensor | None = None,
        *,
        ids: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        metadata: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
        name: str = "arrays",
    ) -> None:
        self.name = name
        self.class_names: tuple[str, ...] | None = None if class_names is None else tuple(class_names)
        self._images = channels_first(_stacked(images))
        if len(self) == 0:
            raise InputError("expected at least one image, got none")
        if self._images.dtype != np.uint8:
            self._images = np.concatenate([to_uint8(batch) for batch in self._batches()])
        self._labels = [None] * len(self) if labels is None else self._checked_labels(labels)
        self.labelled = any(label is not None for label in self._labels)
        self._ids = [f"{row:08d}" for row in range(len(self))] if ids is None else list(ids)
        self._expect_one_each("ids", self._ids)
        if len(set(self._ids)) != len(self):
            raise InputError(f"expected {len(self)} different ids, got {len(set(self._ids))}; make them unique")
        self.metadata_types: Mapping[str, type]
        self.metadata_types, self._columns = self._typed_columns(metadata or {})

    def __len__(self) -> int:
        return len(self._images)

    def natural_shape(self) -> ImageShape:
        """The arrays' shape."""
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    def read(self, shape: Target) -> Iterator[ImageRecord]:
        """All images in order; raises InputError for another shape than the arrays' own."""
        if (expected := shape_of(shape)) != self.natural_shape():
            raise InputError(f"expected arrays of shape {expected}, got {self.natural_shape()}; resize them first")
        return self._records()

    def _records(self) -> Iterator[ImageRecord]:
        for row, image in enumerate(chain.from_iterable(map(to_uint8, self._batches()))):
            metadata = {name: values[row] for name, values in self._columns.items()}
            yield ImageRecord(self._ids[row], image, self._labels[row], metadata)

    def _batches(self) -> Iterator[Shaped[np.ndarray, "batch c h w"]]:
        for start in range(0, len(self), _BATCH):
            yield self._images[start : start + _BATCH]

    def _expect_one_each(self, what: str, values: Sized) -> None:
        if len(values) != len(self):
            raise InputError(f"expected {len(self)} {what}, one per image, got {len(values)}")

    def _checked_labels(self, labels: Sequence[int | str | None] | np.ndarray | torch.Tensor) -> Sequence[int | None]:
        array = np.asarray(labels)
        found: list[Any] = [label if label != "" else None for label in array.ravel().tolist()]
        given = [label for label in found if label is not None]
        kinds = set(map(type, given))
        if array.ndim != 1 or len(kinds - {int}) + len(kinds - {str}) > 1:
            raise InputError(
                f"expected labels as one row of integers or of texts, got {array.dtype} of shape {array.shape}"
            )
        self._expect_one_each("labels", array)
        if str in kinds:
            self.class_names, places = numbered(given, self.class_names)
            place = dict(zip(given, places, strict=True))
            return [None if label is None else place[label] for label in found]
        classes = len(self.class_names) if self.class_names is not None else np.inf
        if given and (min(given) < 0 or max(given) >= classes):
            expected = "0 or more" if self.class_names is None else f"0 to {classes - 1}, as there are class names"
            raise InputError(f"expected labels of {expected}, got {min(given)} to {max(given)}")
        return found

    def _typed_columns(
        self, metadata: Mapping[str, Sequence[Any] | np.ndarray]
    ) -> tuple[dict[str, type], dict[str, list[str | int | float | bool | None]]]:
        import pyarrow as pa

        types: dict[str, type] = {}
        columns: dict[str, list[str | int | float | bool | None]] = {}
        for original, values in metadata.items():
            self._expect_one_each(f"values of {original!r}", values)
            try:
                column = pa.array(values)
            except (pa.ArrowException, OverflowError) as error:
                raise InputError(f"expected metadata {original!r} to be of one type, got {error}") from error
            kind = python_type(column.type)
            if kind is None:
                raise InputError(
                    f"expected metadata {original!r} as strings, integers, floats or booleans, got {column.type}"
                )
            name = free_name(original, types)
            types[name], columns[name] = kind, column.to_pylist()
        return types, columns


def _stacked(images: np.ndarray | torch.Tensor | Sequence[np.ndarray | torch.Tensor]) -> np.ndarray:
    """An array of all, also of a list of them."""
    if isinstance(images, np.ndarray | torch.Tensor):
        return to_numpy(images)
    if not images:
        raise InputError("expected at least one image, got none")
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise InputError(f"expected images of one shape, got {shapes[0]} and {shapes[1]}; resize them first")
    return np.stack([to_numpy(image) for image in images])
