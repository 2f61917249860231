"""Exemplars from Parquet files in Hugging Face's image layout."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.sources.records import Encoded, EncodedSource, free_name, python_type

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 256  # held at a time


class ParquetSource(EncodedSource):
    """Parquet in Hugging Face's image layout: one file, or a folder of shards, streamed in batches.

    Needs a column struct<bytes: binary, path: string>; `label`, or else the only ClassLabel column, gives the labels;
    without one the source is unlabelled. Class names come from the schema's ``huggingface`` metadata. Ids are
    ``<split, or the file's stem>/<row>``, rows counted over the split's shards in name order; metadata: the struct's
    ``path`` and every other column of strings, integers, floats or booleans, prefixed ``source_`` where its name is
    taken or reserved.

    Raises:
        InputError: No such split, several and none chosen, damage, another layout, or labels that are null, negative
            or beyond the class names (looked for in all rows, up to the limit, before any image is read).
    """

    @checked
    def __init__(self, path: str | Path, *, split: str | None = None, limit: int | None = None) -> None:
        import pyarrow.parquet as pq

        path = Path(path)
        self._prefix, self._shards = _shards(path, split)
        self.name = path.name if path.is_file() else f"{path.resolve().name} ({self._prefix})"
        with _arrow_errors(path):
            schemas = [pq.read_schema(shard) for shard in self._shards]
            rows = sum(pq.read_metadata(shard).num_rows for shard in self._shards)
        if not all(schema.equals(schemas[0]) for schema in schemas):
            raise InputError(f"{self.name}: expected shards with the same columns, got different ones; rewrite them")
        if rows == 0:
            raise InputError(f"{self.name}: expected at least one row, got none")
        self._rows: int = min(rows, limit or rows)
        features = _features(schemas[0])
        self._image = _image_column(self.name, schemas[0])
        self._label = _label_column(self.name, schemas[0], features)
        names = features[self._label].get("names") if self._label in features else None
        self.class_names = tuple(str(name) for name in names) if names else None
        self.labelled = self._label is not None
        self._has_path = _has_path(schemas[0].field(self._image).type)
        types: dict[str, type] = {"path": str} if self._has_path else {}
        self._columns: dict[str, str] = {}  # metadata name -> the file's column
        for field in schemas[0]:
            kind = python_type(field.type)
            if kind is not None and field.name != self._label:
                name = free_name(field.name, types)
                types[name], self._columns[name] = kind, field.name
        self.metadata_types = types
        if self._label is not None:
            self._check_labels(self._label)

    def __len__(self) -> int:
        return self._rows

    def _check_labels(self, column: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _arrow_errors(self._shards[0].parent):
            tables = [pq.read_table(shard, columns=[column]) for shard in self._shards]
            labels = pa.concat_tables(tables)[column].slice(0, self._rows).cast(pa.int64())
        classes = len(self.class_names) if self.class_names else None
        values = labels.fill_null(-1).to_numpy()
        wrong = np.flatnonzero((values < 0) | (values >= (classes or np.inf)))
        if wrong.size:
            expected = f"in 0..{classes - 1}" if classes else "of 0 or more"
            got = labels[int(wrong[0])].as_py()
            raise InputError(
                f"{self.name}: expected labels {expected}, got {'null' if got is None else got} in row {wrong[0]} and "
                f"{wrong.size} such rows; drop these rows, or the column {column!r} to let the model predict labels"
            )

    def _encoded(self) -> Iterator[Encoded]:
        import pyarrow.parquet as pq

        columns = [self._image, *self._columns.values(), *([self._label] if self._label else [])]
        row = 0
        for shard in self._shards:
            with _arrow_errors(shard), pq.ParquetFile(shard) as file:
                for batch in file.iter_batches(_ROWS, columns=columns):
                    yield from self._encoded_batch(batch.slice(0, self._rows - row), row)
                    row += len(batch)
                    if row >= self._rows:
                        return

    def _encoded_batch(self, batch: "pa.RecordBatch", start: int) -> Iterator[Encoded]:
        import pyarrow.compute as pc

        images = batch.column(self._image)
        columns = {name: batch.column(column).to_pylist() for name, column in self._columns.items()}
        if self._has_path:
            columns["path"] = pc.struct_field(images, "path").to_pylist()
        labels = batch.column(self._label).to_pylist() if self._label else [None] * len(batch)
        for i, (content, label) in enumerate(zip(pc.struct_field(images, "bytes").to_pylist(), labels, strict=True)):
            metadata = {name: column[i] for name, column in columns.items()}
            yield Encoded(f"{self._prefix}/{start + i:08d}", content, label, metadata)


@contextlib.contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected readable Parquet, got {error}; fetch or write it again") from error


def _shards(path: Path, split: str | None) -> tuple[str, list[Path]]:
    """What ids begin with, and the split's files in name order."""
    files = [path] if path.is_file() else sorted(path.glob("[!.]*.parquet"))
    if not files:
        raise InputError(f"expected a Parquet file or a folder of them, found none at {path}; check the path")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(re.sub(r"-\d+-of-\d+$", "", file.stem), []).append(file)
    if split is None and len(splits) == 1:
        return (path.stem, files) if path.is_file() else (next(iter(splits)), files)
    if split not in splits:
        got = f"{split!r}{nearest(split, splits)}" if split else "none"
        raise InputError(f"{path}: expected one of the splits {', '.join(splits)}, got {got}")
    return split, splits[split]


def _features(schema: "pa.Schema") -> dict[str, dict[str, Any]]:
    """Hugging Face's description of the columns, so far as there is one."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


def _image_column(source: str, schema: "pa.Schema") -> str:
    import pyarrow as pa

    def holds_images(kind: "pa.DataType") -> bool:
        position = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
        return position >= 0 and kind.field(position).type in (pa.binary(), pa.large_binary())

    columns = [field.name for field in schema if holds_images(field.type)]
    if "image" in columns or len(columns) == 1:
        return "image" if "image" in columns else columns[0]
    raise InputError(
        f"{source}: expected one column struct<bytes: binary, path: string>, or several of which one is called "
        f"'image', got {', '.join(f'{field.name}: {field.type}' for field in schema)}; see Hugging Face's image layout"
    )


def _has_path(image: "pa.StructType") -> bool:
    position = image.get_field_index("path")
    return position >= 0 and python_type(image.field(position).type) is str


def _label_column(source: str, schema: "pa.Schema", features: Mapping[str, Mapping[str, Any]]) -> str | None:
    import pyarrow as pa

    classes = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    column = "label" if "label" in schema.names else classes[0] if len(classes) == 1 else None
    if column is not None and not pa.types.is_integer(schema.field(column).type):
        raise InputError(
            f"{source}: expected integers in the label column {column!r}, got {schema.field(column).type}; number the "
            "classes, or rename the column"
        )
    return column
