"""Metadata for a folder of images from a CSV file: `metadata.csv` inside it, as Hugging Face's image folders have."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.limits import MAX_METADATA_CSV_BYTES
from tmm_engine.index.names import spelled
from tmm_engine.index.sources.records import Metadata, free_name, python_type

METADATA_CSV = "metadata.csv"
NAME_COLUMNS = ("file_name", "path", "id")  # the first of them names the image, relative to the folder


@dataclass(frozen=True, slots=True)
class MetadataTable:
    """Rows of metadata by the name of the image.

    Attributes:
        path: The file.
        types: Column -> str, int, float or bool.
        rows: Name of an image -> a value for every column.
    """

    path: Path
    types: dict[str, type]
    rows: dict[str, Metadata]

    @classmethod
    def read(cls, path: Path, *, taken: Iterable[str]) -> "MetadataTable":
        """Read a CSV file with a header line; columns that are not text, numbers or booleans become text.

        Args:
            path: The file, in UTF-8.
            taken: Names of columns that are in use; a column of such a name is prefixed ``source_``.

        Raises:
            InputError: not such a file, too large, no column that names images, or an image named twice.
        """
        import pyarrow as pa
        from pyarrow import csv

        try:
            size = path.stat().st_size
            if size > MAX_METADATA_CSV_BYTES:
                raise InputError(f"{path}: expected at most {MAX_METADATA_CSV_BYTES >> 20} MiB, got {size:,} bytes")
            table = csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True))
            texts = [column if python_type(column.type) else column.cast(pa.string()) for column in table.columns]
            table = pa.table(texts, names=table.column_names)
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise InputError(f"{path}: expected CSV with a header line, got {error}; write it again") from error
        key = next((name for name in NAME_COLUMNS if table.column_names.count(name) == 1), None)
        if key is None or len(set(table.column_names)) != table.num_columns:
            raise InputError(
                f"{path}: expected different columns, and one of {', '.join(NAME_COLUMNS)} with the images' names, got "
                f"{', '.join(table.column_names)[:200]}"
            )
        names = table[key].cast(pa.string()).to_pylist()
        if len(set(names)) != len(names) or None in names:
            raise InputError(f"{path}: expected every image once in the column {key!r}, got one twice, or none")
        types: dict[str, type] = {}
        columns = {}
        for column in (name for name in table.column_names if name != key):
            name = free_name(column, {*taken, *types})
            columns[name], types[name] = table[column].to_pylist(), python_type(table[column].type) or str
        rows = {image: {name: column[row] for name, column in columns.items()} for row, image in enumerate(names)}
        return cls(path, types, rows)

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
