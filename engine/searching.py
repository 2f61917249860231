"""A search, step by step: what it finds out about each query, and how that becomes a `SearchResult`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64

from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.ranking import in_turn
from tmm_engine.index.neighbours.search import EXACT, Metric, Neighbours
from tmm_engine.index.progress import Progress
from tmm_engine.index.store.building import predict
from tmm_engine.index.store.exemplars import FEATURE, STRETCHED_FEATURE, ExemplarStore
from tmm_engine.query import Query
from tmm_engine.request import Mode, Prefilter, Request
from tmm_engine.rerank.contrast import stretch_contrast
from tmm_engine.rerank.recognise import Recognised, chord
from tmm_engine.rerank.settings import TmmConfig
from tmm_engine.rerank.tmm import Ranking, TmmNN
from tmm_engine.results import Hit, SearchResult


@dataclass(slots=True)
class _Answer:
    """What a search finds out about one query, step by step."""

    predicted: int = -1
    rows: Int64[np.ndarray, "k"] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    scores: Float[np.ndarray, "k"] = field(default_factory=lambda: np.empty(0))
    scored: int = 0
    recognised: Recognised | None = None
    ranking: Ranking | None = None
    timings: dict[str, float] = field(default_factory=dict)


class Searcher:
    """Answers checked requests over one store's exemplars: L2 and cosine with FAISS, or TMM-NN.

    Args:
        classifier: Embeds the queries as it embedded the exemplars: unlike `tmm.classifier`, without any rearrangement.
        tmm: Ranks the exemplars of its store.
        class_names: In label order.
        neighbours: FAISS factory string.
        cache: Where FAISS indexes are kept, if anywhere.
    """

    def __init__(
        self,
        classifier: Classifier,
        tmm: TmmNN,
        *,
        class_names: tuple[str, ...],
        neighbours: str,
        cache: FaissCache | None,
    ) -> None:
        self._classifier = classifier
        self._tmm = tmm
        self._store = tmm.store
        self._class_names = class_names
        self._factory = neighbours
        self._cache = cache
        self._neighbours: dict[tuple[Metric, str], Neighbours] = {}

    @property
    def backend(self) -> str:
        """What passes exemplars through the backbone: software, precision, device."""
        return self._tmm.backbone.name

    def over(self, store: ExemplarStore) -> "Searcher":
        """The same over other exemplars with features of the same classifier; L2 and cosine are exact there."""
        tmm = self._tmm.over(store)
        return Searcher(self._classifier, tmm, class_names=self._class_names, neighbours=EXACT, cache=None)

    def forget_neighbours(self) -> None:
        """Let go of the FAISS indexes; a later search makes them again."""
        self._neighbours.clear()

    def search(self, queries: list[Query], request: Request, progress: Progress) -> list[SearchResult]:
        """An answer to every query, in their order.

        Args:
            queries: Of the store's image shape.
            request: What is asked for.
            progress: Told of exemplars scored.

        Raises:
            InputError: the index lacks what the request needs; or as `TmmNN.rank_many`.
        """
        searched = [_stretched(query) for query in queries] if request.config.stretch else queries
        if request.mode is Mode.TMM:
            answers = self._rerank(searched, request, progress)
        else:
            answers = self._nearest(searched, request)
        return [self._result(query, answer, request) for query, answer in zip(queries, answers, strict=True)]

    def _nearest(self, queries: list[Query], request: Request) -> list[_Answer]:
        """L2 or cosine."""
        answers = [_Answer() for _ in queries]
        neighbours = self._neighbours_by(Metric(request.mode), request, answers)
        features = self._embed(queries, answers)
        if request.config.recognition is not None:
            with _timed(answers, "recognition"):
                features = self._recognised(features, neighbours, request, answers)
        with _timed(answers, "neighbours"):
            found = neighbours.search(features, k=request.k)
        for answer, (rows, scores) in zip(answers, found, strict=True):
            answer.rows, answer.scores, answer.scored = rows, scores, len(self._store)
        return answers

    def _recognised(
        self, features: Float32[np.ndarray, "q d"], neighbours: Neighbours, request: Request, answers: list[_Answer]
    ) -> Float32[np.ndarray, "q d"]:
        """Features moved to those of the exemplars that the queries may be copies of; notes which."""
        assert request.config.recognition is not None
        threshold, metric, moved = request.config.recognition, Metric(request.mode), torch.tensor(features)
        for answer, query, (rows, scores) in zip(answers, moved, neighbours.search(features, k=2), strict=True):
            if len(rows) < 2:  # an approximate index may find fewer
                continue
            length = float(query.norm()) or 1.0
            first, second = (-float(s) / length if metric is Metric.L2 else chord(float(s)) for s in scores)
            exemplar = torch.tensor(self._store.features(rows[:1], column=_column(request)))[0]  # may be read-only
            answer.recognised = Recognised.nearest(int(rows[0]), (first, second), threshold=threshold)
            query.copy_(answer.recognised.moved(query, exemplar))
        return moved.numpy()

    def _rerank(self, queries: list[Query], request: Request, progress: Progress) -> list[_Answer]:
        """TMM-NN, over all exemplars or over candidates."""
        answers = [_Answer() for _ in queries]
        features = self._embed(queries, answers)
        pixels = torch.from_numpy(np.stack([query.pixels for query in queries])).to(self._classifier.device)
        rankings = self._tmm.rank_many(
            pixels,
            k=request.k,
            config=request.config,
            candidates=self._candidates(pixels, features, request, answers),
            labels=[request.label] * len(queries),
            together=request.together,
            progress=progress,
        )
        for answer, ranking in zip(answers, rankings, strict=True):
            answer.rows, answer.scores, answer.scored = ranking.rows, ranking.scores, ranking.scored
            answer.ranking, answer.recognised = ranking, ranking.recognised
            answer.timings |= ranking.timings
        return answers

    def _embed(self, queries: list[Query], answers: list[_Answer]) -> Float32[np.ndarray, "q d"]:
        """φ(x_q), one by one so that an answer does not depend on its neighbours in the list; notes the predictions."""
        features = []
        for query, answer in zip(queries, answers, strict=True):
            with _timed([answer], "embedding"), torch.inference_mode():
                pixels = torch.from_numpy(query.pixels[None]).to(self._classifier.device)
                features.append(self._classifier.features(pixels).float().cpu().numpy())
                answer.predicted = int(predict(features[-1], self._classifier)[0])
        return np.concatenate(features)

    def _candidates(
        self,
        pixels: Float32[torch.Tensor, "q c h w"],
        features: Float32[np.ndarray, "q d"],
        request: Request,
        answers: list[_Answer],
    ) -> list[Int64[np.ndarray, "candidates"] | None]:
        """The rows that each query's rerank scores; None for all."""
        count = request.candidates
        if count is None or count >= len(self._store):
            return [None] * len(answers)
        if request.prefilter is Prefilter.GLOBAL:
            config, labels = self._as_prefilter(request.config), [request.label] * len(answers)
            with _timed(answers, "prefilter"):
                rankings = self._tmm.rank_many(pixels, k=count, config=config, labels=labels)
            return [ranking.rows for ranking in rankings]
        metrics = list(Metric) if request.prefilter is Prefilter.UNION else [Metric(request.prefilter)]
        searchers = [self._neighbours_by(metric, request, answers) for metric in metrics]
        with _timed(answers, "prefilter"):
            found = [[rows for rows, _ in searcher.search(features, k=count)] for searcher in searchers]
        return [in_turn(rankings)[:count] for rankings in zip(*found, strict=True)]

    def _as_prefilter(self, config: TmmConfig) -> TmmConfig:
        """The configuration with the index's global trigger instead of its own."""
        shared = self._tmm.global_trigger
        if shared is None:
            raise InputError(
                "the index has no global trigger, which the prefilter 'global' needs: build it with --global-trigger, "
                "or choose another (--prefilter union)"
            )
        return shared.as_asked_of(config)

    def _neighbours_by(self, metric: Metric, request: Request, answers: list[_Answer]) -> Neighbours:
        column = _column(request)
        if column not in self._store.feature_columns:
            raise InputError(
                "the index has no features of images with their contrast stretched: build it with --global-trigger, "
                "or search with --no-stretch"
            )
        if (metric, column) not in self._neighbours:
            with _timed(answers, "loading features"):
                self._neighbours[metric, column] = Neighbours(
                    self._store, metric, column=column, factory=self._factory, cache=self._cache
                )
        return self._neighbours[metric, column]

    def _result(self, query: Query, answer: _Answer, request: Request) -> SearchResult:
        ranking, recognised = answer.ranking, answer.recognised
        original = None if recognised is None or recognised.share < 0.5 else str(self._store.ids[recognised.row])
        notes = []
        if recognised is not None and original is not None and not self._shows(query, recognised.row):
            notes.append(f"recognised as {original}: ranked by what is like that exemplar")
        if len(answer.rows) < request.k:
            notes.append(
                f"k = {request.k} is more than the {answer.scored} exemplars scored: returned {len(answer.rows)}"
            )
        return SearchResult(
            query=query.name,
            mode=str(request.mode),
            hits=self._hits(answer),
            predicted_label=answer.predicted,
            predicted_class=self._class_names[answer.predicted],
            true_label=query.label,
            true_class=None if query.label is None else self._class_names[query.label],
            scored=answer.scored,
            exemplars=len(self._store),
            config=request.config.to_json() if ranking else None,
            backend=self.backend if ranking else "FAISS",
            timings=answer.timings,
            notes=tuple(notes),
            recognised_as=original,
            recognised_share=None if recognised is None else recognised.share,
            query_image=np.rint(query.pixels * 255.0).astype(np.uint8),
            trigger=ranking.trigger if ranking else None,
            triggered_query=ranking.triggered_query if ranking else None,
        )

    def _shows(self, query: Query, row: int) -> bool:
        """Whether the query is the exemplar itself, pixel by pixel."""
        return np.array_equal(np.rint(query.pixels * 255.0), self._store.images(np.array([row]))[0])

    def _hits(self, answer: _Answer) -> tuple[Hit, ...]:
        store = self._store
        images, metadata = store.images(answer.rows), store.metadata(answer.rows)
        confidences = None if answer.ranking is None else answer.ranking.confidences
        return tuple(
            Hit(
                rank=rank,
                id=str(store.ids[row]),
                label=int(store.labels[row]),
                class_name=self._class_names[store.labels[row]],
                label_is_predicted=bool(store.label_is_predicted[row]),
                score=float(answer.scores[rank]),
                confidence=None if confidences is None else float(confidences[rank]),
                metadata=metadata[rank],
                image=images[rank],
            )
            for rank, row in enumerate(answer.rows)
        )


def _column(request: Request) -> str:
    return STRETCHED_FEATURE if request.config.stretch else FEATURE


def _stretched(query: Query) -> Query:
    return replace(query, pixels=stretch_contrast(torch.from_numpy(query.pixels)).numpy())


@contextmanager
def _timed(answers: list[_Answer], step: str) -> Iterator[None]:
    """Time a step, shared equally by the answers it serves."""
    start = time.perf_counter()
    yield
    seconds = (time.perf_counter() - start) / len(answers)
    for answer in answers:
        answer.timings[step] = answer.timings.get(step, 0.0) + seconds
