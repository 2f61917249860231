"""The preset robust, made quick and without recognition, and what its tests share."""

from dataclasses import replace
from typing import Any

import numpy as np

from tests.configs import changed
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank import GlobalRecipe, Ranking, TmmConfig, preset
from tmm_engine.rerank.columns import global_columns
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.settings import ClosedForm, QueryTrigger, TunedHead

N = 60
ROBUST = changed(preset("fast"), fusion=4.0, recognition=None)
OWN = replace(ROBUST, trigger=QueryTrigger(steps=20))
RECIPE = replace(GlobalRecipe.of(ROBUST), trigger=QueryTrigger(steps=20))
HEADS = (TunedHead(min_steps=10), ROBUST.head)


def closed(config: TmmConfig, **settings: Any) -> TmmConfig:
    """The configuration with the head of the preset robust, and these settings."""
    return changed(replace(config, head=ClosedForm(shrinkage=1.0)), **settings)


def store_with(shared: GlobalTrigger, store: MemoryStore, classifier: Classifier) -> MemoryStore:
    """The same exemplars, with the columns of the global trigger."""
    every = np.arange(len(store))
    images = store.images(every).copy()
    columns = {column.name: column.compute(images) for column in global_columns(shared, classifier)}
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
