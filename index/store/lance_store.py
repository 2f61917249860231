"""The exemplars on disk: a Lance dataset, one row per exemplar, read at one version."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64, UInt8
from lance.fragment import FragmentMetadata, write_fragments

from tmm_engine.index.agreement import Agreement, Tally
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import IndexStateError, InputError
from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.places import Places
from tmm_engine.index.sources.records import Metadata
from tmm_engine.index.store.embedding import EmbeddedBatch, predict
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.index.store.manifest import LATEST_HINT, VERSIONS_OF_LANCE
from tmm_engine.index.store.where import matching_positions
from tmm_engine.index.types import ImageShape, Rows

ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
PREDICTED = pa.field("predicted", pa.int64(), nullable=False)
ROW_DIGEST = "row_digest"
DIGEST_BYTES = 16
ROWS_PER_FRAGMENT = 1 << 16
PREDICTED_BYTES = 64 << 20  # of features that classes are predicted of at a time
FRAGMENT_BYTES = 64 << 20  # what a build holds in memory before it is written


def exemplar_schema(
    image_shape: ImageShape,
    columns: Mapping[str, int],
    metadata_types: Mapping[str, type],
    *,
    predictions: bool = True,
) -> pa.Schema:
    """The columns of an exemplar store. Images are stored raw: decompression would dominate a scan.

    Args:
        image_shape: (c, h, w).
        columns: The dimension of every column of features, by name.
        metadata_types: By name of the column.
        predictions: False for exemplars that were written before predicted classes were stored.
    """
    raw = {b"lance-encoding:compression": b"none"}
    channels, height, width = image_shape
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("label", pa.int64(), nullable=False),
            pa.field("label_is_predicted", pa.bool_(), nullable=False),
            *([PREDICTED] if predictions else []),
            pa.field("image", pa.list_(pa.uint8(), channels * height * width), nullable=False, metadata=raw),
            *(
                pa.field(name, pa.list_(pa.float32(), dimension), nullable=False, metadata=raw)
                for name, dimension in columns.items()
            ),
            pa.field(ROW_DIGEST, pa.binary(DIGEST_BYTES), nullable=False),
            *(pa.field(name, ARROW_TYPES[kind]) for name, kind in metadata_types.items()),
        ]
    )


def has_predictions(schema: pa.Schema) -> bool:
    """Whether predicted classes are stored: a column of that name that may be empty is metadata of an older index."""
    return PREDICTED.name in schema.names and schema.field(PREDICTED.name) == PREDICTED


def feature_columns(schema: pa.Schema) -> dict[str, int]:
    """The dimension of every column of features in a schema, by name: nothing else is a fixed-size list of float32."""
    lists = {field.name: field.type for field in schema if pa.types.is_fixed_size_list(field.type)}
    return {name: kind.list_size for name, kind in lists.items() if kind.value_type == pa.float32()}


def row_digests(table: pa.Table, vocabulary: Vocabulary) -> list[bytes]:
    """BLAKE2b of every row but its features and predicted class, which can be computed again.

    A label that is no class of the model's counts by its name, since its number depends on what came before it.

    Args:
        table: Has all columns of `exemplar_schema`, in any order; features and predictions may be missing.
        vocabulary: Of the labels.
    """
    untold = {"image", ROW_DIGEST, *feature_columns(table.schema)}
    untold |= {PREDICTED.name} if has_predictions(table.schema) else set()
    rows = table.select(sorted(set(table.column_names) - untold)).to_pylist()
    for row in rows:
        if not vocabulary.is_class(row["label"]):
            row["label"] = vocabulary.names[row["label"]]
    images = flat(table["image"].combine_chunks()).reshape(len(table), -1)
    return [
        hashlib.blake2b(json.dumps(row, sort_keys=True).encode() + image.tobytes(), digest_size=DIGEST_BYTES).digest()
        for row, image in zip(rows, images, strict=True)
    ]


def stored_columns(batch: EmbeddedBatch, metadata_types: Iterable[str]) -> dict[str, object]:
    """A batch of exemplars as the columns of `exemplar_schema`, for `LanceWriter.write`."""
    return {
        "id": [record.id for record in batch.records],
        "label": batch.labels,
        "label_is_predicted": ~batch.given,
        PREDICTED.name: batch.predicted,
        "image": fixed_size_column(batch.images),
        **{name: fixed_size_column(features) for name, features in batch.features.items()},
        **{name: [record.metadata.get(name) for record in batch.records] for name in metadata_types},
    }


def rows_per_fragment(schema: pa.Schema) -> int:
    """How many rows are written at a time, by their images and features."""
    lists = [field.type for field in schema if pa.types.is_fixed_size_list(field.type)]
    row_bytes = sum(kind.list_size * kind.value_type.bit_width // 8 for kind in lists)
    return max(1, min(ROWS_PER_FRAGMENT, FRAGMENT_BYTES // row_bytes))


def fixed_size_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """An (n, …) array as a column of n fixed-size lists, without a copy."""
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])


def as_table(columns: Mapping[str, object], fields: Sequence[pa.Field]) -> pa.Table:
    """Those of the columns that the fields name, with their types.

    Raises:
        InputError: a value that its column cannot hold.
    """
    return pa.table([_arrow_array(columns[field.name], field) for field in fields], schema=pa.schema(fields))


class LanceWriter:
    """Writes rows fragment by fragment; nothing of it exists for a reader before a commit of the fragments.

    Args:
        path: The dataset's folder.
        schema: Of the rows.
        vocabulary: Of the labels.
    """

    def __init__(self, path: Path, schema: pa.Schema, vocabulary: Vocabulary) -> None:
        self._path = path
        self._schema = schema
        self._vocabulary = vocabulary
        self._fragments: list[FragmentMetadata] = []
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def write(self, columns: Mapping[str, Any]) -> None:
        """Append rows; `columns` maps every column of the schema but the digest to an Arrow array or list.

        Raises:
            InputError: a value that its column cannot hold.
            IndexStateError: a file is shorter than what was written to it.
        """
        rows = as_table(columns, [field for field in self._schema if field.name != ROW_DIGEST])
        digests = pa.array(row_digests(rows, self._vocabulary), pa.binary(DIGEST_BYTES))
        table = rows.append_column(self._schema.field(ROW_DIGEST), digests).select(self._schema.names)
        self._pending.append(table)
        self._pending_rows += len(table)
        if self._pending_rows >= rows_per_fragment(self._schema):
            self._flush()

    def finish(self) -> list[FragmentMetadata]:
        """Write what is left; all fragments, for a commit to make them readable."""
        self._flush()
        return self._fragments

    def commit(self) -> int:
        """Make the rows readable as all that there is; returns the version."""
        return int(committed(str(self._path), lance.LanceOperation.Overwrite(self._schema, self.finish())).version)

    def _flush(self) -> None:
        if self._pending:
            table = pa.concat_tables(self._pending)
            fragments = write_fragments(table, str(self._path), schema=self._schema)
            self._check_whole(fragments)
            self._fragments += fragments
            self._pending, self._pending_rows = [], 0

    def _check_whole(self, fragments: list[FragmentMetadata]) -> None:
        # Lance does not report a last write that fails, as on a disk that is full by then
        for file in (file for fragment in fragments for file in fragment.files):
            path = self._path / "data" / file.path
            if (found := path.stat().st_size) != file.file_size_bytes:
                raise IndexStateError(
                    f"{path} could not be written whole: expected {file.file_size_bytes:,} bytes, got {found:,}; "
                    f"is the disk full? Nothing was changed"
                )


class LanceStore:
    """One version of a Lance dataset of exemplars, as an `ExemplarStore`.

    Args:
        path: The dataset's folder.
        image_shape: (c, h, w), as the index states it.
        columns: The dimension of every column of features, by name, as the index states it.
        version: The Lance version to read.
        classifier: Predicts classes where the dataset was written before they were stored.

    Raises:
        IndexStateError: the dataset is missing, damaged, or not of this form.
    """

    def __init__(
        self,
        path: Path,
        *,
        image_shape: ImageShape,
        columns: Mapping[str, int],
        version: int,
        classifier: Classifier | None = None,
    ) -> None:
        self.image_shape = image_shape
        self.feature_dim = columns[FEATURE]
        self.feature_columns = columns
        with lance_errors(
            f"{path}: version {version} of the exemplars cannot be read", "restore it or build the index again"
        ):
            self._dataset = lance.dataset(str(path), version=version)
            schema = self._dataset.schema
            self._has_predictions = has_predictions(schema)
            known = exemplar_schema(image_shape, columns, {}, predictions=self._has_predictions)
            expected = {field.name: field.type for field in known}
            self._metadata_columns = [name for name in schema.names if name not in expected]
            found = {name: schema.field(name).type for name in expected if name in schema.names}
            if found != expected:
                raise IndexStateError(f"{path}: expected columns {expected}, got {found}; build the index again")
            numbers = ["label", "label_is_predicted", *([PREDICTED.name] if self._has_predictions else [])]
            table = self._dataset.to_table(columns=["id", *numbers])
        self.ids = table["id"].to_numpy()
        self.labels = table["label"].to_numpy().copy()  # Arrow's own memory is read-only
        self.label_is_predicted = table["label_is_predicted"].to_numpy().copy()
        self._predicted = table[PREDICTED.name].to_numpy().copy() if self._has_predictions else None
        self._classifier = classifier

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, rows: Rows) -> UInt8[np.ndarray, "rows c h w"]:
        """Images of the given rows, in their order."""
        return self._take(rows, "image").reshape(-1, *self.image_shape)

    def features(self, rows: Rows, *, column: str = FEATURE) -> Float32[np.ndarray, "rows d"]:
        """Features of the given rows, in their order."""
        return self._take(rows, column).reshape(-1, self.feature_columns[column])

    def predictions(self, rows: Rows) -> Int64[np.ndarray, "rows"]:
        """Predicted classes of the given rows, in their order; those that are not stored are computed of features."""
        if self._predicted is not None:
            return self._predicted[rows]
        assert self._classifier is not None, "exemplars of an older format need the classifier"
        size = max(1, PREDICTED_BYTES // (4 * self.feature_dim))
        parts = [self.features(rows[start : start + size]) for start in range(0, len(rows), size)]
        return np.concatenate([np.empty(0, np.int64), *(predict(part.copy(), self._classifier) for part in parts)])

    def metadata(self, rows: Rows) -> list[Metadata]:
        """Metadata of the given rows, in their order."""
        if not self._metadata_columns:
            return [{} for _ in rows]
        with self._reading():
            table: list[Metadata] = self._dataset.take(rows.tolist(), columns=self._metadata_columns).to_pylist()
        return table

    def matching(self, where: str, vocabulary: Vocabulary) -> Rows:
        """The rows for which a filter is true, ascending."""
        if not self._has_predictions and PREDICTED.name not in self._metadata_columns and PREDICTED.name in where:
            return _matching_copy(self, where, vocabulary)
        with self._reading():
            return matching_positions(self._dataset, where, vocabulary)

    def check_digests(self, batch_size: int, vocabulary: Vocabulary) -> Iterator[tuple[int, list[str]]]:
        """For each batch of rows how many, and the ids of those that are not what was written, features aside."""
        with self._reading():
            columns = [name for name in self._dataset.schema.names if name not in self.feature_columns]
            for batch in self._dataset.to_batches(columns=columns, batch_size=batch_size, scan_in_order=True):
                table = pa.Table.from_batches([batch])
                pairs = zip(row_digests(table, vocabulary), table[ROW_DIGEST].to_pylist(), strict=True)
                wrong = [row for row, (found, expected) in enumerate(pairs) if found != expected]
                yield len(table), [table["id"][row].as_py() for row in wrong]

    @property
    def files(self) -> set[str]:
        """The data and deletion files that this version needs, relative to the dataset."""
        return files_of(self._dataset)

    def places(self) -> Places:
        """Where its rows lie, which stays as it is while others are added and deleted."""
        with self._reading():
            fragments = self._dataset.get_fragments()
            table = self._dataset.to_table(columns=["_rowaddr"])
        files = {fragment.fragment_id: fragment.metadata.files[0].path for fragment in fragments}
        addresses = table["_rowaddr"].to_numpy()
        numbers = np.searchsorted(sorted(files), addresses >> np.uint64(32)).astype(np.int64)
        offsets = (addresses & np.uint64((1 << 32) - 1)).astype(np.int64)
        return Places(tuple(files[number] for number in sorted(files)), (numbers << 32) + offsets)

    def scan_images(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "batch c h w"]]:
        """All images in row order."""
        for values in self._scan("image", batch_size):
            yield values.reshape(-1, *self.image_shape)

    def scan_features(self, batch_size: int, *, column: str = FEATURE) -> Iterator[Float32[np.ndarray, "batch d"]]:
        """All features in row order."""
        for values in self._scan(column, batch_size):
            yield values.reshape(-1, self.feature_columns[column])

    def _take(self, rows: Rows, column: str) -> np.ndarray:
        with self._reading():
            table = self._dataset.take(rows.tolist(), columns=[column])
            return flat(table[column].combine_chunks())

    def _scan(self, column: str, batch_size: int) -> Iterator[np.ndarray]:
        with self._reading():
            for batch in self._dataset.to_batches(columns=[column], batch_size=batch_size, scan_in_order=True):
                yield flat(batch[column])

    def _reading(self) -> AbstractContextManager[None]:
        return lance_errors(f"{self._dataset.uri}: the exemplars can no longer be read", "open the index again")


def matching_rows(store: ExemplarStore, where: str, vocabulary: Vocabulary) -> Rows:
    """The rows of any store for which a filter in SQL is true, ascending.

    Args:
        store: The exemplars.
        where: Over id, label, predicted class and metadata.
        vocabulary: Of the labels.

    Raises:
        InputError: not such a filter (`index.store.where`).
    """
    if isinstance(store, LanceStore):
        return store.matching(where, vocabulary)
    return _matching_copy(store, where, vocabulary)


def _matching_copy(store: ExemplarStore, where: str, vocabulary: Vocabulary) -> Rows:
    """The same of what a filter can ask for, copied into a dataset in memory."""
    rows = np.arange(len(store))
    metadata = store.metadata(rows)
    given: dict[str, object] = {
        "id": store.ids.tolist(),
        "label": store.labels,
        "label_is_predicted": store.label_is_predicted,
        PREDICTED.name: store.predictions(rows),
    }
    columns = {name: [row[name] for row in metadata] for name in metadata[0]}
    nowhere = lance.write_dataset(pa.table(given | columns), f"memory://{os.urandom(16).hex()}")
    return matching_positions(nowhere, where, vocabulary)


def committed(
    dataset: str | lance.LanceDataset, operation: lance.LanceOperation.BaseOperation, *, read_version: int | None = None
) -> lance.LanceDataset:
    """The dataset after a commit, without the hint that Lance leaves: nothing needs it, and nothing vouches for it."""
    result = lance.LanceDataset.commit(dataset, operation, read_version=read_version)
    (Path(result.uri) / VERSIONS_OF_LANCE / LATEST_HINT).unlink(missing_ok=True)
    return result


def stored_agreement(dataset: lance.LanceDataset, vocabulary: Vocabulary) -> Agreement | None:
    """Of stored predictions with labels; None where no predictions are stored."""
    if not has_predictions(dataset.schema):
        return None
    tally = Tally(vocabulary)
    table = dataset.to_table(columns=["label", "label_is_predicted", PREDICTED.name])
    labels, guessed, predicted = (column.to_numpy() for column in table.itercolumns())
    tally.count(labels, ~guessed, predicted)
    return tally.result()


def files_of(dataset: lance.LanceDataset) -> set[str]:
    """The data and deletion files that a version of a dataset needs, relative to it."""
    names = set()
    for fragment in dataset.get_fragments():
        names |= {f"data/{file.path}" for file in fragment.metadata.files}
        if fragment.metadata.deletion_file is not None:
            names.add(fragment.metadata.deletion_file.path(fragment.fragment_id))
    return names


@contextmanager
def lance_errors(what: str, remedy: str) -> Iterator[None]:
    """Whatever Lance raises for files that are damaged or gone becomes an IndexStateError."""
    try:
        yield
    except (InputError, IndexStateError):
        raise
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise IndexStateError(f"{what} ({_first_line(error)}); {remedy}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which Python knows by no other name
            raise
        raise IndexStateError(f"{what} ({_first_line(error)}); {remedy}") from error


def flat(column: pa.FixedSizeListArray) -> np.ndarray:
    """The values of all lists in one row, without a copy."""
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=True)
    return values


def _arrow_array(values: Any, field: pa.Field) -> pa.Array:
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise InputError(f"expected {field.type} in column {field.name!r}, got another value: {error}") from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
