"""What the quality benchmarks share: exemplars in memory, seeded queries, retrievers, and a file of records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from tmm_engine.bench.methods import Method
from tmm_engine.bench.records import RecordFile, describe_run, read_records
from tmm_engine.bench.retrievers import Retriever, make_retrievers
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.records import ImageRecord, ImageSource
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank.columns import StretchedColumn
from tmm_engine.rerank.settings import TmmConfig, canonical


@dataclass(frozen=True, slots=True, eq=False)
class Suite:
    """One data set and one classifier, ready to be measured.

    Attributes:
        data_set: The source's name, for people.
        classifier: f.
        store: A seeded random subset of the source's images, and their features.
        order: A seeded permutation of the store's rows: queries are taken from its beginning, so that a larger run
            goes on with a smaller one.
        seed: Of subset, order and noise.
        triggers: The folder that keeps global triggers (`bench.triggers`), if any does.
    """

    data_set: str
    classifier: Classifier
    store: MemoryStore
    order: Int64[np.ndarray, "n"]
    seed: int
    triggers: Path | None = None

    @classmethod
    def load(
        cls,
        source: ImageSource,
        classifier: Classifier,
        *,
        exemplars: int,
        seed: int = 0,
        data_set: str | None = None,
        triggers: Path | None = None,
        embedded: bool = True,
        progress: Progress = silent,
    ) -> "Suite":
        """Read a labelled source into memory.

        Args:
            source: The images.
            classifier: f, for images of the same shape.
            exemplars: How many of them, drawn at random; all where there are fewer.
            seed: Of the draw.
            data_set: Default: the source's name.
            triggers: As the attribute.
            embedded: Whether features are computed: without, the store's are empty, for who computes more than them.
            progress: Told of images read.

        Raises:
            InputError: no labels, or no image can be read.
        """
        if not source.labelled:
            raise InputError(f"{source.name}: expected labelled images, got none with a label")
        records = []
        for record in source.read(classifier.target):
            if isinstance(record, ImageRecord):
                records.append(record)
            progress("reading", len(records), len(source))
        if not records:
            raise InputError(f"{source.name}: no image could be read")
        largest = max(record.label for record in records if record.label is not None)
        if largest >= classifier.num_classes:
            raise InputError(
                f"{source.name}: expected labels below the classifier's {classifier.num_classes} classes, got "
                f"{largest}; give the weights trained on it"
            )
        generator = np.random.default_rng(seed)
        chosen = np.sort(generator.permutation(len(records))[:exemplars])
        kept = [records[row] for row in chosen]
        images = np.stack([record.image for record in kept])
        labels = np.array([record.label for record in kept], dtype=np.int64)
        ids = [record.id for record in kept]
        if embedded:
            subset = ArraySource(images, labels, ids=ids, name=source.name)
            store = MemoryStore.of(subset, classifier, columns=[StretchedColumn(classifier)], progress=progress)
        else:
            store = MemoryStore(images, {FEATURE: np.empty((len(images), 0), dtype=np.float32)}, labels, ids=ids)
        return cls(data_set or source.name, classifier, store, generator.permutation(len(store)), seed, triggers)

    def queries(self, count: int, *, skip: int = 0) -> Int64[np.ndarray, "q"]:
        """Rows of `count` queries, after the first `skip` of the permutation.

        Raises:
            InputError: more than there are.
        """
        if skip + count > len(self.order):
            raise InputError(f"expected at most {len(self.order)} queries, one per exemplar, got {skip} + {count}")
        return self.order[skip : skip + count]

    def retrievers(self, methods: Sequence[Method], *, progress: Progress = silent) -> list[Retriever]:
        """One for each method."""
        return make_retrievers(methods, self.classifier, self.store, triggers=self.triggers, progress=progress)

    def records(
        self, path: Path, benchmark: str, methods: Sequence[Method], key: tuple[str, ...], **settings: Any
    ) -> RecordFile:
        """The file of a benchmark's records; a rerun on the same exemplars with the same settings goes on with it.

        Args:
            path: JSON lines.
            benchmark: Its name.
            methods: Compared in this run; another run may add some.
            key: What tells records apart.
            settings: Of the benchmark; all must equal those of the file.

        Raises:
            InputError: a method of the file had other settings, as after a change of a preset; or as `RecordFile.open`.
        """
        measured = {name: config for run in _runs(path) for name, config in run.get("methods", {}).items()}
        for method in methods:
            before, now = measured.get(method.name), method.settings()
            same = now == (before if before is None or method.config is None else _in_terms_of(now, before))
            if before is not None and not same:
                raise InputError(
                    f"{path}: {method.name!r} was measured with {before}, is now {now}; write to another file, or "
                    f"delete this one"
                )
        identity = {
            "benchmark": benchmark,
            "data_set": self.data_set,
            "model": self.classifier.spec.architecture,
            "fingerprint": self.classifier.fingerprint,
            "exemplars": len(self.store),
            "seed": self.seed,
            **settings,
        }
        about = {"methods": {method.name: method.settings() for method in methods}, **describe_run()}
        return RecordFile.open(path, identity | about, key, tuple(identity))


def _runs(path: Path) -> list[dict[str, Any]]:
    return read_records(path).runs if path.exists() and path.stat().st_size else []


def _in_terms_of(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of TMM-NN that a file recorded, under today's names, so far as they have an effect today.

    A setting that came later had its default.
    """
    defaults, known = TmmConfig().to_json(), {canonical(name): value for name, value in before.items()}
    return {name: known.get(name, defaults.get(name)) for name in now}
