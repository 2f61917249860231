"""A source of images in the terms of an index that is there: its classes, its metadata columns."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.names import spelled
from tmm_engine.index.sources.records import ImageRecord, ImageSource, Metadata, UnreadableImage, remarks_of
from tmm_engine.index.types import ImageShape


class AdaptedSource:
    """An `ImageSource` whose labels and metadata mean what they mean in an index.

    Args:
        source: The images.
        class_names: The index's, in label order.
        metadata_types: The index's columns; those that the source does not have stay empty.
        id_prefix: Put before every id.
        index: Where the index is, for messages.

    Raises:
        InputError: the source has a class or a column that the index does not have, or a column of another type.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        class_names: tuple[str, ...],
        metadata_types: Mapping[str, type],
        id_prefix: str,
        index: Path,
    ) -> None:
        self._source = source
        self._prefix = id_prefix
        self._labels = _label_map(source, class_names, index)
        self.name = source.name
        self.class_names: tuple[str, ...] | None = class_names
        self.labelled = source.labelled
        self.metadata_types = metadata_types
        for name, kind in source.metadata_types.items():
            expected = metadata_types.get(name)
            if expected is None:
                raise InputError(
                    f"{source.name}: the index {index} has no metadata column {name!r}{nearest(name, metadata_types)}; "
                    f"leave it out, or build the index again with all columns"
                )
            if expected is not kind and (kind, expected) != (int, float):
                raise InputError(
                    f"{source.name}: expected {expected.__name__} in the metadata column {name!r}, as in {index}, got "
                    f"{kind.__name__}; convert it"
                )

    def __len__(self) -> int:
        return len(self._source)

    @property
    def remarks(self) -> tuple[str, ...]:
        """The source's."""
        return remarks_of(self._source)

    def natural_shape(self) -> ImageShape:
        """The source's."""
        return self._source.natural_shape()

    def read(self, shape: Target) -> Iterator[ImageRecord | UnreadableImage]:
        """All images in order."""
        for record in self._source.read(shape):
            if isinstance(record, ImageRecord):
                label = record.label if self._labels is None or record.label is None else self._labels[record.label]
                yield ImageRecord(self._prefix + record.id, record.image, label, self._metadata(record.metadata))
            else:
                yield replace(record, id=self._prefix + record.id)

    def _metadata(self, given: Metadata) -> Metadata:
        values = {name: given.get(name) for name in self.metadata_types}
        return {
            name: float(value) if kind is float and value is not None else value
            for (name, value), kind in zip(values.items(), self.metadata_types.values(), strict=True)
        }


def _label_map(source: ImageSource, class_names: tuple[str, ...], index: Path) -> list[int] | None:
    """For each class of the source its label in the index; None where they are the same.

    A folder that holds only some of the classes numbers them otherwise than the index does.
    """
    if not source.labelled or not source.class_names or source.class_names == class_names:
        return None
    known = spelled(source.class_names, class_names)
    unknown = [name for name in source.class_names if class_names.count(known.get(name, name)) != 1]
    if unknown:
        raise InputError(
            f"{source.name}: the classes of {index} are not called {', '.join(map(repr, unknown[:3]))}"
            f"{nearest(unknown[0], class_names)}; rename them, or add the images without labels (a flat folder)"
        )
    return [class_names.index(known[name]) for name in source.class_names]
