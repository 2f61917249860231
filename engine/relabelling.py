"""What was decided of exemplars: files of ids and of labels, as an audit writes them and as spreadsheets leave them."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.names import spelled
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.exemplars import ExemplarStore

SEPARATORS = (",", ";", "\t")  # of spreadsheets


def line_of(id_: str) -> str:
    """An id as a line of a file; one that would not come back as it is stands there as JSON writes it."""
    plain = id_.isprintable() and id_ == id_.strip() and not id_.startswith('"')
    return id_ if plain else json.dumps(id_)


def read_ids(path: Path) -> list[str]:
    """Ids from a text file, one a line, as `line_of` writes them.

    Raises:
        InputError: it cannot be read, or has none.
    """
    try:
        lines = [line.rstrip("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
        ids = [str(json.loads(line)) if line.startswith('"') else line for line in lines if line]
    except (OSError, ValueError) as error:
        raise InputError(f"expected a text file of ids, one a line, got {path} ({error})") from error
    if not ids:
        raise InputError(f"{path}: expected ids, one a line, got none")
    return ids


def read_labels(path: Path) -> dict[str, str]:
    """Labels by id, from a CSV file with the columns ``id`` and ``label``; others, and empty lines, are left alone.

    Columns may be separated by commas, semicolons or tabs, as spreadsheets have it.

    Raises:
        InputError: it cannot be read, lacks a column, or gives an id twice or without a label.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            separator = max(SEPARATORS, key=header.count)  # a comma where there is none of them
            reader = csv.DictReader(file, delimiter=separator)
            if missing := [name for name in ("id", "label") if name not in (reader.fieldnames or ())]:
                raise InputError(f"{path}: expected the columns id and label, got no {missing[0]}")
            rows = [(row["id"], row["label"]) for row in reader if any(row.values())]
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"expected a CSV file with the columns id and label, got {path} ({error})") from error
    labels = dict(rows)
    if len(labels) < len(rows):
        twice = next(id_ for place, (id_, _) in enumerate(rows) if id_ in dict(rows[:place]))
        raise InputError(f"{path}: expected different ids, got {twice!r} twice")
    if empty := [id_ for id_, label in rows if not label]:
        raise InputError(f"{path}: expected a label for {empty[0]!r}, got none; leave the line out to keep the old one")
    return labels


def relabelled(store: ExemplarStore, rows: Mapping[str, int], labels: Mapping[str, str]) -> ArraySource:
    """The exemplars as they are stored, with other labels.

    Raises:
        InputError: no labels, or no exemplar has one of the ids.
    """
    if not labels:
        raise InputError("expected at least one label, got none")
    known = spelled(list(labels), rows)
    if unknown := [id_ for id_ in labels if id_ not in known]:
        raise InputError(f"no exemplar has the id {unknown[0]!r}{nearest(unknown[0], rows)}; nothing was changed")
    ids = [known[id_] for id_ in labels]
    own = np.array([rows[id_] for id_ in ids])
    metadata = store.metadata(own)
    names = dict.fromkeys(name for row in metadata for name in row)
    columns = {name: [row.get(name) for row in metadata] for name in names}
    return ArraySource(
        store.images(own), list(labels.values()), ids=ids, metadata=columns or None, name="new labels"
    )  # fmt: skip
