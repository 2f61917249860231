"""Neighbours over the columns of one store: the modes robust, l2 and cosine, and candidates for TMM-NN."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.factories import EXACT, Effort, SearchPrecision, usable
from tmm_engine.index.neighbours.matrices import Matrices
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import in_turn
from tmm_engine.index.neighbours.search import Found, Neighbours, exact_scores
from tmm_engine.index.store.exemplars import ExemplarStore, Subset
from tmm_engine.options import Prefilter
from tmm_engine.rerank.columns import STRETCHED_FEATURE
from tmm_engine.rerank.recognise import Recognised, comes_first, first_among, recognise_nearest
from tmm_engine.rerank.timing import Timings


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """The exemplars nearest to one query.

    Attributes:
        rows: Nearest first, ties in order of id; before them the nearest by the recogniser, where it comes first.
        scores: Minus the L2 distance, or the cosine similarity.
        query: The features that they are nearest to; where the query was recognised, moved to the exemplar's.
        recognised: The exemplar that the query may be a copy of, where that was asked.
        agreement: As `index.neighbours.search.Found` has it.
        put_first: Whether the first is so by the recogniser, and has not the largest score.
    """

    rows: Int64[np.ndarray, "k"]
    scores: Float64[np.ndarray, "k"]
    query: Float32[np.ndarray, "d"]
    recognised: Recognised | None = None
    agreement: float = 1.0
    put_first: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """What recognises copies among the queries of a search.

    Attributes:
        column: Of the store's features that it looks at.
        features: The queries' own in it.
        threshold: Of the ratio of distances (`rerank.recognise`), in (0, 1].
        puts_first: Whether the nearest by it may begin an answer that does not take the query for it
            (`rerank.recognise.comes_first`).
    """

    column: str
    features: Float32[np.ndarray, "q _"]
    threshold: float
    puts_first: bool = False


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
    """Searches one store by metric; each column is read, and each FAISS index made, when it is first needed.

    Args:
        store: The exemplars.
        factory: FAISS factory string, where it is `usable`.
        effort: How thoroughly an approximate index is searched.
        cache: Where FAISS indexes are kept, if anywhere.
        matrices: Of the store's columns; by default in memory.
        precision: That was asked for, so that answers say how far it agrees with what is scored again.
    """

    def __init__(
        self,
        store: ExemplarStore,
        *,
        factory: str = EXACT,
        effort: Effort | None = None,
        cache: FaissCache | None = None,
        matrices: Matrices | None = None,
        precision: SearchPrecision | None = None,
    ) -> None:
        self.precision = precision
        self._store, self._factory = store, usable(factory, len(store))
        self._effort, self._cache = effort, cache
        self._matrices = matrices or Matrices(store)
        self._made: dict[tuple[Metric, str], Neighbours] = {}
        self._guard = threading.Lock()

    def among(self, store: Subset) -> "NearestSearch":
        """Exact search among some of the exemplars."""
        return NearestSearch(store, matrices=self._matrices.among(store))

    def by(self, factory: str) -> "NearestSearch":
        """Another search of the same exemplars, whose indexes are kept nowhere."""
        return NearestSearch(self._store, factory=factory, matrices=self._matrices)

    def search(self, compared: Compared, *, k: int, timings: Timings) -> list[Nearest]:
        """The nearest exemplars of every query.

        A query that the gate takes for a copy is ranked, by the share to which it does, as that exemplar. Where the
        gate puts exemplars first, its nearest then comes first if it `comes_first`.

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
                features = _moved(features, recognised, neighbours)
        first = compared.gate is not None and compared.gate.puts_first
        with timings.step("neighbours"):
            found = neighbours.ranked(features, k=k, reach=first_among(len(self._store)) if first else 0)
        answers = [
            Nearest(own.rows, own.scores, query=query, recognised=copy, agreement=own.agreement)
            for own, query, copy in zip(found, features, recognised, strict=True)
        ]
        return [self._first(own, k, neighbours) for own in answers] if first else answers

    def _first(self, found: Nearest, k: int, neighbours: Neighbours) -> Nearest:
        """The k best, and before them the nearest by the recogniser where it `comes_first`."""
        copy, rows, scores = found.recognised, found.rows, found.scores
        if copy is None:
            return replace(found, rows=rows[:k], scores=scores[:k])
        (places,) = np.nonzero(rows == copy.row)
        rank = int(places[0]) if len(places) else len(self._store)
        if rank == 0 or not comes_first(copy, rank, len(self._store)):
            return replace(found, rows=rows[:k], scores=scores[:k])
        own = scores[places]
        if not len(places):
            own = exact_scores(found.query, neighbours.features(np.array([copy.row])), neighbours.metric)
        others = rows != copy.row
        return replace(
            found,
            rows=np.concatenate([[copy.row], rows[others]])[:k],
            scores=np.concatenate([own, scores[others]])[:k],
            put_first=bool(own[0] < scores[0]),
        )

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
        other = NearestSearch(
            self._store,
            factory=self._factory,
            effort=effort,
            cache=self._cache,
            matrices=self._matrices,
            precision=self.precision,
        )
        other._made = {key: made.with_effort(effort) for key, made in self._made.items()}
        return other

    def neighbours(
        self, queries: Float32[np.ndarray, "q d"], metric: Metric, *, column: str, k: int, reach: int
    ) -> list[Found]:
        """The exemplars nearest to features in a column; see `Neighbours.ranked`."""
        return self._neighbours(metric, column, Timings(len(queries))).ranked(queries, k=k, reach=reach)

    def keep(self, cache: FaissCache) -> None:
        """Put what was built without a cache into one."""
        for made in self._made.values():
            made.keep(cache)

    def backend(self, *columns: str) -> str:
        """What compares a query with the exemplars in some columns."""
        name = "matrix products, fp32" if self._factory == EXACT else f"FAISS {self._factory}"
        streamed = any(made.streamed for (_, column), made in [*self._made.items()] if column in columns)
        return f"{name}, features read from the index by every search" if streamed else name

    @property
    def exemplars(self) -> int:
        """How many are searched."""
        return len(self._store)

    @property
    def beside(self) -> int:
        """How many rows the FAISS indexes that were used so far do not know, so that they are looked at one by one."""
        return max((made.beside for made in self._made.values()), default=0)

    def close(self) -> None:
        """Let go of indexes and matrices."""
        self.drop()
        self._matrices.close()

    def drop(self) -> None:
        """Let go of approximate indexes, and of what they took of the bound on memory."""
        with self._guard:
            dropped, self._made = self._made, {}
        for made in dropped.values():
            made.drop()

    def _neighbours(self, metric: Metric, column: str, timings: Timings) -> Neighbours:
        if column not in self._store.feature_columns:
            raise InputError(
                "the index has no features of images with their contrast stretched: build it with descriptors (views=1 "
                "or more) or a global trigger (global_trigger=…), or search with stretch=False"
            )
        with self._guard:  # searches at the same time would each make them
            if (metric, column) not in self._made:
                with timings.step("loading features"):
                    self._made[metric, column] = self._make(metric, column)
            return self._made[metric, column]

    def _make(self, metric: Metric, column: str) -> Neighbours:
        return Neighbours(
            self._store,
            metric,
            column=column,
            factory=self._factory,
            effort=self._effort,
            cache=self._cache,
            matrices=self._matrices,
        )


def _moved(
    features: Float32[np.ndarray, "q d"], recognised: Sequence[Recognised | None], neighbours: Neighbours
) -> Float32[np.ndarray, "q d"]:
    """Each query's features, by the share to which it is a copy at the exemplar's."""
    copies = [(place, copy) for place, copy in enumerate(recognised) if copy is not None]
    if not copies:
        return features
    moved, exemplars = features.copy(), neighbours.features(np.array([copy.row for _, copy in copies]))
    for (place, copy), exemplar in zip(copies, exemplars, strict=True):
        own = torch.from_numpy(features[place])
        moved[place] = copy.moved(own, torch.tensor(exemplar)).numpy()  # a store's may be read-only
    return moved
