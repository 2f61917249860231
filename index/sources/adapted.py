"""A source of images in the terms of an index: its labels, its metadata columns."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.labels import Matched, Vocabulary, match_labels
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.sources.records import ImageRecord, ImageSource, Metadata, UnreadableImage, remarks_of
from tmm_engine.index.types import ImageShape


class AdaptedSource:
    """An `ImageSource` whose labels and metadata mean what they mean in an index.

    Attributes:
        labels: What the source's labels are there.

    Args:
        source: The images.
        labels: What its labels are in the index.
        metadata_types: The index's columns; those that the source does not have stay empty.
        id_prefix: Put before every id.
        index: Where the index is, if it is there yet; for messages.

    Raises:
        InputError: the source has a column that the index does not have, or one of another type.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        labels: Matched,
        metadata_types: Mapping[str, type],
        id_prefix: str = "",
        index: Path | None = None,
    ) -> None:
        self._source = source
        self._prefix = id_prefix
        self.labels = labels
        self.name = source.name
        self.class_names: tuple[str, ...] | None = labels.vocabulary.names
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

    @classmethod
    def of_new_index(cls, source: ImageSource, class_names: tuple[str, ...], *, named: bool = False) -> "AdaptedSource":
        """A source as an index that is built of it has it.

        Args:
            source: The images.
            class_names: The model's.
            named: They were given, even if they are numbers.
        """
        labels = Matched(Vocabulary(class_names), None)
        if source.labelled:
            labels = match_labels(source.name, source.class_names, labels.vocabulary, adopt=True, named=named)
        return cls(source, labels=labels, metadata_types=source.metadata_types)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def remarks(self) -> tuple[str, ...]:
        """The source's, after what is to be said of its labels."""
        return (*self.labels.notes, *remarks_of(self._source))

    def natural_shape(self) -> ImageShape:
        """The source's."""
        return self._source.natural_shape()

    def read(self, shape: Target) -> Iterator[ImageRecord | UnreadableImage]:
        """All images in order; raises InputError for a label that is none of the source's classes."""
        for record in self._source.read(shape):
            if isinstance(record, ImageRecord):
                label = self.labels.label(record.label, record.id)
                yield ImageRecord(self._prefix + record.id, record.image, label, self._metadata(record.metadata))
            else:
                yield replace(record, id=self._prefix + record.id)

    def _metadata(self, given: Metadata) -> Metadata:
        values = {name: given.get(name) for name in self.metadata_types}
        return {
            name: float(value) if kind is float and value is not None else value
            for (name, value), kind in zip(values.items(), self.metadata_types.values(), strict=True)
        }
