"""Changes to an index that is there: add, replace, delete, compact. Each makes a new version, whole or not at all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from tmm_engine.index.agreement import Agreement
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.columns import FEATURE, load_columns
from tmm_engine.index.errors import IndexStateError, InputError, nearest
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.names import spelled
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.adapted import AdaptedSource
from tmm_engine.index.sources.records import ImageSource, UnreadableImage
from tmm_engine.index.store.commit import Change, changing, remove_leftovers
from tmm_engine.index.store.embedding import BuildReport, embedded, predict
from tmm_engine.index.store.lance_store import (
    PREDICTED,
    ROW_DIGEST,
    fixed_size_column,
    flat,
    row_digests,
    stored_columns,
)
from tmm_engine.index.store.manifest import VERSIONS, older_versions
from tmm_engine.index.store.where import matching_positions
from tmm_engine.index.wording import some

NAMED = 3  # ids that a message lists


@dataclass(frozen=True, slots=True)
class ChangeReport:
    """What a change did.

    Attributes:
        version: That there is now.
        exemplars: How many it holds.
        added: Exemplars whose id is new.
        replaced: Exemplars whose id was there before.
        deleted: Exemplars that are gone.
        skipped: Images that could not be read, with reasons; the first of them.
        skipped_count: How many in all.
        remarks: What was guessed, left out or converted, in sentences.
        agreement: Of the model's predictions with the labels that were added; None where nothing was.
    """

    version: int
    exemplars: int
    added: int = 0
    replaced: int = 0
    deleted: int = 0
    skipped: list[UnreadableImage] = field(default_factory=list)
    skipped_count: int = 0
    remarks: tuple[str, ...] = ()
    agreement: Agreement | None = None


def add_exemplars(
    index: Path,
    source: ImageSource,
    classifier: Classifier,
    *,
    replace_same: bool = False,
    strict: bool = False,
    id_prefix: str = "",
    progress: Progress = silent,
) -> ChangeReport:
    """Add a source's images to an index.

    Labels are matched by name where they have names, else they are numbers of the model's classes; names that are new
    become labels of the index. Metadata columns that the source does not have stay empty.

    Args:
        index: Its folder.
        source: The images; decoded to the index's shape.
        classifier: The one that the index was built with.
        replace_same: Let images whose id is there take the old one's place, instead of refusing them.
        strict: Fail at the first image that cannot be read instead of skipping it.
        id_prefix: Put before the source's ids.
        progress: Told of images done.

    Raises:
        IndexStateError: no index there, damaged, not writable, full, being written by another process, or with a column
            of features that this program cannot compute.
        InputError: ids that are there already or twice in the source, columns that the index does not have, or, with
            `strict`, an unreadable image.
        ModelError: another classifier.
    """
    with changing(index) as change:
        change.check_model(classifier)
        present, new = change.ids(), set[str]()
        adapted = AdaptedSource(
            source,
            labels=change.matched(source),
            metadata_types=change.metadata_types,
            id_prefix=id_prefix,
            index=index,
            ids=present,
        )
        report = BuildReport()
        columns = load_columns(index, change.manifest.columns, classifier)
        writer = change.writer()
        for batch in embedded(adapted, classifier, columns, report, strict=strict):
            ids = [record.id for record in batch.records]
            if not replace_same:
                _check_free(ids, present, source.name)
            new.update(ids)
            writer.write(stored_columns(batch, adapted.metadata_types))
            progress("adding", report.exemplars + report.skipped_count, len(source))
        addresses = np.array([present[id_] for id_ in new & present.keys()], dtype=np.uint64)
        operation = change.deletion(addresses)
        operation.new_fragments = writer.finish()
        manifest = change.commit(
            operation,
            f"added {len(new) - len(addresses):,}, replaced {len(addresses):,} from {source.name}",
            exemplars=change.manifest.exemplars + len(new) - len(addresses),
            skipped=change.manifest.skipped + report.skipped_count,
            labels_predicted=change.manifest.labels_predicted or report.labels_predicted,
        )
    return ChangeReport(
        manifest.version,
        manifest.exemplars,
        added=len(new) - len(addresses),
        replaced=len(addresses),
        skipped=report.skipped,
        skipped_count=report.skipped_count,
        remarks=report.remarks,
        agreement=report.agreement,
    )


def delete_exemplars(index: Path, *, ids: Sequence[str] = (), where: str | None = None) -> ChangeReport:
    """Remove exemplars by id, or those that a filter matches. Their ids stay free for the same image to come back.

    Raises:
        IndexStateError: as for `add_exemplars`.
        InputError: neither or both given, an id that is not there, a filter that matches nothing, or nothing would
            stay.
    """
    if (len(ids) > 0) == (where is not None):
        got = "neither" if where is None else "both"
        raise InputError(f"delete: expected either ids or a filter (where), got {got}")
    with changing(index) as change:
        present = change.ids()
        if where is None:
            known = spelled(ids, present)
            if unknown := [id_ for id_ in ids if id_ not in known]:
                raise InputError(
                    f"no exemplar has the id {unknown[0]!r}{nearest(unknown[0], present)}; nothing was deleted"
                )
            addresses = np.array([present[id_] for id_ in dict.fromkeys(map(known.__getitem__, ids))], dtype=np.uint64)
            what = f"{len(addresses):,} by id"
        else:
            positions = matching_positions(change.dataset, where, change.vocabulary)
            addresses = np.fromiter(present.values(), np.uint64, len(present))[positions]
            what = f"{len(addresses):,} where {where[:200]}"
        if len(addresses) == 0:
            raise InputError(f"no exemplar matches {where!r}; nothing was deleted")
        if len(addresses) == len(present):
            raise InputError(
                "this would delete every exemplar, and an index has at least one: delete its folder instead"
            )
        left = len(present) - len(addresses)
        manifest = change.commit(change.deletion(addresses), f"deleted {what}", exemplars=left)
    return ChangeReport(manifest.version, left, deleted=len(addresses))


def compact(index: Path, *, discard_versions: bool = False) -> ChangeReport:
    """Write the exemplars anew, without those that are deleted and in few files. Answers stay the same.

    Args:
        index: Its folder.
        discard_versions: Also remove all older versions; what a reader still has open of them is gone then.

    Raises:
        IndexStateError: as for `add_exemplars`; damage is found before anything is written.
    """
    with changing(index) as change:
        change.manifest.check_digests(index, exemplars=True)
        writer = change.writer()
        for table in _whole_rows(change, change.rows_in_memory):
            writer.write({name: table[name].combine_chunks() for name in table.column_names})
        operation = lance.LanceOperation.Overwrite(change.schema, writer.finish())
        manifest = change.commit(operation, "compacted", exemplars=change.manifest.exemplars)
        if discard_versions:
            for number in older_versions(index):
                (index / VERSIONS / f"{number}.json").unlink()
            remove_leftovers(index, manifest)
    return ChangeReport(manifest.version, manifest.exemplars)


def rebuild_features(index: Path, classifier: Classifier, *, progress: Progress = silent) -> ChangeReport:
    """Write the exemplars anew with features computed from their images, where everything but features is intact.

    Raises:
        IndexStateError: as for `add_exemplars`; or an exemplar's image, label or metadata are not what was written: it
            is named.
    """
    with changing(index) as change:
        shape, done = change.manifest.image_shape, 0
        columns = load_columns(index, change.manifest.columns, classifier)
        writer = change.writer()
        for table in _whole_rows(change, min(change.rows_in_memory, forward_batch_size(shape))):
            rows: dict[str, object] = {name: table[name].combine_chunks() for name in table.column_names}
            images = flat(table["image"].combine_chunks()).reshape(-1, *shape).copy()  # Arrow's own memory is read-only
            features = {column.name: column.compute(images) for column in columns}
            rows |= {name: fixed_size_column(computed) for name, computed in features.items()}
            if change.predictions:
                rows[PREDICTED.name] = predict(features[FEATURE], classifier)
            writer.write(rows)
            done += len(table)
            progress("computing features", done, change.manifest.exemplars)
        operation = lance.LanceOperation.Overwrite(change.schema, writer.finish())
        manifest = change.commit(operation, "features computed again", exemplars=change.manifest.exemplars)
    return ChangeReport(manifest.version, manifest.exemplars)


def _whole_rows(change: Change, batch_size: int) -> Iterator[pa.Table]:
    """All exemplars in order, of which all but the features is what was written."""
    for batch in change.batches(batch_size):
        table = pa.Table.from_batches([batch])
        digests = zip(row_digests(table, change.vocabulary), table[ROW_DIGEST].to_pylist(), strict=True)
        wrong = [table["id"][row].as_py() for row, (found, expected) in enumerate(digests) if found != expected]
        if wrong:
            raise IndexStateError(
                f"{change.index}: image, label or metadata of {some(map(repr, wrong), NAMED)} are not what was "
                f"written ({len(wrong)} exemplars or more); restore the index from a copy, or delete them and add them "
                f"again"
            )
        yield table


def _check_free(ids: Sequence[str], present: Mapping[str, int], source: str) -> None:
    if taken := [id_ for id_ in ids if id_ in present]:
        listed = some(map(repr, taken), NAMED)
        raise InputError(
            f"{source}: the index has exemplars of these ids: {listed}; nothing was changed. Replace them "
            f"(`replace=True`), or give the new ones other ids (`id_prefix=…`)"
        )
