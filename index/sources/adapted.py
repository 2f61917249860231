"""A source of images in the terms of an index: its labels, its metadata columns."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.labels import Matched, Vocabulary, match_labels
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.names import composed
from tmm_engine.index.sources.records import (
    ImageRecord,
    ImageSource,
    Metadata,
    UnreadableImage,
    label_values_of,
    remarks_of,
)
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
        ids: Its exemplars'; an id that is one of them but for its Unicode form becomes that.

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
        ids: Collection[str] = (),
    ) -> None:
        self._source = source
        self._prefix = id_prefix
        self._ids = ids
        self._read = self._unlabelled = 0
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
            values = label_values_of(source)
            labels = match_labels(
                source.name, source.class_names, labels.vocabulary, values=values, adopt=True, named=named
            )
        return cls(source, labels=labels, metadata_types=source.metadata_types)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def counted(self) -> tuple[int, int]:
        """How many images were read, and how many of these have no label."""
        return self._read, self._unlabelled

    def count(self, read: int, unlabelled: int) -> None:
        """Add what others have read of the same source."""
        self._read += read
        self._unlabelled += unlabelled

    @property
    def source(self) -> ImageSource:
        """As it was given."""
        return self._source

    @property
    def remarks(self) -> tuple[str, ...]:
        """The source's, after what is to be said of its labels; of those that are missing, when all was read."""
        missing = f"{self._unlabelled:,} of {self._read:,} images have no label: predictions stand in"
        said = [missing] if self.labelled and self._unlabelled else []
        return (*self.labels.notes, *remarks_of(self._source), *said)

    def natural_shape(self) -> ImageShape:
        """The source's."""
        return self._source.natural_shape()

    def read(self, shape: Target) -> Iterator[ImageRecord | UnreadableImage]:
        """All images in order; raises InputError for a label that is none of the source's classes."""
        self._read = self._unlabelled = 0
        for record in self._source.read(shape):
            if isinstance(record, ImageRecord):
                self._read += 1
                self._unlabelled += record.label is None
                label = self.labels.label(record.label, record.id)
                yield ImageRecord(self._id(record.id), record.image, label, self._metadata(record.metadata))
            else:
                yield replace(record, id=self._id(record.id))

    def _id(self, own: str) -> str:
        id_ = self._prefix + own
        return id_ if id_.isascii() or id_ in self._ids else self._by_form.get(composed(id_), id_)

    @cached_property
    def _by_form(self) -> dict[str, str]:
        """The index's ids by the form in which those that look the same are the same, where only one is."""
        forms = Counter(map(composed, self._ids))
        return {form: id_ for id_ in self._ids if forms[form := composed(id_)] == 1}

    def _metadata(self, given: Metadata) -> Metadata:
        values = {name: given.get(name) for name in self.metadata_types}
        return {
            name: float(value) if kind is float and value is not None else value
            for (name, value), kind in zip(values.items(), self.metadata_types.values(), strict=True)
        }
