"""The preset robust, made quick and without recognition, and what its tests share."""

from dataclasses import replace

import numpy as np

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank import Ranking, Trigger, preset
from tmm_engine.rerank.columns import robust_columns
from tmm_engine.rerank.global_trigger import GlobalTrigger

N = 60
ROBUST = replace(preset("robust"), fusion=4.0, recognition=None, trigger_steps=20, tuning_min_steps=10)
OWN = replace(ROBUST, trigger=Trigger.QUERY)


def store_with(shared: GlobalTrigger, store: MemoryStore, classifier: Classifier) -> MemoryStore:
    """The same exemplars, with the columns of the global trigger."""
    every = np.arange(len(store))
    images = store.images(every).copy()
    columns = {column.name: column.compute(images) for column in robust_columns(shared, classifier)}
    return MemoryStore(
        store.images(every),
        {FEATURE: store.features(every)} | columns,
        store.labels,
        ids=store.ids.tolist(),
    )


def by_row(ranking: Ranking) -> np.ndarray:
    """Scores of all exemplars, in the order of rows."""
    assert sorted(ranking.rows) == list(range(len(ranking.rows)))
    return ranking.scores[np.argsort(ranking.rows)]
