"""Records as cells and tables of Markdown: groups, means and shares with their intervals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped

from tmm_engine.bench.records import Record
from tmm_engine.bench.statistics import bootstrap_interval, by_query, paired_difference, wilson_interval

NONE = "–"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of texts by column, the same columns in every row."""
    if not rows:
        return "No records."
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def folded(summary: str, block: str) -> list[str]:
    """Markdown that a reader unfolds."""
    return [f"<details><summary>{summary}</summary>", block, "</details>"]


def grouped(records: Iterable[Record], *fields: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by the values of some fields, in the order in which they first appear."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[field] for field in fields), []).append(record)
    return groups


def compared(records: list[Record], summary: Callable[[list[Record]], list[str]], *, met: tuple[str, ...]) -> list[str]:
    """Methods over what every one of them met and, where some met more, those that met the most over all of that.

    Args:
        records: Of any methods.
        summary: Its blocks, of records of methods that met the same.
        met: The fields whose values tell what a method met, ``perturbation`` among them.
    """
    common, most = over_the_same(records, *met)
    if len(common) == len(records):
        return summary(records)
    kinds = [name for name, family in grouped(common, "perturbation", "family") if family != "clean"]
    if not kinds:
        left_out = {record["method"] for record in records} - {record["method"] for record in most}
        said = f"Under no noise have all methods met the same. Not in this table: {', '.join(sorted(left_out))}."
        return [said, *summary(most)]
    over = ([f"{count(common)} queries"] if "query" in met else []) + kinds
    return [
        f"All methods, over what every one of them met ({', '.join(over)}):",
        *summary(common),
        "Those that met the most, over all of that:",
        *summary(most),
    ]


def over_the_same(records: list[Record], *met: str) -> tuple[list[Record], list[Record]]:
    """Those of all methods, over what every one of them met; and those of the methods that met the most, over that."""
    keys: dict[str, set[tuple[Any, ...]]] = {}
    for record in records:
        keys.setdefault(record["method"], set()).add(tuple(record[field] for field in met))
    most = max(keys.values(), key=len, default=set())
    full = {method for method, own in keys.items() if own >= most}
    common = set.intersection(*keys.values()) if keys else set()

    def among(record: Record, some: set[tuple[Any, ...]]) -> bool:
        return tuple(record[field] for field in met) in some

    return (
        [record for record in records if among(record, common)],
        [record for record in records if record["method"] in full and among(record, most)],
    )


def count(records: list[Record]) -> int:
    """How many queries the records are of."""
    return len({record["query"] for record in records})


def queries_of(records: list[Record]) -> Shaped[np.ndarray, "n"]:
    """The query of each record, as text."""
    return np.array([str(record["query"]) for record in records])


def values_of(records: list[Record], field: str) -> tuple[Float64[np.ndarray, "m"], Shaped[np.ndarray, "m"]]:
    """A field of the records that have a value in it, and their queries."""
    found = [record for record in records if record[field] is not None]
    return np.array([float(record[field]) for record in found]), queries_of(found)


def mean(records: list[Record], field: str, *, spec: str = "") -> str:
    """The mean over queries of their own means, with its interval; a dash where no record has a value."""
    values, queries = values_of(records, field)
    return format(bootstrap_interval(by_query(values, queries)), spec) if len(values) else NONE


def rate(flags: list[bool], records: list[Record]) -> str:
    """The share of records with a flag, with its interval; a dash where there are none.

    Wilson's for one record per query; with several, which are not independent, the bootstrap's over queries.
    """
    if not flags:
        return NONE
    if len(flags) == count(records):
        return str(wilson_interval(sum(flags), len(flags)))
    return str(bootstrap_interval(by_query(np.array(flags), queries_of(records))))


def plain_text(value: Any) -> str:
    """A JSON value in a cell."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(plain_text, value))
    if isinstance(value, float):
        return f"{value:g}"
    return NONE if value is None else str(value)


def difference(records: Sequence[Record], rival: Sequence[Record], field: str) -> str:
    """Of a method to its rival, paired by query and perturbation: its mean and interval, signed.

    A dash for the rival itself, and where they have nothing in common.
    """
    found = {(record["query"], record["perturbation"]): record[field] for record in rival}
    both = [record for record in records if (record["query"], record["perturbation"]) in found]
    if not both or records[0]["method"] == rival[0]["method"]:
        return NONE
    values, queries = values_of(both, field)
    others = np.array([found[record["query"], record["perturbation"]] for record in both])
    return f"{paired_difference(values, others, queries):+z.2f}"
