"""Exemplars with planted copies and foreign images, described once; any part of them, with any labels, as an engine."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from tmm_engine.bench.planting.faults import Copies, copies_of
from tmm_engine.engine import Engine
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import ImageRecord, ImageSource
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.snapshot import Snapshot


@dataclass(frozen=True, slots=True, eq=False)
class Planted:
    """First the images as they are, then the copies, then the foreign ones.

    Attributes:
        engine: Over all of them.
        labels: Those of the first as given; of copies their original's; of foreign ones a class at random.
        count: How many are as they are.
        copies: Of these.
        foreign: How many foreign ones there are.
    """

    engine: Engine
    labels: Int64[np.ndarray, "n"]
    count: int
    copies: Copies
    foreign: int

    def part(self, rows: Int64[np.ndarray, "r"], labels: Int64[np.ndarray, "r"] | None = None) -> Engine:
        """Some of them, with other labels if they are given."""
        whole = self.engine._snapshot
        store = whole.store
        own = self.labels[rows] if labels is None else labels
        part = MemoryStore(
            store.images(rows),
            {column: store.features(rows, column=column) for column in store.feature_columns},
            own,
            ids=[str(store.ids[row]) for row in rows],
            predicted=store.predictions(rows),
        )
        snapshot = Snapshot.of(
            whole.classifier, part, vocabulary=whole.vocabulary, describer=whole.searcher.describer
        )  # fmt: skip
        return Engine(snapshot)

    @property
    def clean(self) -> Int64[np.ndarray, "m"]:
        """Rows of the images as they are."""
        return np.arange(self.count)

    def with_copies(self, share: float) -> Int64[np.ndarray, "r"]:
        """And of so many copies, every change equally often as far as there are."""
        total = len(self.copies.origin)
        chosen = np.random.default_rng(0).permutation(total)[: max(1, round(share * self.count))]
        return np.concatenate([self.clean, self.count + np.sort(chosen)])

    def with_foreign(self, share: float) -> Int64[np.ndarray, "r"]:
        """And of so many foreign images."""
        start = self.count + len(self.copies.origin)
        return np.concatenate([self.clean, start + np.arange(min(self.foreign, max(1, round(share * self.count))))])


def plant(
    images: UInt8[np.ndarray, "n c h w"],
    labels: Int64[np.ndarray, "n"],
    foreign: UInt8[np.ndarray, "f c h w"],
    classifier: Classifier,
    *,
    share: float,
    seed: int,
    progress: Progress = silent,
) -> Planted:
    """Everything in one index, as somebody has it who does not know.

    Args:
        images: As they are.
        labels: Theirs.
        foreign: Of another data set.
        classifier: f.
        share: Of the images that have a copy.
        seed: Of all draws.
        progress: Told of images done.
    """
    copies = copies_of(images, share=share, seed=seed)
    strange = np.random.default_rng(seed).integers(classifier.num_classes, size=len(foreign))
    own = np.concatenate([labels, labels[copies.origin], strange]).astype(np.int64)
    engine = Engine.from_arrays(
        np.concatenate([images, copies.images, foreign]), own, classifier, progress=progress
    )  # fmt: skip
    if len(engine) != len(own):
        raise InputError(f"expected features of all {len(own)} images, got {len(engine)}: choose another --seed")
    return Planted(engine, own, len(images), copies, len(foreign))


def drawn(
    source: ImageSource, classifier: Classifier, *, count: int, seed: int, one_per: str | None = None
) -> list[ImageRecord]:
    """Random images of a source.

    Args:
        source: Where they are from.
        classifier: Says of what shape.
        count: How many; all where there are fewer.
        seed: Of the draw.
        one_per: A pattern with a group: only one image for each that the group matches in the path, or in the id.

    Raises:
        InputError: not such a pattern, or none can be read.
    """
    records = [record for record in source.read(classifier.target) if isinstance(record, ImageRecord)]
    order = np.random.default_rng(seed).permutation(len(records))
    chosen = [records[place] for place in order]
    if one_per is not None:
        chosen = _one_per(chosen, one_per)
    if not chosen:
        raise InputError(f"{source.name}: no image could be read")
    return chosen[:count]


def _one_per(records: Sequence[ImageRecord], pattern: str) -> list[ImageRecord]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"expected a pattern such as '^(.*)_', got {pattern!r}: {error}") from None
    found: dict[str, ImageRecord] = {}
    for record in records:
        match = compiled.search(str(record.metadata.get("path", record.id)))
        if match is None or not compiled.groups:
            raise InputError(f"expected a pattern with a group that matches {record.id!r}, got {pattern!r}")
        found.setdefault(match[1], record)
    return list(found.values())
