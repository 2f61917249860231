"""Exemplars from a list of paths and labels: CSV, tab-separated values, or JSON Lines."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.tables import ROWS, TableSource
from tmm_engine.index.sources.text_tables import TEXT_TABLES, read_text_table

if TYPE_CHECKING:
    import pyarrow as pa


class ListSource(TableSource):
    """A list of images: one row each, with a path, relative to the list, and, where there is one, a label.

    Ids are the paths as they are written; metadata: ``path``, and the other columns; see `TableSource`.

    Args:
        path: CSV with a header line, tab-separated values, or JSON Lines (`TEXT_TABLES`).
        split: There is none: refused.
        limit: Only the first so many rows.
        image_column: The paths' column, where it is not called ``file_name``, nor the only one of `PATH_NAMES`.
        label_column: Where it is not called ``label``, nor the only one of `LABEL_NAMES`.

    Raises:
        InputError: not such a file, or as `TableSource`.
    """

    @checked
    def __init__(
        self,
        path: str | Path,
        *,
        split: str | None = None,
        limit: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        path = Path(path)
        if split is not None:
            raise InputError(f"{path.name}: expected no split, which a list does not have, got {split!r}; leave it out")
        shard = TableShard(read_text_table(path), path.name, TEXT_TABLES[path.suffix.lower()])
        super().__init__(
            path.name,
            path.stem,
            [shard],
            image_column=image_column,
            label_column=label_column,
            limit=limit,
            folder=path.parent,
            paths=True,
        )


class TableShard:
    """A table in memory.

    Args:
        table: The rows.
        name: For messages.
        written_as: CSV or another, for messages.
    """

    def __init__(self, table: "pa.Table", name: str, written_as: str) -> None:
        self._table, self.name, self.format = table, name, written_as
        self.rows, self.schema = len(table), table.schema

    def batches(self, columns: Sequence[str]) -> "Iterator[pa.RecordBatch]":
        """Batch by batch."""
        yield from self._table.select(list(columns)).to_batches(ROWS)
