"""`sync_index`: an index becomes what its source has become; only images that are new or changed pass the model."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from lance.fragment import FragmentMetadata

from tmm_engine.index.agreement import Agreement, Tally
from tmm_engine.index.batches import forward_batch_size, prefetched
from tmm_engine.index.columns import FEATURE, load_columns
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import EncodedSource, ImageRecord, ImageSource, UnreadableImage
from tmm_engine.index.store.commit import Change, changing, looking
from tmm_engine.index.store.comparing import Comparison, Differing, WatchedSource
from tmm_engine.index.store.embedding import (
    BuildReport,
    EmbeddedBatch,
    embed_records,
    pass_over,
    predict,
    readable_records,
)
from tmm_engine.index.store.lance_store import flat, stored_columns
from tmm_engine.index.store.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a synchronisation did, or, of a dry run, would do.

    Attributes:
        version: That there is now: the one of before where nothing was to be done.
        exemplars: How many there are then.
        added_ids: Of images that were not there.
        replaced_ids: Of images with other pixels, another label or other metadata than were there.
        missing_ids: Of exemplars that the source has no image of.
        unreadable_ids: Of exemplars whose image can no longer be read: they stay as they were.
        deleted: How many of the missing are gone: all with ``delete``, else none.
        unchanged: How many images are as they were.
        embedded: How many images passed the model: the added, and the replaced with other pixels.
        labels_predicted: Whether the source has no labels: what is added has predictions for them.
        skipped: Images that could not be read, with reasons; the first of them.
        skipped_count: How many in all.
        dry_run: Whether nothing was done.
        remarks: What the source guessed, left out or converted, in sentences.
        agreement: Of the model's predictions with the labels of what was written; None where nothing was.
    """

    version: int
    exemplars: int
    added_ids: tuple[str, ...]
    replaced_ids: tuple[str, ...]
    missing_ids: tuple[str, ...]
    unreadable_ids: tuple[str, ...]
    deleted: int
    unchanged: int
    embedded: int
    labels_predicted: bool
    skipped: tuple[UnreadableImage, ...]
    skipped_count: int
    dry_run: bool
    remarks: tuple[str, ...]
    agreement: Agreement | None = None

    @property
    def added(self) -> int:
        """How many images were not there."""
        return len(self.added_ids)

    @property
    def replaced(self) -> int:
        """How many images took the place of another, or got another label or other metadata."""
        return len(self.replaced_ids)


def sync_index(
    index: Path,
    source: ImageSource,
    classifier: Classifier,
    *,
    delete: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    id_prefix: str = "",
    progress: Progress = silent,
) -> SyncReport:
    """Bring an index to what its source is now, as one new version, or none where nothing has changed.

    An image is compared with the exemplar of its id. It is unchanged where its pixels in the index's shape, its label
    and its metadata are. A label that is new becomes one of the index's. A source that has no labels at all says
    nothing of them: exemplars keep theirs, and what is added gets predictions. With ``delete`` the row digests are then
    those of an index built of the source anew, with these labels, in the classes and columns of this one. What was
    measured when the index was built (descriptors, a global trigger) stays as it is.
    An exemplar whose image can no longer be read stays too, and is reported: an unreadable image is not a missing one.
    A shard that cannot be read is refused: nobody knows which images are in it.

    Args:
        index: Its folder.
        source: All images that the index is to have, or those of the prefix.
        classifier: The one that the index was built with.
        delete: Remove exemplars that the source has no image of.
        dry_run: Say what would happen, and change nothing; nothing passes the model.
        strict: Fail at the first image that cannot be read instead of leaving it as it was.
        id_prefix: Put before the source's ids; exemplars of other ids are left alone.
        progress: Told of images looked at.

    Raises:
        IndexStateError: no index there, damaged, not writable, full, being written by another process, or with a column
            of features that this program cannot compute.
        InputError: `delete` with a source that was opened with a limit, no image can be read, or a shard cannot, an id
            twice in the source, columns that the index does not have, or, with `strict`, an image that is unreadable or
            that the model cannot digest.
        ModelError: another classifier.
    """
    if delete and isinstance(source, EncodedSource) and source.limited:
        raise InputError(
            f"{source.name}: expected a whole source with `delete=True`, got one with a limit, beyond which everything "
            f"would count as missing; leave out one of them"
        )
    with nullcontext(looking(index)) if dry_run else changing(index) as change:
        change.check_model(classifier)
        watched, reading = WatchedSource(source, change, id_prefix), BuildReport()
        comparison = Comparison(change, watched)
        rows = None if dry_run else _Rows(comparison, change, watched, classifier)
        looked_at = 0
        for part in prefetched(comparison.differing(readable_records(watched, classifier, reading, strict=strict))):
            if rows is not None:
                rows.take(part)
            looked_at += part.looked_at
            progress("comparing", looked_at + reading.skipped_count, len(source))
        if not looked_at:
            reasons = "".join(f"\n  {image.id}: {image.reason}" for image in reading.skipped)
            raise InputError(f"{source.name}: no image could be read; nothing was changed{reasons}")
        fragments = [] if rows is None else rows.finish()
        for image in [] if rows is None else rows.indigestible:
            pass_over(image, reading, strict=strict)
            comparison.leave(image)
        missing = comparison.missing(id_prefix)
        report = _report(comparison, watched, reading, change.manifest, missing, delete=delete, dry_run=dry_run)
        if rows is None or not (report.added or report.replaced or report.deleted):
            return report
        gone = comparison.differs | missing if delete else comparison.differs
        predicted = comparison.predicted[~gone].any() or report.labels_predicted
        operation = change.deletion(comparison.addresses[gone])
        operation.new_fragments = fragments
        done = change.commit(
            operation,
            f"synchronised with {source.name}: {report.added:,} added, {report.replaced:,} replaced, "
            f"{report.deleted:,} deleted",
            exemplars=report.exemplars,
            skipped=report.skipped_count if delete else max(change.manifest.skipped, report.skipped_count),
            labels_predicted=bool(predicted),
        )
    return replace(report, version=done.version, agreement=rows.tally.result())


