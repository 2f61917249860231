"""y_i of Eq. 3: the class that TMM-NN takes each exemplar for."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from tmm_engine.index.store.exemplars import ExemplarStore


@dataclass(frozen=True, slots=True, eq=False)
class ExemplarClasses:
    """The label where it is a class of the model's, else the class that the model predicts.

    Attributes:
        numbers: y_i.
        others: How many exemplars have a label that is no class of the model's.
        unlabelled: How many have no label.
    """

    numbers: Int64[np.ndarray, "n"]
    others: int
    unlabelled: int

    @classmethod
    def of(cls, store: ExemplarStore, num_classes: int) -> "ExemplarClasses":
        """Those of all exemplars of a store, for a model of so many classes."""
        numbers = np.array(store.labels)  # a copy: a store's may be read-only
        others = np.flatnonzero(numbers >= num_classes)
        numbers[others] = store.predictions(others)
        return cls(numbers, len(others), int(store.label_is_predicted.sum()))

    @property
    def notes(self) -> list[str]:
        """Which of the two Eq. 3 uses, where labels are no classes; that an exemplar has none its hit says."""
        if not self.others:
            return []
        why = {"with a label that is no class of the model's": self.others, "without a label": self.unlabelled}
        told = " and ".join(f"{count:,} {which}" for which, count in why.items() if count)
        labels = len(self.numbers) - self.others - self.unlabelled
        rest = f", the label of the other {labels:,}" if labels else ""
        return [f"exemplars' classes (Eq. 3): the model's prediction for {told}{rest}"]
