"""Other labels for exemplars that are there: a table of ids and labels, as an audit writes it."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.exemplars import ExemplarStore


def read_labels(path: Path) -> dict[str, str]:
    """Labels by id, from a CSV file with the columns ``id`` and ``label``; others are left alone.

    Raises:
        InputError: it cannot be read, lacks a column, or gives an id twice or without a label.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in ("id", "label") if name not in (reader.fieldnames or ())]:
                raise InputError(f"{path}: expected the columns id and label, got no {missing[0]}")
            rows = [(row["id"], row["label"]) for row in reader]
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
    if unknown := [id_ for id_ in labels if id_ not in rows]:
        raise InputError(f"no exemplar has the id {unknown[0]!r}{nearest(unknown[0], rows)}; nothing was changed")
    own = np.array([rows[id_] for id_ in labels])
    metadata = store.metadata(own)
    names = dict.fromkeys(name for row in metadata for name in row)
    columns = {name: [row.get(name) for row in metadata] for name in names}
    return ArraySource(
        store.images(own), list(labels.values()), ids=list(labels), metadata=columns or None, name="new labels"
    )  # fmt: skip
