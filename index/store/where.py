"""Filters in SQL over id, label and metadata: checked before Lance sees them."""

import re
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from tmm_engine.index.errors import InputError
from tmm_engine.index.limits import MAX_WHERE_CHARACTERS, MAX_WHERE_WORDS

if TYPE_CHECKING:
    import lance

LITERALS = re.compile(r"'(?:[^']|'')*'|`[^`]*`")
LISTED = re.compile(r"-?[\d.]+\s*,")  # a number in a list
WORDS = re.compile(r"\w+|[^\w\s,()]+")


def matching_positions(dataset: "lance.LanceDataset", where: str) -> Int64[np.ndarray, "rows"]:
    """The rows for which a filter is true, ascending, as positions in the dataset's order.

    Args:
        dataset: One version of it.
        where: SQL, as in ``label = 3 AND page > 10``. Columns of odd names stand in backticks, texts in single quotes.

    Raises:
        InputError: a filter that is not SQL, names no column, or is too long or too deep.
    """
    check_where(where)
    try:
        found = dataset.to_table(columns=["_rowaddr"], filter=where)["_rowaddr"].to_numpy()
        everything = dataset.to_table(columns=["_rowaddr"])["_rowaddr"].to_numpy()
    except (ValueError, OSError) as error:
        columns = ", ".join(column.name for column in dataset.schema if not _is_hidden(column.type))
        raise InputError(
            f'where: expected a condition in SQL such as "label = 3" over {columns}, got {shortened(where)}: '
            f"{shortened(_reason(error))}"
        ) from None
    return np.flatnonzero(np.isin(everything, found))


def check_where(where: str) -> None:
    """Refuse what would overwhelm the parser, or of which it would silently ignore a part.

    Raises:
        InputError: too long, too deep, or more than one statement.
    """
    if len(where) > MAX_WHERE_CHARACTERS:
        raise InputError(f"where: expected at most {MAX_WHERE_CHARACTERS:,} characters, got {len(where):,}")
    skeleton = LISTED.sub(",", LITERALS.sub("0", where))
    if any(mark in skeleton for mark in (";", "--", "/*", '"', "\0")):
        raise InputError(
            f"where: expected one condition without ; comments or double quotes, got {shortened(where)}; texts stand "
            f"in single quotes, columns of odd names in backticks"
        )
    words = len(WORDS.findall(skeleton))
    if words > MAX_WHERE_WORDS:
        raise InputError(
            f"where: expected at most {MAX_WHERE_WORDS} words and operators, got {words:,}; use IN (…), or search twice"
        )


def shortened(text: str) -> str:
    """At most 200 characters of a text, in quotes and on one line."""
    return repr(text if len(text) <= 200 else text[:200] + "…")


def _is_hidden(kind: pa.DataType) -> bool:
    """Whether a column is one that no filter can use: an image, features, a digest."""
    return pa.types.is_fixed_size_list(kind) or pa.types.is_fixed_size_binary(kind)


def _reason(error: Exception) -> str:
    """Lance's message without where in its source it comes from."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r", /\S+\.rs:\d+:\d+.*", "", first)
