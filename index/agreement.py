"""How far a model's predictions agree with the labels that were given: the check of everything that was guessed."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from tmm_engine.index.labels import Vocabulary

NEAR_CHANCE = 0.1  # of the way from chance to perfect agreement


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of a model's predictions with labels.

    Attributes:
        labelled: How many exemplars have a label of their own.
        compared: How many of these labels are classes of the model's.
        agreeing: How many of these the model predicts.
        chance: The share that would agree if the same predictions were dealt out at random, but at least 1/C; in
            [0, 1].
    """

    labelled: int
    compared: int
    agreeing: int
    chance: float

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Agreement":
        """What a file says.

        Raises:
            TypeError: it has other fields.
            ValueError: a field is no number of its range.
        """
        found = cls(**content)
        counts = (found.agreeing, found.compared, found.labelled)
        if not all(type(count) is int for count in counts) or not 0 <= counts[0] <= counts[1] <= counts[2]:
            raise ValueError(f"expected counts that rise, got {counts}")
        if not isinstance(found.chance, int | float) or not 0 <= found.chance <= 1:
            raise ValueError(f"expected a chance in [0, 1], got {found.chance!r}")
        return found

    @property
    def share(self) -> float | None:
        """Of the labels that are classes of the model's, how many it predicts, in [0, 1]; None where none is."""
        return self.agreeing / self.compared if self.compared else None

    @property
    def near_chance(self) -> bool:
        """Whether the model might as well have guessed: what it was taken for is most likely wrong."""
        return self.share is not None and self.share - self.chance < NEAR_CHANCE * (1.0 - self.chance)

    def sentences(self) -> list[str]:
        """What a user should know, with a warning where it is near chance."""
        if not self.labelled:
            return ["no image has a label: the model's predictions stand in, and nothing says whether they are right"]
        if self.share is None:
            return ["no label is a class of the model's, so nothing says whether its predictions are right"]
        percent = round(100 * self.share)
        if 0 < self.agreeing < self.compared:
            percent = min(99, max(1, percent))
        labels = "labels"
        if self.compared < self.labelled:
            labels = f"{self.compared:,} labels (of {self.labelled:,}) that are its classes"
        said = [f"the model's predictions agree with {percent} % of the {labels}"]
        if self.near_chance:
            said.append(
                f"warning: that is near chance or below ({round(100 * self.chance)} %): do the weights, the "
                f"preprocessing (mean, std, image size, channels) and the order of the classes belong to this model "
                f"and to these images?"
            )
        return said


@dataclass(slots=True, eq=False)
class Tally:
    """Counts agreement batch by batch.

    Attributes:
        vocabulary: Of the labels.
    """

    vocabulary: Vocabulary
    _labelled: int = 0
    _compared: int = 0
    _agreeing: int = 0
    _labels: Int64[np.ndarray, "classes"] = field(init=False)
    _predictions: Int64[np.ndarray, "classes"] = field(init=False)
    _same: Int64[np.ndarray, "names"] = field(init=False)

    def __post_init__(self) -> None:
        names = self.vocabulary.names
        first = {name: label for label, name in reversed([*enumerate(names)])}
        self._same = np.array([first[name] for name in names], dtype=np.int64)  # classes of one name are one
        self._labels, self._predictions = np.zeros((2, len(self.vocabulary.class_names)), dtype=np.int64)

    def count(
        self, labels: Int64[np.ndarray, "n"], given: Bool[np.ndarray, "n"], predicted: Int64[np.ndarray, "n"]
    ) -> None:
        """Count some exemplars.

        Args:
            labels: Their numbers in the vocabulary.
            given: Whether each is the exemplar's own.
            predicted: Classes of the model's.
        """
        labels, predicted = self._same[labels[given]], self._same[predicted[given]]
        self._labelled += len(labels)
        known = labels < len(self._labels)
        labels, predicted = labels[known], predicted[known]
        self._compared += len(labels)
        self._agreeing += int((labels == predicted).sum())
        self._labels += np.bincount(labels, minlength=len(self._labels))
        self._predictions += np.bincount(predicted, minlength=len(self._labels))

    def result(self) -> Agreement:
        """Of all that were counted."""
        chance = 1.0 / len(self._labels)
        if np.count_nonzero(self._labels) > 1:  # with one class it would be the share itself
            chance = max(chance, float(self._labels @ self._predictions) / self._compared**2)
        return Agreement(self._labelled, self._compared, self._agreeing, chance)
