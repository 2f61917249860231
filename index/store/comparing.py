"""What a source's images are beside an index's exemplars: new, changed or the same, by the digests of their rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, UInt64

from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.sources.adapted import AdaptedSource
from tmm_engine.index.sources.records import ImageRecord, ImageSource, UnreadableImage
from tmm_engine.index.store.commit import Change
from tmm_engine.index.store.embedding import EmbeddedBatch, grouped
from tmm_engine.index.store.lance_store import ROW_DIGEST, as_table, flat, row_digests, stored_columns
from tmm_engine.index.types import Rows


class WatchedSource(AdaptedSource):
    """A source in the terms of an index, which remembers what could not be read.

    Args:
        source: The images.
        change: Of the index.
        id_prefix: Put before every id.

    Attributes:
        unreadable: Ids of images that could not be.
    """

    def __init__(self, source: ImageSource, change: Change, id_prefix: str) -> None:
        super().__init__(
            source,
            labels=change.matched(source),
            metadata_types=change.metadata_types,
            id_prefix=id_prefix,
            index=change.index,
            ids=change.ids(),
        )
        self.unreadable: set[str] = set()

    def read(self, shape: Target) -> Iterator[ImageRecord | UnreadableImage]:
        """All images in order.

        Raises:
            InputError: a shard cannot be read: nobody knows which images it holds.
        """
        for record in super().read(shape):
            if isinstance(record, UnreadableImage):
                if record.is_shard:
                    raise InputError(
                        f"{record.id}: {record.reason}; nothing was changed, since its images would count as missing"
                    )
                self.unreadable.add(record.id)
            yield record


@dataclass(frozen=True, slots=True)
class Differing:
    """Those of a few images of a source that the index does not have as they are.

    Attributes:
        embed: New ones, and those with other pixels than the exemplar of their id.
        retold: Those with its pixels, but another label or other metadata: its features are theirs.
        looked_at: How many the few were.
    """

    embed: list[ImageRecord]
    retold: list[ImageRecord]
    looked_at: int


class Comparison:
    """A source beside an index; what is found is complete when `differing` has come to its end.

    Args:
        change: The index's state.
        source: In its terms.

    Attributes:
        ids: Of the exemplars, in row order.
        addresses: Of the exemplars in the dataset.
        predicted: Of the exemplars, whether their labels are.
        met: For each exemplar whether the source has a readable image of its id.
        differs: For each exemplar whether that image, its label or its metadata are others.
        new: Ids of the source that the index does not have.
        embed: How many images have to pass the model.
        kept_labels: How many exemplars keep a label of their own because the source has none at all.
    """

    def __init__(self, change: Change, source: WatchedSource) -> None:
        self._change, self._source = change, source
        table = change.columns("id", "label", "label_is_predicted", ROW_DIGEST, "_rowaddr")
        self.ids: list[str] = table["id"].to_pylist()
        self.addresses: UInt64[np.ndarray, "exemplars"] = table["_rowaddr"].to_numpy()
        self.predicted: Bool[np.ndarray, "exemplars"] = table["label_is_predicted"].to_numpy()
        self._labels = table["label"].to_numpy()
        self._digests = table[ROW_DIGEST]
        self._places = {id_: place for place, id_ in enumerate(self.ids)}
        self.met, self.differs = np.zeros((2, len(self.ids)), dtype=np.bool_)
        self.new: list[str] = []
        self.embed = self.kept_labels = 0

    def differing(self, records: Iterator[ImageRecord]) -> Iterator[Differing]:
        """What differs of a source's records, for a few of them after the other."""
        for group in grouped(records, forward_batch_size(self._change.manifest.image_shape)):
            known = [self._with_known_label(record) for record in group if record.id in self._places]
            new = [record for record in group if record.id not in self._places]
            others = self._others(known)
            same = self._same_pixels(others)
            embed = [*new, *(record for record in others if record.id not in same)]
            self.met[self.places(known)] = True
            self.differs[self.places(others)] = True
            self.new += [record.id for record in new]
            self.embed += len(embed)
            yield Differing(embed, [record for record in others if record.id in same], len(group))

    def places(self, records: Sequence[ImageRecord]) -> Rows:
        """The exemplars of the records' ids, by their places in the row order."""
        return np.array([self._places[record.id] for record in records], dtype=np.int64)

    def leave(self, image: UnreadableImage) -> None:
        """Take back one that was to be embedded, for the model cannot digest it: what there is of it stays."""
        self._source.unreadable.add(image.id)
        self.embed -= 1
        if image.id in self._places:
            self.differs[self._places[image.id]] = False
        else:
            self.new.remove(image.id)

    def missing(self, id_prefix: str) -> Bool[np.ndarray, "exemplars"]:
        """For each exemplar of such an id whether the source has no image of it, not even an unreadable one."""
        own = [id_.startswith(id_prefix) and id_ not in self._source.unreadable for id_ in self.ids]
        return np.array(own, dtype=np.bool_) & ~self.met

    def _with_known_label(self, record: ImageRecord) -> ImageRecord:
        """Of a source that has no labels at all, which says nothing of them: with the exemplar's own, if it has one."""
        place = self._places[record.id]
        if self._source.labelled or self.predicted[place]:
            return record
        self.kept_labels += 1
        return replace(record, label=int(self._labels[place]))

    def _others(self, records: list[ImageRecord]) -> list[ImageRecord]:
        """Those that would make another row than there is; what the model predicted, it predicts of the same pixels."""
        if not records:
            return []
        places = self.places(records)
        batch = EmbeddedBatch(records, np.stack([record.image for record in records]), {}, self._labels[places])
        features = self._change.manifest.columns
        fields = [field for field in self._change.schema if field.name not in (ROW_DIGEST, *features)]
        rows = as_table(stored_columns(batch, self._source.metadata_types), fields)
        found = row_digests(rows, self._change.vocabulary)
        there = self._digests.take(places).to_pylist()
        return [record for record, own, stored in zip(records, found, there, strict=True) if own != stored]

    def _same_pixels(self, records: list[ImageRecord]) -> set[str]:
        """The ids of those whose pixels are their exemplar's."""
        if not records:
            return set()
        stored = flat(self._change.rows(self.places(records), "image")["image"].combine_chunks())
        images = stored.reshape(-1, *self._change.manifest.image_shape)
        return {record.id for record, image in zip(records, images, strict=True) if np.array_equal(record.image, image)}
