"""Answers and exemplars as tables, for where people go on working with them: Arrow, pandas, polars, Parquet."""

import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np

from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError, nearest, printable
from tmm_engine.index.files import write_file
from tmm_engine.index.sources.records import Metadata
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.results import FailedQuery, Hit, SearchResult

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

OF_QUERY = {
    "query": "query",
    "mode": "mode",
    "query_predicted_class": "predicted_class",
    "query_true_class": "true_class",
    "recognised_as": "recognised_as",
}
"""What each row says of its query: the column, and the attribute of `SearchResult`."""
ERROR = "error"
"""The column that says why a query could not be answered."""


def hits_table(results: Sequence[SearchResult | FailedQuery], *, errors: bool) -> "pyarrow.Table":
    """One row per hit: what `OF_QUERY` says of its query, every plain attribute of `Hit`, and its metadata.

    Metadata of a name that is taken are called ``source_…``. A query that could not be answered has one row, in which
    all but its name and error is null.

    Args:
        results: Any number, in any modes.
        errors: Whether there is a column of errors.
    """
    import pyarrow as pa

    rows: list[tuple[SearchResult | FailedQuery, Hit | None]] = []
    for result in results:
        rows += [(result, hit) for hit in result.hits] if isinstance(result, SearchResult) else [(result, None)]
    of_query = OF_QUERY | ({ERROR: ERROR} if errors else {})
    columns = {
        name: _column([getattr(result, attribute, None) for result, _ in rows], str)
        for name, attribute in of_query.items()
    }
    for name, kind in plain_attributes(Hit).items():
        columns[name] = _column([getattr(hit, name, None) for _, hit in rows], kind)
    return pa.table(columns | _metadata_columns([hit.metadata if hit else {} for _, hit in rows], taken=columns))


def exemplars_table(store: ExemplarStore, label_names: Sequence[str], *, columns: Sequence[str]) -> "pyarrow.Table":
    """One row per exemplar: id, label, predicted class, its metadata, and of its pixels and features what is asked for.

    Metadata of a name that is taken are called ``source_…``.

    Args:
        store: The exemplars.
        label_names: By number.
        columns: ``image``, and names of `ExemplarStore.feature_columns`: fixed-size lists, as they are stored.

    Raises:
        InputError: no such column.
    """
    import pyarrow as pa

    from tmm_engine.index.store.lance_store import fixed_size_column

    rows, known = np.arange(len(store)), ("image", *store.feature_columns)
    if unknown := [name for name in columns if name not in known]:
        raise InputError(f"no column {unknown[0]!r}{nearest(unknown[0], known)}; there are {', '.join(known)}")
    predicted = store.predictions(rows)
    told: dict[str, pa.Array] = {
        "id": _column(store.ids.tolist(), str),
        "label": pa.array(store.labels),
        "class_name": _column([label_names[label] for label in store.labels], str),
        "label_is_predicted": pa.array(store.label_is_predicted),
        "predicted_label": pa.array(predicted),
        "predicted_class": _column([label_names[label] for label in predicted], str),
    }
    told |= {
        name: fixed_size_column(store.images(rows) if name == "image" else store.features(rows, column=name))
        for name in columns
    }
    return pa.table(told | _metadata_columns(store.metadata(rows), taken=told))


def plain_attributes(kind: type) -> dict[str, type]:
    """The attributes of a dataclass that are text, numbers or booleans, or may be missing: their names and types."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        options = [each for each in typing.get_args(hint) or (hint,) if each is not NoneType]
        if len(options) == 1 and options[0] in (str, int, float, bool):
            found[name] = options[0]
    return found


def free_names(names: Sequence[str], *, taken: Collection[str]) -> dict[str, str]:
    """For each name one that is not taken: itself, or with ``source_`` before it as often as it takes."""
    free = {}
    for name in names:
        new = name
        while new in taken or (new != name and new in names):
            new = f"source_{new}"
        free[name] = new
    return free


def as_pandas(table: "pyarrow.Table") -> "pandas.DataFrame":
    """As a DataFrame in which whole numbers and booleans may be missing.

    Raises:
        InputError: the 'pandas' extra is not installed.
    """
    import pyarrow as pa

    try:
        import pandas as pd
    except ImportError as error:
        raise InputError(f"to_pandas needs the 'pandas' extra: pip install 'tmm-engine[pandas]' ({error})") from None
    return table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}.get)


def as_polars(table: "pyarrow.Table") -> "polars.DataFrame":
    """As a DataFrame.

    Raises:
        InputError: the 'polars' extra is not installed.
    """
    try:
        import polars as pl
    except ImportError as error:
        raise InputError(f"to_polars needs the 'polars' extra: pip install 'tmm-engine[polars]' ({error})") from None
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


@checked
def write_parquet(results: Sequence[SearchResult | FailedQuery], path: str | Path) -> None:
    """Write a Parquet file of the table that `SearchResults.to_arrow` makes.

    Args:
        results: At least one.
        path: The file to write; replaced as a whole or not at all.

    Raises:
        InputError: there are no results, or the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if len(results) == 0:
        raise InputError("expected at least one search result to write, got none")
    content = pa.BufferOutputStream()
    pq.write_table(hits_table(results, errors=True), content)
    write_file(path, content.getvalue().to_pybytes())


def _metadata_columns(metadata: Sequence[Metadata], *, taken: Collection[str]) -> "dict[str, pyarrow.Array]":
    names = list(dict.fromkeys(name for row in metadata for name in row))
    renamed = free_names(names, taken=taken)
    return {renamed[name]: _column([row.get(name) for row in metadata]) for name in names}


def _column(values: Sequence[Any], kind: type | None = None) -> "pyarrow.Array":
    """Of one type; without one of the values' own, which is text where answers of several indexes disagree about it."""
    import pyarrow as pa

    types: dict[type, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    values = [printable(value) if isinstance(value, str) else value for value in values]
    try:
        return pa.array(values, None if kind is None else types[kind])
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        if kind is not None:
            raise
        return _column([None if value is None else str(value) for value in values], str)
