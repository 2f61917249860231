"""Answers with examples and counter-examples: why did the model decide so?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float32
from torch import nn

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import exact_scores
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.influence import Pulled, strongest
from tmm_engine.prototypes import medoids
from tmm_engine.rerank.classes import ExemplarClasses
from tmm_engine.scanning import Best, ByVector, RankedBy, Scored, score_blocks

SHOWN = 3
"""Exemplars of each kind."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One query whose answer is to be explained.

    Attributes:
        features: φ(x_q), of the stretched image where the search stretches.
        ranked_by: What the exemplars were ranked by.
        decided: The class that the model predicts.
    """

    features: Float32[np.ndarray, "d"]
    ranked_by: RankedBy
    decided: int


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Rows of exemplars, and what each has to do with the decision.

    Attributes:
        unlike: The nearest that are of another class, nearest first, with their scores in the search.
        prototypes: The medoid of the class decided for, and that of the class of the nearest unlike exemplar, with
            the similarity to the query by what ranks (cosine of features for TMM-NN).
        towards: The exemplars that pulled most towards the decision.
        away: Those that pulled most away from it.
    """

    unlike: Scored
    prototypes: Scored
    towards: Scored
    away: Scored


class Explainer:
    """Explains answers over one store.

    Args:
        store: The exemplars.
        classes: y_i of each, classes of the model's.
        head: The classifier's.
    """

    def __init__(self, store: ExemplarStore, classes: ExemplarClasses, head: nn.Linear) -> None:
        self._store, self._classes, self._head = store, classes.numbers, head
        self._medoids = cache(lambda metric, column: medoids(store, self._classes, metric, column=column))

    def explained(self, asked: Sequence[Asked]) -> list[Found]:
        """An explanation of every answer, by two scans over the exemplars for all of them."""
        unlike = self._unlike(asked)
        pulled = Pulled.of(
            np.stack([one.features for one in asked]), np.array([one.decided for one in asked]), self._head
        )
        pulls = strongest(pulled, self._store, self._classes, self._head, k=SHOWN)
        return [
            Found(others, self._prototypes(one, others), *pull)
            for one, others, pull in zip(asked, unlike, pulls, strict=True)
        ]

    def _unlike(self, asked: Sequence[Asked]) -> list[Scored]:
        """For each the nearest exemplars of a class that was not decided for."""
        found = [Best(SHOWN, self._store.ids) for _ in asked]
        for rows, scores in score_blocks(self._store, [one.ranked_by for one in asked]):
            for best, one, own in zip(found, asked, scores, strict=True):
                others = (self._classes[rows] != one.decided) & (own > -np.inf)
                best.offer(rows[others], own[others])
        return [self._as_searched(one.ranked_by, best.found) for one, best in zip(asked, found, strict=True)]

    def _prototypes(self, one: Asked, unlike: Scored) -> Scored:
        by = one.ranked_by if isinstance(one.ranked_by, ByVector) else ByVector(one.features, FEATURE, Metric.COSINE)
        known = self._medoids(by.metric, by.column)
        classes = [one.decided, *self._classes[unlike.rows[:1]].tolist()]
        rows = np.array([known[number] for number in classes if number in known], dtype=np.int64)
        return self._as_searched(by, Scored(rows, np.zeros(len(rows))))

    def _as_searched(self, ranked_by: RankedBy, found: Scored) -> Scored:
        """With the scores that a search gives, to the last bit."""
        if not isinstance(ranked_by, ByVector):
            return found
        features = self._store.features(found.rows, column=ranked_by.column)
        return Scored(found.rows, exact_scores(ranked_by.vector, features, ranked_by.metric))
