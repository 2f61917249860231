"""Exemplars from tables: rows with an image and its label, in one shard or several."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.labels import Labels
from tmm_engine.index.sources.records import (
    Encoded,
    EncodedSource,
    Metadata,
    UnreadableImage,
    free_name,
    python_type,
)
from tmm_engine.index.sources.roles import Features, is_text, roles_of
from tmm_engine.index.sources.text_tables import SPELLING

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 256  # held at a time


@runtime_checkable
class Shard(Protocol):
    """A part of a table.

    Attributes:
        name: For messages.
        format: What it is, for messages.
        rows: How many it has.
        schema: Its columns.
    """

    name: str
    format: str
    rows: int
    schema: "pa.Schema"

    def batches(self, columns: Sequence[str]) -> "Iterator[pa.RecordBatch]":
        """These columns of all rows, in order; may raise what Arrow raises, or OSError."""


class TableSource(EncodedSource):
    """A table with a column of images: a struct of bytes and path, bare bytes, or paths.

    Labels are integers, with the class names that the schema's ``huggingface`` metadata have, or names, whose sorted
    distinct values are the class names. Every other column of text, numbers or booleans is metadata; dates and times
    become text and decimals floating point, which `remarks` says, as it does what is left out and which columns were
    guessed to be images and labels.

    Args:
        name: What an index records as its origin.
        prefix: Of ids, which are ``<prefix>/<row>``; the rows are counted over all shards. After a shard that cannot be
            read they are ``<shard>/<row>``, so that no id means another row than it does with all shards. Paths are
            ids themselves.
        shards: In order; in the place of one that cannot be read, why.
        image_column: Where it is not the only one that holds images, nor called ``image``.
        label_column: Where it is not called ``label``, nor the only one of its kind.
        limit: Only the first so many rows.
        folder: What paths are relative to; None: as they are.
        paths: Whether images are paths in a column of text that is called so, as in CSV; elsewhere it is said.

    Raises:
        InputError: no rows, shards with different columns, columns that could be several, or labels that cannot be
            used (looked for in all rows, up to the limit, before any image is read).
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        shards: Sequence[Shard | UnreadableImage],
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        limit: int | None = None,
        folder: Path | None = None,
        paths: bool = False,
    ) -> None:
        self.name, self._prefix, self._shards, self._folder = name, prefix, shards, folder
        readable = [shard for shard in shards if not isinstance(shard, UnreadableImage)]
        if not readable:
            reasons = [shard.reason for shard in shards if isinstance(shard, UnreadableImage)]
            raise InputError(f"{name}: {reasons[0] if reasons else 'expected at least one row, got no shard'}")
        schema = readable[0].schema
        for shard in readable:
            if not shard.schema.equals(schema):
                raise InputError(
                    f"{name}: expected shards with the same columns, got {', '.join(schema.names)} in "
                    f"{readable[0].name} and {', '.join(shard.schema.names)} in {shard.name}, or of other types; "
                    f"rewrite them"
                )
        rows = sum(shard.rows for shard in readable)
        if rows == 0:
            raise InputError(f"{name}: expected at least one row, got none")
        self._rows: int = min(rows, limit or rows)
        self.limited = limit is not None
        features = features_of(schema)
        roles = roles_of(name, schema, features, image=image_column, label=label_column, paths=paths)
        self._image, self._image_type = roles.image, schema.field(roles.image).type
        self._remark(*filter(None, [roles.said]))
        if not paths and not self._has_bytes():
            where = f"relative to {folder}" if folder and folder != Path() else "relative to the current folder"
            self._remark(f"images are files: the column {roles.image!r} has their paths, {where}")
        self._label, self._labels = roles.label, self._read_labels(roles.label, readable, features)
        self.class_names = self._labels.class_names if self._labels else None
        self.label_values = self._labels.values if self._labels else None
        self.labelled = self._labels is not None
        self._columns: dict[str, str] = {}  # metadata name -> the table's column
        self._converted: dict[str, Callable[[Any], str | float]] = {}
        self.metadata_types: Mapping[str, type] = self._metadata_columns(schema)

    def __len__(self) -> int:
        return self._rows + sum(isinstance(shard, UnreadableImage) for shard in self._shards)

    def _read_labels(self, column: str | None, shards: Sequence[Shard], features: Features) -> Labels | None:
        import pyarrow as pa

        if column is None:
            return None
        parts = list[pa.Array]()
        for shard in shards:
            try:
                parts += [batch.column(0) for batch in shard.batches([column])]
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(shard, error) from error
        values = pa.chunked_array(parts, shards[0].schema.field(column).type)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        names, spelling = features.get(column, {}).get("names"), shards[0].schema.field(column).metadata or {}
        if pa.types.is_boolean(values.type):
            names = [spelling.get(key, key.title()).decode() for key in SPELLING]
        labels = Labels.read(self.name, values, names, rows=self._rows)
        if labels is None:
            self._remark(f"the column {column!r} has no labels: null, empty, or -1, in all rows")
        return labels

    def _metadata_columns(self, schema: "pa.Schema") -> dict[str, type]:
        types: dict[str, type] = {"path": str} if self._has_path() else {}
        left_out, as_text, as_numbers = list[str](), list[str](), list[str]()
        for field in schema:
            if field.name in (self._image, self._label):
                continue
            kind = python_type(field.type)
            if kind is None and (kind := converted_type(field.type)) is None:
                left_out.append(f"{field.name} ({field.type})")
                continue
            name = free_name(field.name, types)
            types[name], self._columns[name] = kind, field.name
            if python_type(field.type) is None:
                self._converted[name] = kind
                (as_text if kind is str else as_numbers).append(f"{field.name} ({field.type})")
        for what, columns in (("kept as text", as_text), ("kept as numbers", as_numbers), ("left out", left_out)):
            if columns:
                self._remark(f"columns {what}: {', '.join(columns)}")
        return types

    def _has_bytes(self) -> bool:
        import pyarrow as pa

        if not pa.types.is_struct(self._image_type):
            return not is_text(self._image_type)
        return bool(self._image_type.get_field_index("bytes") >= 0)

    def _has_path(self) -> bool:
        import pyarrow as pa

        if not pa.types.is_struct(self._image_type):
            return is_text(self._image_type)
        position = self._image_type.get_field_index("path")
        return position >= 0 and python_type(self._image_type.field(position).type) is str

    def _encoded(self) -> Iterator[Encoded | UnreadableImage]:
        import pyarrow as pa

        columns = list(dict.fromkeys([self._image, *self._columns.values(), *filter(None, [self._label])]))
        before, all_read = 0, True  # rows of the shards before, and whether they are known
        for shard in self._shards:
            if isinstance(shard, UnreadableImage):
                all_read = False
                yield shard
                continue
            row = 0
            try:
                for batch in shard.batches(columns):
                    numbered = (self._prefix, before + row) if all_read else (Path(shard.name).stem, row)
                    yield from self._encoded_batch(batch.slice(0, self._rows - before - row), *numbered)
                    row += len(batch)
                    if before + row >= self._rows:
                        return
            except (pa.ArrowException, OSError) as error:
                if len(self._shards) == 1:
                    raise _unreadable(shard, error) from error
                yield UnreadableImage(shard.name, f"cannot be read from row {row} on: {error}", is_shard=True)
            before += shard.rows

    def _encoded_batch(self, batch: "pa.RecordBatch", prefix: str, start: int) -> Iterator[Encoded]:
        columns = {name: self._values(batch, name) for name in self._columns}
        images = batch.column(self._image).to_pylist()
        labels = batch.column(self._label).to_pylist() if self._label and self._labels else [None] * len(batch)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            metadata: Metadata = {name: column[i] for name, column in columns.items()}
            id_, content = f"{prefix}/{start + i:08d}", image
            if isinstance(image, Mapping):
                content = image.get("bytes")
                if content is None and image.get("path") and self._folder is not None:
                    content = self._folder / image["path"]
                if self._has_path():
                    metadata["path"] = image.get("path")
            elif isinstance(image, str):
                id_, content = Path(image).as_posix(), (self._folder or Path()) / image
                metadata["path"] = str(content)
            elif self._has_path():
                metadata["path"] = None
            yield Encoded(id_, content, self._labels.of(label) if self._labels else None, metadata)

    def _values(self, batch: "pa.RecordBatch", name: str) -> list[Any]:
        values = batch.column(self._columns[name])
        kind = self._converted.get(name)
        if kind is None:
            return list(values.to_pylist())
        if kind is str:
            import pyarrow as pa

            return list(values.cast(pa.string()).to_pylist())
        return [None if value is None else float(value) for value in values.to_pylist()]


def _unreadable(shard: Shard, error: Exception) -> InputError:
    return InputError(f"{shard.name}: expected readable {shard.format}, got {error}; write it again")


def converted_type(kind: "pa.DataType") -> type | None:
    """What dates, times and decimals become; None for what metadata cannot hold."""
    import pyarrow as pa

    if pa.types.is_decimal(kind):
        return float
    return str if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind) else None


def features_of(schema: "pa.Schema") -> Features:
    """Hugging Face's description of the columns, so far as there is one."""
    with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    return {}
