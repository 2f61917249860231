"""Filters in SQL over id, label, predicted class and metadata: checked before Lance sees them.

Labels and predicted classes are stored as numbers. Compared with a number, ``label`` is a class of the model's, given
or predicted; compared with texts, by ``=``, ``<>``, ``IN`` or ``LIKE``, it is the name of a label that was given, which
is NULL where there is none. Any other expression on them is refused: it would see the numbers, as in ``label || ''``.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from tmm_engine.index.errors import IndexStateError, InputError, nearest
from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.limits import MAX_WHERE_CHARACTERS, MAX_WHERE_WORDS
from tmm_engine.index.names import spelled

if TYPE_CHECKING:
    import lance

TEXT = re.compile(r"'(?:[^']|'')*'")
LIKE = re.compile(r"\\.|.", re.DOTALL)  # a character of a pattern, or one that a backslash takes the meaning of
COMPARISON = re.compile(
    rf"""(?<![\w.`])(?P<quote>`?)(?P<column>label|predicted)(?P=quote)(?![\w.(])\s*
         (?: (?P<operator>=|<>|!=|(?:NOT\s+)?I?LIKE\b|(?:NOT\s+)?IN\b)\s*
             (?P<texts>{TEXT.pattern} | \(\s*{TEXT.pattern}\s*(?:,\s*{TEXT.pattern}\s*)*\))
           | IS\s+(?P<null_not>NOT\s+)?(?P<null>NULL)\b )
      | (?P<first>{TEXT.pattern})\s*(?P<before>=|<>|!=)\s*(?P<after>`?)(?P<behind>label|predicted)(?P=after)(?![\w.(])
      | {TEXT.pattern} | `[^`]*`""",
    re.IGNORECASE | re.VERBOSE,
)
"""A comparison with names; or a text or a name in backticks, within which there is none."""
NUMBER = r"-?\d+(?:\.\d+)?"
LITERALS = re.compile(r"'(?:[^']|'')*'|`[^`]*`")
LISTED = re.compile(r"-?[\d.]+\s*,")  # a number in a list
WORDS = re.compile(r"\w+|[^\w\s,()]+")


def matching_positions(dataset: "lance.LanceDataset", where: str, vocabulary: Vocabulary) -> Int64[np.ndarray, "rows"]:
    """The rows for which a filter is true, ascending, as positions in the dataset's order.

    Args:
        dataset: One version of it.
        where: SQL, as in ``label = 'cat' AND page > 10``. Columns of odd names stand in backticks, texts in single
            quotes.
        vocabulary: Of the labels.

    Raises:
        InputError: a filter that is not SQL, names no column or label, or is too long or too deep.
        IndexStateError: the dataset cannot be read.
    """
    check_where(where)
    numbers = {"label": vocabulary.names, "predicted": vocabulary.class_names}
    named = {name: numbers[name] for name in numbers if _is_number(dataset.schema, name)}
    own = in_numbers(where, named)
    check_comparisons(where, own, named, [column.name for column in dataset.schema if _is_numeric(column.type)])
    try:
        found = dataset.to_table(columns=["_rowaddr"], filter=own)["_rowaddr"].to_numpy()
        everything = dataset.to_table(columns=["_rowaddr"])["_rowaddr"].to_numpy()
    except (ValueError, OSError) as error:
        _check_readable(dataset)  # or it is not the filter
        columns = ", ".join(column.name for column in dataset.schema if not _is_hidden(column.type))
        raise InputError(
            f"where: expected a condition in SQL such as \"label = 'cat'\" over {columns}, got {shortened(where)}: "
            f"{shortened(_reason(error))}"
        ) from None
    return np.flatnonzero(np.isin(everything, found))


def _check_readable(dataset: "lance.LanceDataset") -> None:
    try:
        dataset.to_table(columns=["id"], limit=1)
    except (ValueError, OSError) as error:
        raise IndexStateError(
            f"{dataset.uri}: the exemplars can no longer be read ({_reason(error)}); open the index again"
        ) from error


GROWING = re.compile(
    r"\b(repeat|lpad|rpad|replace|regexp_replace|array_repeat|list_repeat|array_resize|list_resize|range"
    r"|generate_series)\s*\(",
    re.IGNORECASE,
)


def check_where(where: str) -> None:
    """Refuse what would overwhelm the parser, or of which it would silently ignore a part.

    Raises:
        InputError: too long, too deep, more than one statement, or with a function whose result is as large as it says.
    """
    if len(where) > MAX_WHERE_CHARACTERS:
        raise InputError(f"where: expected at most {MAX_WHERE_CHARACTERS:,} characters, got {len(where):,}")
    skeleton = LISTED.sub(",", LITERALS.sub("0", where))
    if any(mark in skeleton for mark in (";", "--", "/*", '"', "\0")):
        raise InputError(
            f"where: expected one condition without ; comments or double quotes, got {shortened(where)}; texts stand "
            f"in single quotes, columns of odd names in backticks"
        )
    if grows := GROWING.search(skeleton):
        raise InputError(f"where: {grows[1].lower()}(…) is not allowed: what it makes may take any amount of memory")
    words = len(WORDS.findall(skeleton))
    if words > MAX_WHERE_WORDS:
        raise InputError(
            f"where: expected at most {MAX_WHERE_WORDS} words and operators, got {words:,}; use IN (…), or search twice"
        )


def in_numbers(where: str, named: Mapping[str, Sequence[str]]) -> str:
    """A filter that compares labels and predicted classes by their numbers where it compared them by name.

    Args:
        where: SQL.
        named: The names of each column whose numbers they are: ``label``, ``predicted``.

    Raises:
        InputError: a name that no label or class has.
    """

    def translated(found: re.Match[str]) -> str:
        column = found["column"] or found["behind"]
        if column is None or column not in named:
            return found[0]
        if found["null"]:
            return f"{'NOT ' if found['null_not'] else ''}label_is_predicted" if column == "label" else found[0]
        operator = re.sub(r"\s+", " ", (found["operator"] or found["before"]).upper())
        texts = [text[1:-1].replace("''", "'") for text in TEXT.findall(found["texts"] or found["first"])]
        numbers = ", ".join(map(str, _numbers(column, operator, texts, named[column]))) or "-1"
        negated = "NOT " if operator.startswith(("NOT", "<>", "!=")) else ""
        compared = f"{column} {negated}IN ({numbers})"
        if column == "label":  # of a label that is only predicted neither true nor false
            compared = f"({compared} AND NOT label_is_predicted) OR (label_is_predicted AND NULL)"
        return f"({compared})"

    return COMPARISON.sub(translated, where)


def check_comparisons(where: str, own: str, named: Collection[str], numeric: Collection[str]) -> None:
    """Refuse what does anything to a label or a predicted class but compare it.

    Args:
        where: SQL, as it was given.
        own: The same in numbers, of `in_numbers`.
        named: The columns whose numbers stand for names: ``label``, ``predicted``.
        numeric: All columns of numbers, which these may be compared with.

    Raises:
        InputError: an expression that would see the numbers without saying so.
    """
    if not named:
        return
    plain = _plain_comparison(named, numeric).sub(" ", own)
    columns = "|".join(named)
    for found in re.finditer(rf"{TEXT.pattern}|(?<![\w.`])(?P<quote>`?)({columns})(?P=quote)(?![\w.`])|`[^`]*`", plain):
        if column := found[2]:
            raise InputError(
                f"where: expected {column} in a plain comparison, with names in quotes (=, <>, IN, LIKE) or numbers "
                f"of classes (=, <>, <, >, IN, BETWEEN), got {shortened(where)}; {column} is stored as a number, which "
                f"other expressions would take for a text or a quantity"
            )


def _plain_comparison(named: Collection[str], numeric: Collection[str]) -> re.Pattern[str]:
    """Of a column of ``named`` with numbers or columns of numbers, between the words that may stand around it."""

    def one_of(columns: Collection[str]) -> str:
        names = "|".join(re.escape(name) for name in columns)
        return rf"(?:`(?:{names})`|(?:{names})(?![\w.(`]))"

    column, value = one_of(named), rf"(?:{NUMBER}(?![\w.])|{one_of(numeric)})"
    operator = r"(?:[=<>]|[<>!=]=|<>)"
    comparison = rf"""{column}\s*(?: {operator}\s*{value}
        | (?i:(?:NOT\s+)?IN)\s*\(\s*{NUMBER}(?:\s*,\s*{NUMBER})*\s*\)
        | (?i:(?:NOT\s+)?BETWEEN)\s+{NUMBER}\s+(?i:AND)\s+{NUMBER}(?![\w.])
        | (?i:IS\s+(?:NOT\s+)?(?:NULL\b|DISTINCT\s+FROM\s+{value})))
      | {value}\s*{operator}\s*{column}"""
    return re.compile(rf"(?:^|[(,]|\b(?i:AND|OR|NOT)\b)\s*(?:{comparison})\s*(?=$|[),]|(?i:AND|OR|IS)\b)", re.VERBOSE)


def _numbers(column: str, operator: str, texts: list[str], names: Sequence[str]) -> list[int]:
    """Of the names that a comparison means, or excludes."""
    if "LIKE" in operator:
        case = re.IGNORECASE if "ILIKE" in operator else re.NOFLAG
        parts = (
            ".*" if part == "%" else "." if part == "_" else re.escape(part[-1]) for part in LIKE.findall(texts[0])
        )
        pattern = re.compile("".join(parts), re.DOTALL | case)
        return [number for number, name in enumerate(names) if pattern.fullmatch(name)]
    known = spelled(texts, names)
    if unknown := [text for text in texts if text not in known]:
        what = "label" if column == "label" else "class of the model's"
        raise InputError(f"where: no {what} is called {unknown[0]!r}{nearest(unknown[0], names)}")
    return [number for number, name in enumerate(names) if name in known.values()]


def _is_number(schema: pa.Schema, column: str) -> bool:
    return column in schema.names and pa.types.is_int64(schema.field(column).type)


def _is_numeric(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def shortened(text: str) -> str:
    """At most 200 characters of a text, in quotes and on one line."""
    return repr(text if len(text) <= 200 else text[:200] + "…")


def _is_hidden(kind: pa.DataType) -> bool:
    """Whether a column is one that no filter can use: an image, features, a digest."""
    return pa.types.is_fixed_size_list(kind) or pa.types.is_fixed_size_binary(kind)


def _reason(error: Exception) -> str:
    """Lance's message without where in its source it comes from, and without all columns, hidden ones too."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"(, /\S+\.rs:\d+:\d+|\.? Valid fields are).*", "", first)