class _Rows:
    """New rows for what differs, in batches as large as a build's.

    Attributes:
        tally: Of the predictions and labels of what was written.
        indigestible: What there can be no rows for, since the model makes numbers of it that are not finite.
    """

    def __init__(self, comparison: Comparison, change: Change, source: ImageSource, classifier: Classifier) -> None:
        self._comparison, self._change = comparison, change
        self._source, self._classifier = source, classifier
        self._columns = load_columns(change.index, change.manifest.columns, classifier)
        self._writer = change.writer()
        self.tally = Tally(change.vocabulary)
        self.indigestible: list[UnreadableImage] = []
        self._pending: list[ImageRecord] = []

    def take(self, part: Differing) -> None:
        """Write what is retold, and what is to be embedded as soon as it is a batch."""
        size = forward_batch_size(self._classifier.image_shape)
        self._pending += part.embed
        while len(self._pending) >= size:
            self._embed(size)
        if part.retold:
            self._write(self._with_stored_features(part.retold))

    def finish(self) -> list[FragmentMetadata]:
        """The fragments of all rows, for a commit."""
        if self._pending:
            self._embed(len(self._pending))
        return self._writer.finish()

    def _embed(self, count: int) -> None:
        batch, bad = embed_records(self._pending[:count], self._classifier, self._columns)
        self.indigestible += bad
        if batch.records:
            self._write(batch)
        del self._pending[:count]

    def _with_stored_features(self, records: list[ImageRecord]) -> EmbeddedBatch:
        names = [column.name for column in self._columns]
        table = self._change.rows(self._comparison.places(records), *names)
        features = {
            name: flat(table[name].combine_chunks()).reshape(len(records), -1).copy()  # Arrow's own memory is read-only
            for name in names
        }
        images = np.stack([record.image for record in records])
        return EmbeddedBatch(records, images, features, predict(features[FEATURE], self._classifier))

    def _write(self, batch: EmbeddedBatch) -> None:
        self.tally.count(batch.labels, batch.given, batch.predicted)
        self._writer.write(stored_columns(batch, self._source.metadata_types))


def _report(
    comparison: Comparison,
    source: WatchedSource,
    reading: BuildReport,
    manifest: Manifest,
    missing: Bool[np.ndarray, "exemplars"],
    *,
    delete: bool,
    dry_run: bool,
) -> SyncReport:
    deleted = int(missing.sum()) if delete else 0
    kept = comparison.kept_labels
    said = [f"{source.name} has no labels: {kept:,} exemplars keep the labels that they have"] if kept else []
    return SyncReport(
        version=manifest.version,
        exemplars=manifest.exemplars + len(comparison.new) - deleted,
        added_ids=tuple(comparison.new),
        replaced_ids=tuple(compress(comparison.ids, comparison.differs)),
        missing_ids=tuple(compress(comparison.ids, missing)),
        unreadable_ids=tuple(id_ for id_ in comparison.ids if id_ in source.unreadable),
        deleted=deleted,
        unchanged=int((comparison.met & ~comparison.differs).sum()),
        embedded=comparison.embed,
        labels_predicted=not source.labelled,
        skipped=tuple(reading.skipped),
        skipped_count=reading.skipped_count,
        dry_run=dry_run,
        remarks=(*reading.remarks, *said),
    )
