"""Plain neighbours: L2 and cosine search over one store's features, and candidates for TMM-NN."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import in_turn
from tmm_engine.index.neighbours.search import Neighbours
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.options import Prefilter
from tmm_engine.rerank.columns import STRETCHED_FEATURE
from tmm_engine.rerank.recognise import Recognised, recognise_nearest
from tmm_engine.rerank.timing import Timings


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """The exemplars nearest to one query.

    Attributes:
        rows: Nearest first; ties in order of id.
        scores: Minus the L2 distance, or the cosine similarity.
        recognised: The exemplar that the query may be a copy of, where that was asked.
    """

    rows: Int64[np.ndarray, "k"]
    scores: Float64[np.ndarray, "k"]
    recognised: Recognised | None = None


class Baselines:
    """Searches one store by metric; each FAISS index is made when it is first needed.

    Args:
        store: The exemplars.
        factory: FAISS factory string.
        cache: Where FAISS indexes are kept, if anywhere.
    """

    def __init__(self, store: ExemplarStore, *, factory: str, cache: FaissCache | None) -> None:
        self._store, self._factory, self._cache = store, factory, cache
        self._made: dict[tuple[Metric, str], Neighbours] = {}

    def search(
        self,
        features: Float32[np.ndarray, "q d"],
        metric: Metric,
        *,
        k: int,
        stretch: bool,
        threshold: float | None,
        timings: Timings,
    ) -> list[Nearest]:
        """The nearest exemplars of every query.

        Args:
            features: φ(x_q), of stretched queries where `stretch` is set.
            metric: What makes an exemplar near.
            k: How many.
            stretch: Whether exemplars are looked at with their contrast stretched.
            threshold: Of recognition; None: no query is recognised.
            timings: Of the search.

        Raises:
            InputError: the index has no features of stretched images, and they are asked for.
        """
        column = STRETCHED_FEATURE if stretch else FEATURE
        neighbours = self._neighbours(metric, column, timings)
        recognised: Sequence[Recognised | None] = [None] * len(features)
        if threshold is not None:
            with timings.step("recognition"):
                two = neighbours.search(features, k=2)
                pairs = [[*zip(rows.tolist(), scores.tolist(), strict=True)] for rows, scores in two]
                recognised, features = self._moved(features, pairs, metric, column, threshold)
        with timings.step("neighbours"):
            found = [Nearest(*pair) for pair in neighbours.search(features, k=k)]
        return [replace(own, recognised=copy_of) for own, copy_of in zip(found, recognised, strict=True)]

    def candidates(
        self,
        features: Float32[np.ndarray, "q d"],
        prefilter: Prefilter,
        *,
        count: int,
        stretch: bool,
        timings: Timings,
    ) -> list[Int64[np.ndarray, "candidates"]]:
        """The rows that each query's rerank scores, chosen by one metric or by both in turn."""
        column = STRETCHED_FEATURE if stretch else FEATURE
        metrics = list(Metric) if prefilter is Prefilter.UNION else [Metric(prefilter)]
        searchers = [self._neighbours(metric, column, timings) for metric in metrics]
        with timings.step("prefilter"):
            found = [[rows for rows, _ in searcher.search(features, k=count)] for searcher in searchers]
        return [in_turn(rankings)[:count] for rankings in zip(*found, strict=True)]

    def close(self) -> None:
        """Let go of the FAISS indexes."""
        self._made.clear()

    def _moved(
        self,
        features: Float32[np.ndarray, "q d"],
        pairs: Sequence[Sequence[tuple[int, float]]],
        metric: Metric,
        column: str,
        threshold: float,
    ) -> tuple[list[Recognised | None], Float32[np.ndarray, "q d"]]:
        """What the queries may be copies of, and their features moved to those exemplars'."""
        recognised: list[Recognised | None] = []
        moved = torch.tensor(features)
        for query, nearest in zip(moved, pairs, strict=True):
            found = recognise_nearest(query, nearest, metric=metric, threshold=threshold)
            if found is not None:
                exemplar = self._store.features(np.array([found.row]), column=column)
                query.copy_(found.moved(query, torch.tensor(exemplar)[0]))  # a store's may be read-only
            recognised.append(found)
        return recognised, moved.numpy()

    def _neighbours(self, metric: Metric, column: str, timings: Timings) -> Neighbours:
        if column not in self._store.feature_columns:
            raise InputError(
                "the index has no features of images with their contrast stretched: build it with descriptors (views=1 "
                "or more) or a global trigger (global_trigger=…), or search with stretch=False"
            )
        if (metric, column) not in self._made:
            with timings.step("loading features"):
                self._made[metric, column] = Neighbours(
                    self._store, metric, column=column, factory=self._factory, cache=self._cache
                )
        return self._made[metric, column]
