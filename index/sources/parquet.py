"""Exemplars from Parquet files, as Hugging Face's hub has them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tmm_engine.index.arguments import checked
from tmm_engine.index.sources.records import UnreadableImage
from tmm_engine.index.sources.shards import split_shards
from tmm_engine.index.sources.tables import ROWS, TableSource

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetSource(TableSource):
    """Parquet: one file, or a folder of shards, streamed in batches; see `TableSource`.

    Images are a column struct<bytes: binary, path: string>, or of bytes. Shards lie in the folder, in ``data/``, or in
    a folder for each split; see `split_shards`. Ids are ``<split, or the file's stem>/<row>``, rows counted over the
    split's shards in name order; metadata: the struct's ``path`` and other columns, prefixed ``source_`` where their
    name is taken or reserved. One unreadable shard among several is an image that cannot be read.

    Args:
        path: The file or folder.
        split: Which of several.
        limit: Only the first so many rows.
        image_column: Where it is not the only one that holds images, nor called ``image``.
        label_column: Where it is not called ``label``, nor the only ClassLabel, nor the only one with such a name.

    Raises:
        InputError: No such split, several and none chosen, damage, or as `TableSource`.
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
        prefix, files = split_shards(path, ".parquet", split)
        name = path.name if path.is_file() else f"{path.resolve().name} ({prefix})"
        super().__init__(
            name,
            prefix,
            [_shard(file) for file in files],
            image_column=image_column,
            label_column=label_column,
            limit=limit,
            folder=path if path.is_dir() else path.parent,
        )


class ParquetShard:
    """A Parquet file.

    Args:
        path: The file; its footer is read.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path, self.name, self.format = path, path.name, "Parquet"
        with pq.ParquetFile(path) as file:
            self.schema: pa.Schema = file.schema_arrow
            self.rows: int = file.metadata.num_rows

    def batches(self, columns: Sequence[str]) -> "Iterator[pa.RecordBatch]":
        """Batch by batch."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(ROWS, columns=list(columns))


def _shard(path: Path) -> ParquetShard | UnreadableImage:
    import pyarrow as pa

    try:
        return ParquetShard(path)
    except (pa.ArrowException, OSError) as error:
        reason = f"expected readable Parquet, got {error}; fetch or write it again"
        return UnreadableImage(path.name, reason, is_shard=True)
