"""Classifications as a table, and as a Parquet file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tmm_engine.classifying.classification import Classification
from tmm_engine.index.errors import printable
from tmm_engine.index.files import write_file
from tmm_engine.results import FailedQuery
from tmm_engine.views.table import ERROR, plain_attributes

if TYPE_CHECKING:
    import pyarrow

LISTS = ("prediction_set", "notes")


def classified_table(answers: Sequence[Classification | FailedQuery]) -> "pyarrow.Table":
    """One row per query: every plain attribute of `Classification`, its lists, ids of neighbours, and what went wrong.

    Args:
        answers: Any number; a query that could not be classified has a row with its name and the error.
    """
    import pyarrow as pa

    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    columns = {
        name: pa.array([_plain(getattr(answer, name, None)) for answer in answers], types[kind])
        for name, kind in plain_attributes(Classification).items()
    }
    columns |= {
        name: pa.array([_texts(getattr(answer, name, None)) for answer in answers], pa.list_(pa.string()))
        for name in LISTS
    }
    hits = [
        [hit.id for hit in answer.search.hits] if isinstance(answer, Classification) else None for answer in answers
    ]
    columns["neighbours"] = pa.array([_texts(ids) for ids in hits], pa.list_(pa.string()))
    columns[ERROR] = pa.array([_plain(getattr(answer, ERROR, None)) for answer in answers], pa.string())
    return pa.table(columns)


def write_classified(answers: Sequence[Classification | FailedQuery], path: str | Path) -> None:
    """Write a Parquet file of that table; replaced as a whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pa.BufferOutputStream()
    pq.write_table(classified_table(answers), content)
    write_file(path, content.getvalue().to_pybytes())


def _plain(value: object) -> object:
    return printable(value) if isinstance(value, str) else value


def _texts(values: Sequence[str] | None) -> list[str] | None:
    return None if values is None else [printable(value) for value in values]
