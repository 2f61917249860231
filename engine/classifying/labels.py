"""The labels that the exemplars of a store have, numbered without gaps: what a query can be classified as."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.store.exemplars import ExemplarStore


@dataclass(frozen=True, slots=True, eq=False)
class PresentLabels:
    """In the user's words; where an exemplar has no label of its own, the model's prediction stands in.

    Attributes:
        numbers: Of the labels that occur, in the vocabulary, ascending.
        names: Of each.
        places: Of each exemplar its label's position in `numbers`.
        predicted: How many exemplars have the model's prediction for a label.
    """

    numbers: Int64[np.ndarray, "classes"]
    names: tuple[str, ...]
    places: Int64[np.ndarray, "n"]
    predicted: int

    @classmethod
    def of(cls, store: ExemplarStore, vocabulary: Vocabulary) -> "PresentLabels":
        """Those of a store."""
        numbers, places = np.unique(store.labels, return_inverse=True)
        names = tuple(vocabulary.names[number] for number in numbers.tolist())
        return cls(numbers, names, places.astype(np.int64), int(store.label_is_predicted.sum()))

    def place(self, label: int | None) -> int | None:
        """Of a label's number; None where no exemplar has it."""
        found = np.flatnonzero(self.numbers == -1 if label is None else self.numbers == label)
        return int(found[0]) if len(found) else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of them, in sentences."""
        notes = []
        if self.predicted:
            which = f"{self.predicted:,} of the {len(self.places):,} exemplars have no label of their own"
            notes.append(f"{which}: the model's predictions stand in, so that they say what the model says")
        if len(self.numbers) == 1:
            notes.append(f"all exemplars are labelled {self.names[0]!r}: there is nothing else to choose")
        return tuple(notes)
