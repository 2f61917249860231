"""Neighbours by FAISS over the columns of one store: the modes robust, l2 and cosine, and candidates for TMM-NN."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.factories import EXACT, Effort
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
        query: The features that they are nearest to; where the query was recognised, moved to the exemplar's.
        recognised: The exemplar that the query may be a copy of, where that was asked.
    """

    rows: Int64[np.ndarray, "k"]
    scores: Float64[np.ndarray, "k"]
    query: Float32[np.ndarray, "d"]
    recognised: Recognised | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """What recognises copies among the queries of a search.

    Attributes:
        column: Of the store's features that it looks at.
        features: The queries' own in it.
        threshold: Of the ratio of distances (`rerank.recognise`), in (0, 1].
    """

    column: str
    features: Float32[np.ndarray, "q _"]
    threshold: float


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """Queries as they are compared with the exemplars.

    Attributes:
        features: Of the queries, as in the column.
        metric: What makes an exemplar near.
        column: Of the store's features.
        gate: What recognises copies; None: no query is recognised.
        predicted: The model's class for each query.
        plain: φ(x_q) of each, of the stretched image where the search stretches.
    """

    features: Float32[np.ndarray, "q d"]
    metric: Metric
    column: str
    gate: Gate | None
    predicted: list[int]
    plain: Float32[np.ndarray, "q _"]

    def only(self, place: int) -> "Compared":
        """One of the queries."""
        one = slice(place, place + 1)
        gate = None if self.gate is None else replace(self.gate, features=self.gate.features[one])
        return replace(
            self,
            features=self.features[one],
            gate=gate,
            predicted=self.predicted[one],
            plain=self.plain[one],
        )


class NearestSearch:
    """Searches one store by metric; each FAISS index is made when it is first needed.

    Args:
        store: The exemplars.
        factory: FAISS factory string.
        effort: How thoroughly an approximate index is searched.
        cache: Where FAISS indexes are kept, if anywhere.
    """

    def __init__(
        self,
        store: ExemplarStore,
        *,
        factory: str = EXACT,
        effort: Effort | None = None,
        cache: FaissCache | None = None,
    ) -> None:
        self._store, self._factory, self._effort, self._cache = store, factory, effort, cache
        self._made: dict[tuple[Metric, str], Neighbours] = {}

    def search(self, compared: Compared, *, k: int, timings: Timings) -> list[Nearest]:
        """The nearest exemplars of every query.

        A query that the gate takes for a copy is ranked, by the share to which it does, as that exemplar.

        Args:
            compared: The queries.
            k: How many.
            timings: Of the search.

        Raises:
            InputError: the index has no features of stretched images, and they are asked for.
        """
        neighbours = self._neighbours(compared.metric, compared.column, timings)
        features = compared.features
        recognised: Sequence[Recognised | None] = [None] * len(features)
        if compared.gate is not None:
            recognised = self.recognised(compared.gate, compared.metric, timings)
            with timings.step("recognition"):
                pairs = zip(features, recognised, strict=True)
                features = np.stack([self._moved(own, copy, compared.column) for own, copy in pairs])
        with timings.step("neighbours"):
            found = neighbours.search(features, k=k)
        return [
            Nearest(*pair, query=query, recognised=copy)
            for pair, query, copy in zip(found, features, recognised, strict=True)
        ]

    def recognised(self, gate: Gate, metric: Metric, timings: Timings) -> list[Recognised | None]:
        """For each query of the gate the exemplar that it may be a copy of; None where there are fewer than two."""
        recogniser = self._neighbours(metric, gate.column, timings)
        with timings.step("recognition"):
            return [
                recognise_nearest(
                    torch.from_numpy(query),
                    [*zip(rows.tolist(), scores.tolist(), strict=True)],
                    metric=metric,
                    threshold=gate.threshold,
                )
                for query, (rows, scores) in zip(gate.features, recogniser.search(gate.features, k=2), strict=True)
            ]

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

    def with_effort(self, effort: Effort) -> "NearestSearch":
        """The same FAISS indexes, searched more or less thoroughly."""
        other = NearestSearch(self._store, factory=self._factory, effort=effort, cache=self._cache)
        other._made = {key: made.with_effort(effort) for key, made in self._made.items()}
        return other

    def keep(self, cache: FaissCache) -> None:
        """Put what was built without a cache into one."""
        for made in self._made.values():
            made.keep(cache)

    @property
    def beside(self) -> int:
        """How many rows the FAISS indexes that were used so far do not know, so that they are looked at one by one."""
        return max((made.beside for made in self._made.values()), default=0)

    def close(self) -> None:
        """Let go of the FAISS indexes."""
        self._made.clear()

    def _moved(
        self, features: Float32[np.ndarray, "d"], copy: Recognised | None, column: str
    ) -> Float32[np.ndarray, "d"]:
        """A query's features, by the share to which it is a copy at the exemplar's."""
        if copy is None:
            return features
        exemplar = self._store.features(np.array([copy.row]), column=column)[0]
        return copy.moved(torch.from_numpy(features), torch.tensor(exemplar)).numpy()  # a store's may be read-only

    def _neighbours(self, metric: Metric, column: str, timings: Timings) -> Neighbours:
        if column not in self._store.feature_columns:
            raise InputError(
                "the index has no features of images with their contrast stretched: build it with descriptors (views=1 "
                "or more) or a global trigger (global_trigger=…), or search with stretch=False"
            )
        if (metric, column) not in self._made:
            with timings.step("loading features"):
                self._made[metric, column] = Neighbours(
                    self._store, metric, column=column, factory=self._factory, effort=self._effort, cache=self._cache
                )
        return self._made[metric, column]
