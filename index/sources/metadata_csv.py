"""Metadata for a folder of images: `metadata.csv`, `.jsonl` or `.parquet` in it, as Hugging Face's folders have."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.limits import MAX_METADATA_CSV_BYTES
from tmm_engine.index.names import spelled
from tmm_engine.index.sources.records import Metadata, free_name, python_type
from tmm_engine.index.sources.roles import LABEL_NAMES
from tmm_engine.index.sources.text_tables import read_text_table

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NAME_COLUMNS = ("file_name", "path", "id")  # the first of them names the image, relative to the folder


@dataclass(frozen=True, slots=True)
class MetadataTable:
    """Rows of metadata by the name of the image.

    Attributes:
        path: The file.
        types: Column -> str, int, float or bool.
        rows: Name of an image -> a value for every column.
        remarks: What the user should know of it.
    """

    path: Path
    types: dict[str, type]
    rows: dict[str, Metadata]
    remarks: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, *, taken: Iterable[str]) -> "MetadataTable":
        """Read a table; its columns are those of `read_text_table`, without lists and objects, which `remarks` names.

        Args:
            path: The file; text in UTF-8.
            taken: Names of columns that are in use; a column of such a name is prefixed ``source_``.

        Raises:
            InputError: not such a file, too large, no column that names images, or an image named twice.
        """
        import pyarrow as pa

        table = read_text_table(path) if path.suffix != ".parquet" else _read_parquet(path)
        key = next((name for name in NAME_COLUMNS if name in table.column_names), None)
        if key is None:
            raise InputError(
                f"{path}: expected a column with the images' names, one of {', '.join(NAME_COLUMNS)}, got "
                f"{', '.join(table.column_names)[:200]}"
            )
        names = table[key].cast(pa.string()).to_pylist()
        if len(set(names)) != len(names) or None in names:
            raise InputError(f"{path}: expected every image once in the column {key!r}, got one twice, or none")
        types: dict[str, type] = {}
        columns, left_out = {}, []
        for column in (name for name in table.column_names if name != key):
            kind = python_type(table[column].type)
            if kind is None:
                left_out.append(f"{column} ({table[column].type})")
                continue
            name = free_name(column, {*taken, *types})
            columns[name], types[name] = table[column].to_pylist(), kind
        rows = {image: {name: column[row] for name, column in columns.items()} for row, image in enumerate(names)}
        remarks = [f"{path.name}: columns left out: {', '.join(left_out)}"] if left_out else []
        if labels := [name for name in table.column_names if name.lower() in LABEL_NAMES]:
            remarks.append(
                f"{path.name}: the column {labels[0]!r} is metadata; to take its values for labels, open {path} itself"
            )
        return cls(path, types, rows, tuple(remarks))

    def matched(self, images: Iterable[str]) -> "MetadataTable":
        """The table with the names that the images have, where they differ in Unicode form.

        Raises:
            InputError: an image that is not there: most likely the names are not what they should be; or one twice.
        """
        known = dict.fromkeys(images)
        names = spelled(self.rows, known)
        unknown = [name for name in self.rows if name not in names]
        if unknown:
            raise InputError(
                f"{self.path}: no image is called {unknown[0]!r}{nearest(unknown[0], known)}, nor {len(unknown) - 1:,} "
                f"others that it names; expected paths relative to the folder"
            )
        if len(set(names.values())) != len(names):
            raise InputError(f"{self.path}: expected every image once, got one twice, in two Unicode forms")
        return replace(self, rows={names[name]: row for name, row in self.rows.items()})

    def of(self, image: str) -> Metadata:
        """The metadata of an image; empty where it has none."""
        return self.rows.get(image) or dict.fromkeys(self.types)


def _read_parquet(path: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if (size := path.stat().st_size) > MAX_METADATA_CSV_BYTES:
            raise InputError(f"{path}: expected at most {MAX_METADATA_CSV_BYTES >> 20} MiB, got {size:,} bytes")
        table: pa.Table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: expected readable Parquet, got {error}; write it again") from error
    return table
