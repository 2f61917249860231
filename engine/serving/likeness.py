"""What scores are usual among the exemplars of one store, so that a score can be said in words."""

import threading
from typing import Any

import numpy as np

from tmm_engine.classifying.nearness import class_scores
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.descriptors.columns import ROBUST_FEATURE
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import exact_scores
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.options import Mode
from tmm_engine.scanning import ByVector

SAMPLE = 100
QUANTILES = {"low": 0.1, "usual": 0.5, "high": 0.9}
RANKED_BY = {
    Mode.ROBUST: (ROBUST_FEATURE, Metric.COSINE),
    Mode.L2: (FEATURE, Metric.L2),
    Mode.COSINE: (FEATURE, Metric.COSINE),
}
"""The modes whose scores compare features that are stored, and what of."""


class Likeness:
    """Of the exemplars of one store; a scan of their features when it is first asked for.

    Args:
        store: The exemplars.
    """

    def __init__(self, store: ExemplarStore) -> None:
        self._store = store
        self._once = threading.Lock()
        self._found: dict[str, Any] | None = None

    def told(self) -> dict[str, Any]:
        """For each mode that has them, of a sample drawn with a fixed seed: the scores of its exemplars' nearest others
        at `QUANTILES`, and the median score of any two of them; nothing where there is only one exemplar.
        """
        with self._once:
            if self._found is None:
                self._found = self._measured()
            return self._found

    def _measured(self) -> dict[str, Any]:
        store = self._store
        drawn = np.random.default_rng(0).choice(len(store), min(SAMPLE, len(store)), replace=False)
        rows = np.sort(drawn).astype(np.int64)
        modes = {} if len(rows) < 2 else RANKED_BY
        return {
            "sample": len(rows),
            "modes": {str(mode): self._of(rows, *by) for mode, by in modes.items() if by[0] in store.feature_columns},
        }

    def _of(self, rows: np.ndarray, column: str, metric: Metric) -> dict[str, float]:
        features = self._store.features(rows, column=column)
        queries = [ByVector(each, column, metric) for each in features]
        one_class = np.zeros(len(self._store), dtype=np.int64)
        nearest = class_scores(self._store, queries, one_class, k=1, without=rows)
        pairs = [exact_scores(each, features[place + 1 :], metric) for place, each in enumerate(features[:-1])]
        found = {name: float(np.quantile(nearest, share)) for name, share in QUANTILES.items()}
        return found | {"any_two": float(np.median(np.concatenate(pairs)))}
