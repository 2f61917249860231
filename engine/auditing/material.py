"""What the kinds of an audit share, each computed once, when it is first needed."""

from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int64

from tmm_engine.auditing.copies import CopyDetector
from tmm_engine.auditing.findings import Evidence, Finding, Kind, Rule
from tmm_engine.auditing.foreign import energies, logits_of
from tmm_engine.auditing.opinions import Opinions, pooled, translated, votes
from tmm_engine.auditing.options import AuditOptions
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.descriptors.columns import COPY_FEATURE, ROBUST_FEATURE
from tmm_engine.index.neighbours.graph import GraphCache, NeighbourGraph, neighbour_graph
from tmm_engine.index.progress import Progress
from tmm_engine.index.store.manifest import CACHE
from tmm_engine.snapshot import Snapshot

SHOWN = 5
"""Neighbours that a finding shows."""
FEWEST = 3
"""Exemplars below which nothing can be said."""


class Material:
    """Of one snapshot.

    Args:
        snapshot: What is audited.
        options: What for.
        progress: Told of what is done.

    Attributes:
        notes: What could not be done and why, in sentences.
        given: Which exemplars have a label of their own.
        predicted: The model's classes.
    """

    def __init__(self, snapshot: Snapshot, options: AuditOptions, progress: Progress) -> None:
        self.snapshot, self.options, self.progress = snapshot, options, progress
        self.store, self.names = snapshot.store, snapshot.vocabulary.names
        self.notes: list[str] = []
        self.given: Bool[np.ndarray, "n"] = ~self.store.label_is_predicted
        self.predicted: Int64[np.ndarray, "n"] = self.store.predictions(np.arange(len(self.store)))
        self._graphs: dict[str, NeighbourGraph] = {}
        if COPY_FEATURE not in self.store.feature_columns:
            self.note(
                "the index has no descriptors, so images are compared by features, which see less: build it with "
                "`views=1` or more"
            )

    def note(self, note: str) -> None:
        """Say it once."""
        if note not in self.notes:
            self.notes.append(note)

    def column(self, column: str) -> str:
        """The column, or where the index has no descriptors features."""
        return column if column in self.store.feature_columns else FEATURE

    def graph(self, column: str) -> NeighbourGraph:
        """Of a column, or of features."""
        column, snapshot, k = self.column(column), self.snapshot, max(self.options.k, SHOWN)
        if column not in self._graphs:
            cache = None
            if snapshot.path is not None and snapshot.manifest is not None and snapshot.where is None:
                cache = GraphCache(snapshot.path / CACHE, snapshot.manifest.content)
            if k >= len(self.store):
                self.note(
                    f"every exemplar has only {len(self.store) - 1} others, fewer than the {k} that were asked for"
                )
            self._graphs[column] = neighbour_graph(
                self.store, k=k, column=column, memory=self.options.memory, cache=cache, progress=self.progress
            )
        return self._graphs[column]

    @cached_property
    def detector(self) -> CopyDetector | None:
        """Of copies; None where there are too few exemplars."""
        if self.too_few("copies"):
            return None
        column, memory = self.column(COPY_FEATURE), self.options.memory
        found = CopyDetector(
            self.store, self.graph(COPY_FEATURE), column=column, memory=memory, progress=self.progress
        )  # fmt: skip
        if found.cut:
            self.note(f"{found.cut:,} more exemplars could have copies and were not looked at closely: too many")
        return found

    @cached_property
    def energy(self) -> Float64[np.ndarray, "n"]:
        """Of every exemplar."""
        return energies(self._logits)

    @cached_property
    def probabilities(self) -> Float64[np.ndarray, "n c"]:
        """The model's, of its classes."""
        return np.exp(self._logits + self.energy[:, None])

    @cached_property
    def _logits(self) -> Float64[np.ndarray, "n c"]:
        return logits_of(self.store, self.snapshot.classifier)

    @cached_property
    def opinions(self) -> Opinions | None:
        """On what the labels should be; None where there is nothing to go by, which is noted."""
        labels, given = self.store.labels, self.given
        used = np.unique(labels[given])
        if self.too_few("labels"):
            return None
        if len(used) < 2:
            have = "all labels are the same" if len(used) else "no exemplar has a label of its own"
            self.note(f"labels: {have}, so nothing can be said of them")
            return None
        classes = len(self.snapshot.vocabulary.class_names)
        own = bool((used < classes).all())
        numbers = np.arange(classes) if own else used
        places = np.where(given, labels if own else np.searchsorted(used, labels), 0)
        model = self.probabilities if own else translated(self.probabilities, places, given, len(used))
        neighbours = votes(self.graph(ROBUST_FEATURE), places, given, len(numbers))
        return pooled(model, neighbours, places, given, numbers=numbers)

    def too_few(self, what: str) -> bool:
        """Whether nothing can be said; noted."""
        if len(self.store) < FEWEST:
            self.note(f"{what}: nothing can be said of fewer than {FEWEST} exemplars")
        return len(self.store) < FEWEST

    # -------------------------------------------------------------------------------------------- findings

    def name(self, row: int) -> str:
        """Of an exemplar's label."""
        return self.names[self.store.labels[row]]

    def confidence(self, row: int) -> float:
        """Of the model in the class that it predicts."""
        return float(self.probabilities[row, self.predicted[row]])

    def evidence(self, row: int, similarity: float) -> Evidence:
        """An exemplar as evidence."""
        return Evidence(str(self.store.ids[row]), self.name(row), self.names[self.predicted[row]], similarity)

    def nearest(self, row: int, column: str) -> tuple[Evidence, ...]:
        """An exemplar's neighbours, to be shown."""
        graph = self.graph(column)
        pairs = zip(graph.rows[row, :SHOWN].tolist(), graph.scores[row, :SHOWN].tolist(), strict=True)
        return tuple(self.evidence(other, similarity) for other, similarity in pairs)

    def finding(self, kind: Kind, score: float, row: int, why: str, evidence: tuple[Evidence, ...]) -> Finding:
        """Of an exemplar."""
        id_, predicted = str(self.store.ids[row]), self.names[self.predicted[row]]
        given, confidence = bool(self.given[row]), self.confidence(row)
        return Finding(
            kind, float(score), id_, self.name(row), given, predicted, why, evidence, confidence=confidence
        )  # fmt: skip

    def rule(self, text: str) -> Rule:
        """By the rate of false findings, over all exemplars."""
        return Rule(text, 1 - self.options.rate, len(self.store))
