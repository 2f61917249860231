"""How an index changes: one writer at a time, from one committed version to the next, whole or not at all.

Under the writers' lock: what a killed writer left behind is removed; new files are written and committed to Lance,
where no reader looks for them; they are digested; the old `index.json` is kept among the older versions; a new one
takes its place. That last rename is the commit. No file that a kept version needs is ever written again.
"""

from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
from jaxtyping import UInt64
from lance.fragment import FragmentMetadata

from tmm_engine.index.errors import IndexStateError, ModelError
from tmm_engine.index.files import TEMPORARY, sync_folder
from tmm_engine.index.labels import Matched, match_labels
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.records import ImageSource, label_values_of
from tmm_engine.index.store.lance_store import (
    ARROW_TYPES,
    LanceWriter,
    committed,
    exemplar_schema,
    files_of,
    has_predictions,
    lance_errors,
    stored_agreement,
)
from tmm_engine.index.store.manifest import (
    EXEMPLARS,
    LATEST_HINT,
    VERSIONS,
    VERSIONS_OF_LANCE,
    Manifest,
    data_files,
    digest_of,
    older_versions,
)
from tmm_engine.index.store.target import locked, recover
from tmm_engine.index.types import Rows


class Change:
    """The state of an index that a writer, alone, starts from; and its commit."""

    def __init__(self, index: Path, manifest: Manifest, kept: set[str]) -> None:
        self.index = index
        self.manifest = manifest
        self._kept = kept
        path = index / EXEMPLARS
        with lance_errors(f"{path}: the exemplars cannot be read", "restore the index or build it again"):
            self.dataset = lance.dataset(str(path), version=manifest.lance_version)
        self.predictions = has_predictions(self.dataset.schema)
        known = exemplar_schema(manifest.image_shape, manifest.columns, {}, predictions=self.predictions)
        python = {arrow: kind for kind, arrow in ARROW_TYPES.items()}
        self.metadata_types: Mapping[str, type] = {
            column.name: python[column.type] for column in self.dataset.schema if column.name not in known.names
        }
        self.schema = exemplar_schema(
            manifest.image_shape, manifest.columns, self.metadata_types, predictions=self.predictions
        )
        self.vocabulary = manifest.vocabulary

    @property
    def rows_in_memory(self) -> int:
        """Of a size that is cheap to hold."""
        return max(1, (16 << 20) // int(np.prod(self.manifest.image_shape)))

    def check_model(self, classifier: Classifier) -> None:
        """Refuse features of another model.

        Raises:
            ModelError: it is not the one that the index was built with.
        """
        if classifier.known_as(self.manifest.fingerprint) is None:
            raise ModelError(
                f"{self.index} was built with the model {self.manifest.fingerprint[:12]}…, this one is "
                f"{classifier.fingerprint[:12]}…: add with the same model, or build the index again"
            )

    def matched(self, source: ImageSource) -> Matched:
        """What a source's labels are in the index; those that are new are its labels with the next commit."""
        if not source.labelled:
            return Matched(self.vocabulary, None)
        found = match_labels(source.name, source.class_names, self.vocabulary, values=label_values_of(source))
        self.vocabulary = found.vocabulary
        return found

    def writer(self) -> LanceWriter:
        """Of new rows, which exist with the next commit."""
        return LanceWriter(self.index / EXEMPLARS, self.schema, self.vocabulary)

    def ids(self) -> dict[str, int]:
        """Every exemplar's address in the dataset, by id, in row order."""
        table = self.columns("id", "_rowaddr")
        return dict(zip(table["id"].to_pylist(), table["_rowaddr"].to_pylist(), strict=True))

    def columns(self, *names: str) -> pa.Table:
        """Some columns of all exemplars, in row order; ``_rowaddr`` is each one's address in the dataset."""
        with self._reading():
            return self.dataset.to_table(columns=list(names))

    def rows(self, positions: Rows, *names: str) -> pa.Table:
        """Some columns of the exemplars at these places of the row order, in the order given."""
        with self._reading():
            return self.dataset.take(positions.tolist(), columns=list(names))

    def batches(self, size: int) -> Iterator[pa.RecordBatch]:
        """All columns of all exemplars in order."""
        with self._reading():
            yield from self.dataset.to_batches(batch_size=size, scan_in_order=True)

    def deletion(self, addresses: UInt64[np.ndarray, "rows"]) -> lance.LanceOperation.Update:
        """The operation that removes these rows, for `commit`."""
        updated: list[FragmentMetadata] = []
        removed: list[int] = []
        for number in np.unique(addresses >> np.uint64(32)).tolist():
            fragment = self.dataset.get_fragment(number)
            assert fragment is not None
            rows = addresses[addresses >> np.uint64(32) == number].tolist()
            with self._reading():
                left = fragment.delete(f"_rowaddr IN ({', '.join(map(str, rows))})")
            if left is None:
                removed.append(number)
            else:
                updated.append(left)
        return lance.LanceOperation.Update(removed_fragment_ids=removed, updated_fragments=updated)

    def commit(
        self,
        operation: lance.LanceOperation.BaseOperation,
        what: str,
        *,
        exemplars: int,
        skipped: int | None = None,
        labels_predicted: bool | None = None,
    ) -> Manifest:
        """Make the operation's result the newest version.

        Raises:
            IndexStateError: it does not hold as many exemplars as expected, or cannot be written.
        """
        old = self.manifest
        with self._reading():
            dataset = committed(self.dataset, operation, read_version=old.lance_version)
            found, needed = dataset.count_rows(), {f"{EXEMPLARS}/{name}" for name in files_of(dataset)}
            agreement = stored_agreement(dataset, self.vocabulary)
        if found != exemplars:
            raise IndexStateError(f"{self.index}: expected {exemplars:,} exemplars, got {found:,}; nothing was changed")
        written = [name for name in data_files(self.index) if not _shared(name) and name not in self._kept]
        new = replace(
            old,
            version=old.version + 1,
            change=what,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            exemplars=exemplars,
            other_labels=self.vocabulary.others,
            agreement=agreement,
            skipped=old.skipped if skipped is None else skipped,
            labels_predicted=old.labels_predicted if labels_predicted is None else labels_predicted,
            lance_version=int(dataset.version),
            files={name: digest for name, digest in old.files.items() if _shared(name) or name in needed}
            | {name: digest_of(self.index / name) for name in written},
        )
        for folder in {(self.index / name).parent for name in written}:
            sync_folder(folder)
        old.keep(self.index)
        new.write(self.index)
        return new

    def _reading(self) -> AbstractContextManager[None]:
        return lance_errors(f"{self.index / EXEMPLARS}: cannot be read or written", "nothing was changed")


def looking(index: Path) -> Change:
    """The newest version, to say what a change would do: beside other writers, and where nothing may be written.

    Raises:
        IndexStateError: no index there, or damaged.
    """
    manifest = Manifest.read(index)
    manifest.check_sizes(index)
    manifest.check_digests(index)
    return Change(index, manifest, set(manifest.files))


@contextmanager
def changing(index: Path) -> Iterator[Change]:
    """Alone among writers, with the newest version as it was committed; an exception leaves that version.

    Raises:
        IndexStateError: no index there, damaged, not writable, full, or being written by another process.
    """
    recover(index)
    Manifest.read(index)  # before a lock file is made beside what is no index
    try:
        with locked(index):
            manifest = Manifest.read(index)
            kept = remove_leftovers(index, manifest)
            manifest.check_sizes(index)
            manifest.check_digests(index)
            try:
                yield Change(index, manifest, kept)
            except BaseException:
                with suppress(OSError, IndexStateError):
                    remove_leftovers(index, Manifest.read(index))
                raise
    except OSError as error:
        raise IndexStateError(f"{index} cannot be written: {error.strerror or error}; nothing was changed") from error


def remove_leftovers(index: Path, manifest: Manifest) -> set[str]:
    """Remove what no version needs: the traces of writers that were killed. Only for who has the lock.

    Returns:
        The files that the kept versions need.

    Raises:
        IndexStateError: an older version cannot be read, so that nobody knows what it needs.
    """
    kept = set(manifest.files)
    for number in older_versions(index):
        if number >= manifest.version:
            (index / VERSIONS / f"{number}.json").unlink()
        else:
            kept |= Manifest.read(index, version=number).files.keys()
    for path in leftovers(index, kept):
        path.unlink(missing_ok=True)
    return kept


def leftovers(index: Path, kept: Set[str]) -> list[Path]:
    """What killed writers left in an index whose versions need the files of these names."""
    exemplars = [index / name for name in data_files(index) if not _shared(name) and name not in kept]
    temporary = [path for folder in (index, index / VERSIONS) for path in folder.glob(f"{TEMPORARY}*")]
    hint = index / EXEMPLARS / VERSIONS_OF_LANCE / LATEST_HINT
    return [*exemplars, *temporary, *([hint] if hint.exists() else [])]


def _shared(name: str) -> bool:
    """Whether a file is the same in all versions."""
    return not name.startswith(f"{EXEMPLARS}/")
