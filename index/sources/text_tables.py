"""Tables in text: CSV, tab-separated values, and JSON Lines, in which nothing that is written is lost."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmm_engine.index.errors import InputError
from tmm_engine.index.limits import MAX_METADATA_CSV_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

TEXT_TABLES = {".csv": "CSV", ".tsv": "CSV", ".jsonl": "JSON Lines", ".ndjson": "JSON Lines"}
"""Suffix -> format of the tables that are read."""

SPELLING = (b"false", b"true")
"""In the metadata of a field of booleans: how each is written."""

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_MOST_DIGITS = 15  # that floating point holds exactly


def read_text_table(path: Path) -> "pa.Table":
    """The rows of a CSV file with a header line, or of JSON Lines.

    A column of CSV is of numbers or booleans where each of its values is written as its number would be, or all with as
    many decimals: ``007`` is text, and so are ``1.1`` and ``1.10`` in one column. Only what is empty is null. Spaces
    around a column's name are no part of it; one that stands before it and before all values, as after a comma, is no
    part of them. How booleans are written is in their field's metadata (`SPELLING`). A column of JSON whose values are
    of several types becomes text.

    Args:
        path: The file, in UTF-8.

    Raises:
        InputError: not such a file, too large, or two columns of one name.
    """
    import pyarrow as pa

    kind = TEXT_TABLES[path.suffix.lower()]
    try:
        size = path.stat().st_size
        if size > MAX_METADATA_CSV_BYTES:
            raise InputError(f"{path}: expected at most {MAX_METADATA_CSV_BYTES >> 20} MiB, got {size:,} bytes")
        return _read_csv(path) if kind == "CSV" else _read_json_lines(path)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        header = " with a header line" if kind == "CSV" else ""
        raise InputError(f"{path}: expected {kind}{header}, got {error}; write it again") from error


def _read_csv(path: Path) -> "pa.Table":
    import pyarrow as pa
    from pyarrow import csv

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    _check_separator(path, delimiter)
    parsing = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    nothing = {"null_values": [""]}
    guessed = csv.read_csv(path, parse_options=parsing, convert_options=csv.ConvertOptions(**nothing))
    names = [name.strip() for name in guessed.column_names]
    if len(set(names)) != len(names):
        raise InputError(f"{path}: expected different columns, got {', '.join(names)[:200]}")
    as_text = csv.ConvertOptions(column_types=dict.fromkeys(guessed.column_names, pa.string()), **nothing)
    table = csv.read_csv(path, parse_options=parsing, convert_options=as_text)
    written = [_after_comma(name, column) for name, column in zip(table.column_names, table.columns, strict=True)]
    columns = [_exact(*both) for both in zip(guessed.columns, written, strict=True)]
    return pa.table(columns, schema=pa.schema(map(_field, names, columns, written)))


def _check_separator(path: Path, expected: str) -> None:
    """Refuse a header whose names are separated by another character; one name alone needs none."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline().strip()
    found = [name for character, name in _SEPARATORS.items() if character in header]
    if found and expected not in header:
        advice = "call it .tsv" if found[0] == "tabs" else f"write it with {_SEPARATORS[expected]}"
        raise InputError(
            f"{path}: expected columns separated by {_SEPARATORS[expected]}, got {found[0]} in the header "
            f"{header[:80]!r}; {advice}"
        )


def _after_comma(name: str, written: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """The values without the space that stands before all of them, and before the column's name."""
    import pyarrow.compute as pc

    spaced = name.startswith(" ") and pc.all(pc.starts_with(written, " ")).as_py() is not False
    return pc.utf8_ltrim(written, " ") if spaced else written


def _field(name: str, column: "pa.ChunkedArray", written: "pa.ChunkedArray") -> "pa.Field":
    """A column's; of booleans with their spelling."""
    import pyarrow as pa

    if not pa.types.is_boolean(column.type):
        return pa.field(name, column.type)
    spelled = {value: text for value, text in zip(column.to_pylist(), written.to_pylist(), strict=True) if text}
    told = {SPELLING[value]: text.strip().encode() for value, text in spelled.items() if value is not None}
    return pa.field(name, column.type, metadata=told)


def _exact(guessed: "pa.ChunkedArray", written: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """A column as it was guessed where that loses nothing, else as it is written."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = guessed.type
    if pa.types.is_null(kind):
        return guessed
    if kind in (pa.string(), pa.large_string()):
        return written
    written = pc.if_else(guessed.is_null(), pa.scalar(None, pa.string()), written)
    trimmed = pc.utf8_trim_whitespace(written)
    if pa.types.is_boolean(kind):
        return guessed if len(pc.unique(trimmed)) == len(pc.unique(guessed)) else written
    if pa.types.is_integer(kind):
        exact = pc.all(pc.equal(guessed.cast(pa.string()), trimmed)).as_py() is not False
    else:
        code = pc.match_substring_regex(trimmed, rf"^(\+|-?0\d|-?\d{{{_MOST_DIGITS + 1},}}$)")
        exact = pa.types.is_floating(kind) and not pc.any(code).as_py() and _same_decimals(trimmed)
    return guessed if exact else written


def _same_decimals(written: "pa.ChunkedArray") -> bool:
    """Whether all have as many decimals, or none ends in a zero that its number does not need."""
    import pyarrow.compute as pc

    padded = pc.match_substring_regex(written, r"\.\d*[1-9]0+$|\.00+$")
    decimals = pc.utf8_length(pc.replace_substring_regex(written, r"^[^.]*\.?", ""))
    return not pc.any(padded).as_py() or len(pc.unique(decimals.drop_null())) == 1


def _read_json_lines(path: Path) -> "pa.Table":
    import pyarrow as pa

    rows = list[dict[str, Any]]()
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}: expected JSON in line {number}, got {error}; write it again") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}: expected an object in line {number}, got {line[:50]!r}; write it again")
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [json_column([row.get(name) for row in rows]) for name in names]
    spelling = {key: key for key in SPELLING}
    fields = [
        pa.field(name, column.type, metadata=spelling if pa.types.is_boolean(column.type) else None)
        for name, column in zip(names, columns, strict=True)
    ]
    return pa.table(columns, schema=pa.schema(fields))


def json_column(values: Sequence[Any]) -> "pa.Array":
    """Values of JSON as a column: of one type as they are, of several as text."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1 and not kinds <= {int, float}:
        values = [_as_text(value) for value in values]
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([_as_text(value) for value in values])


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
