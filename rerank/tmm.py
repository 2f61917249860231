"""TMM-NN: the order of its steps, and nothing else. Ghosh, Harikumar, Rana, arXiv 2511.06261, Algorithm 1.

| step | what is handed on | where |
|---|---|---|
| view | the query stretched, its trigger (step 1 of the paper), both embedded: `QueryView` | `rerank.view`, `trigger` |
| plan | the rows that the head is found on and those that are scored: `Plan` | `rerank.plan` |
| pass | φ(x_i^t) of the exemplars | `rerank.passing` |
| head | a head tuned, or a discriminant (step 2): `Scorer` | `rerank.head` |
| score | scores and confidences (step 3): `Scores` | `rerank.score` |
| recognise | is it a copy of an exemplar? its features move there, and all are scored again | `rerank.recognise` |
| rank | the best of them: `Ranking` | `rerank.rank` |
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.rerank.backbone import Backbone, Precision, TorchBackbone, specialised
from tmm_engine.rerank.classes import ExemplarClasses
from tmm_engine.rerank.exemplars import DEFAULT_CACHE_BYTES, ExemplarTensors
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.head import HeadFinder
from tmm_engine.rerank.passing import TriggeredExemplars
from tmm_engine.rerank.plan import Plan
from tmm_engine.rerank.rank import Ranking, best
from tmm_engine.rerank.recognise import Recognised, chord
from tmm_engine.rerank.score import Scorer, Scores
from tmm_engine.rerank.settings import TmmConfig
from tmm_engine.rerank.timing import Timings
from tmm_engine.rerank.view import QueryView, view_queries

Candidates = Int64[np.ndarray, "_"] | None
Choose = Callable[[list[QueryView]], Sequence[Candidates]]
"""From the queries, as viewed, to the rows that each one's search scores; None is all."""

RESCORED = 256  # of the best of an inexact pass, scored again exactly; or twice k, if that is more
TOGETHER_BYTES = 512 << 20  # triggered features of the queries that share a pass


class TmmNN:
    """Ranks a store's exemplars by how much the classifier sees each as like a query.

    Args:
        classifier: f = head ∘ φ; never modified.
        store: The exemplars; their features are this classifier's.
        cache_bytes: What may stay on the classifier's device between queries, images first, then features.
        precision: Of the pass over the exemplars. In bf16 the best of it are scored again in fp32.
        backbone: What passes exemplars through φ instead of PyTorch.
        global_trigger: The index's, if it has one.
    """

    def __init__(
        self,
        classifier: Classifier,
        store: ExemplarStore,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        precision: Precision = Precision.FP32,
        backbone: Backbone | None = None,
        global_trigger: GlobalTrigger | None = None,
    ) -> None:
        self.classifier = specialised(classifier)
        self.store, self.global_trigger = store, global_trigger
        self.backbone = backbone or TorchBackbone(self.classifier, precision)
        self._exact = TorchBackbone(self.classifier)
        self.cache_bytes = cache_bytes
        self._tensors = ExemplarTensors(store, device=classifier.device, cache_bytes=cache_bytes)
        self._heads = self._head_finder()

    def _head_finder(self) -> HeadFinder:
        return HeadFinder(self.classifier, self.store, self._tensors)

    @property
    def classes(self) -> ExemplarClasses:
        """y_i of all exemplars, which a tuned head is found with."""
        return self._heads.classes

    def over(self, store: ExemplarStore) -> "TmmNN":
        """The same over other exemplars with features of the same classifier."""
        return TmmNN(
            self.classifier,
            store,
            cache_bytes=self.cache_bytes,
            backbone=self.backbone,
            global_trigger=self.global_trigger,
        )

    def rank(
        self,
        query: Float[Tensor, "c h w"],
        *,
        k: int,
        config: TmmConfig,
        candidates: Candidates = None,
        label: int | None = None,
        progress: Progress = silent,
    ) -> Ranking:
        """The k exemplars with the largest scores; `rank_many` for one query."""
        [ranking] = self.rank_many(
            query[None], k=k, config=config, candidates=[candidates], labels=[label], progress=progress
        )
        return ranking

    def rank_many(
        self,
        queries: Float[Tensor, "q c h w"],
        *,
        k: int,
        config: TmmConfig,
        candidates: Sequence[Candidates] | Choose | None = None,
        labels: Sequence[int | None] | None = None,
        together: bool = False,
        copies: Sequence[Recognised | None] | None = None,
        progress: Progress = silent,
        timings: Timings | None = None,
    ) -> list[Ranking]:
        """For each query the k exemplars with the largest scores; queries share the pass over the images in memory.

        Args:
            queries: Pixels in [0, 1], on the classifier's device and in its dtype; one may equal an exemplar, which
                then stays (§4.4).
            k: At least 1; fewer are returned where fewer are scored.
            config: The reading of TMM-NN.
            candidates: For each query the rows to score, None for all, or what chooses them; the head is then found on
                them and on `Sample.companions` random others.
            labels: y_q for each query; None takes the model's prediction.
            together: Optimise the triggers jointly, several times as fast. Without it each query's answer is bit for
                bit what it is alone; with it triggers differ slightly, since the optimisation amplifies rounding.
            copies: For each query the exemplar that it may be a copy of, where another column of features recognises
                better; by default the nearest by what is scored. Only where the configuration recognises.
            progress: Told of steps of optimisation and of exemplars passed through the backbone.
            timings: Of the search that this is a part of.

        Raises:
            InputError: a label that is no class; ω makes every triggered image the same or leaves the trigger out (a
                constant query image); or a global trigger is asked for that the index does not have, or has for another
                blend.
        """
        timings = timings or Timings(len(queries))
        views = view_queries(
            self.classifier,
            queries,
            config,
            labels=labels or [None] * len(queries),
            shared=self.global_trigger,
            together=together,
            timings=timings,
            progress=progress,
        )
        chosen = candidates(views) if callable(candidates) else candidates or [None] * len(queries)
        plans = [Plan.draw(len(self.store), config, rows) for rows in chosen]
        search = self._search(config, k, progress, timings)
        rankings: list[Ranking] = []
        for group in self._groups(views, plans):
            members, plan = [views[position] for position in group], plans[group[0]]
            with timings.step("pass", group):
                triggered = search.passed(members, plan)
            known = None if copies is None else [copies[position] for position in group]
            rankings += search.ranked(group, members, plan, triggered, copies=known)
        return rankings

    def rank_variants(
        self, query: Float[Tensor, "c h w"], *, k: int, configs: Sequence[TmmConfig], label: int | None = None
    ) -> list[Ranking]:
        """One query under several configurations that share the trigger and the pass over all exemplars.

        Args:
            query: As in `rank_many`.
            k: At least 1.
            configs: They differ only in what follows the pass.
            label: y_q; None takes the model's prediction.

        Raises:
            InputError: configurations with different triggered features; or as `rank_many`.
        """
        first = configs[0]
        if any(config.triggering != first.triggering for config in configs):
            raise InputError("expected configurations that differ only after the pass: in the head or the ranking")
        views = view_queries(
            self.classifier,
            query[None],
            first,
            labels=[label],
            shared=self.global_trigger,
            together=False,
            timings=(shared := Timings(1)),
        )
        plan = Plan.draw(len(self.store), first, None)
        with shared.step("pass"):
            triggered = self._search(first, k, silent, shared).passed(views, plan)
        rankings = []
        for config in configs:
            own = Timings(1)
            [ranking] = self._search(config, k, silent, own).ranked([0], views, plan, triggered)
            rankings.append(replace(ranking, timings=shared.of(0) | own.of(0)))
        return rankings

    def _groups(self, views: Sequence[QueryView], plans: Sequence[Plan]) -> Iterator[Sequence[int]]:
        """Queries that share a pass: those without candidates, as many as TOGETHER_BYTES hold the features of."""
        if any(plan.candidates is not None for plan in plans):
            size = 1
        else:
            held = plans[0].exemplars if plans[0].found_on is None else len(plans[0].found_on)
            size = max(1, TOGETHER_BYTES // (held * self.classifier.feature_dim * views[0].pixels.element_size()))
        for start in range(0, len(views), size):
            yield range(start, min(start + size, len(views)))

    @property
    def tensors(self) -> ExemplarTensors:
        """The exemplars on the scoring device."""
        return self._tensors

    def exemplars(self, config: TmmConfig, *, exact: bool) -> TriggeredExemplars:
        """The exemplars through the backbone of the pass, or in the classifier's own precision."""
        return TriggeredExemplars(self.store, self._tensors, self._exact if exact else self.backbone, config)

    def _search(self, config: TmmConfig, k: int, progress: Progress, timings: Timings) -> "_Search":
        rough, exact = (self.exemplars(config, exact=exact) for exact in (False, True))
        return _Search(config, k, rough, exact, self._heads, progress, timings)


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """What all queries of one search have in common, and the steps from the pass on.

    Attributes:
        config: The reading of TMM-NN.
        k: How many exemplars are wanted.
        rough: The exemplars through the backbone of the pass.
        exact: The same in the classifier's own precision.
        heads: Finds scorers.
        progress: Told of exemplars passed through the backbone.
        timings: Of the search.
    """

    config: TmmConfig
    k: int
    rough: TriggeredExemplars
    exact: TriggeredExemplars
    heads: HeadFinder
    progress: Progress
    timings: Timings

    def passed(self, views: Sequence[QueryView], plan: Plan) -> list[Float[Tensor, "n d"]]:
        """φ(x_i^t) of the rows that the head is found on; nothing is gathered that only a streamed pass looks at."""
        if plan.streamed and not self.config.draws:
            return [view.features[:0] for view in views]
        return self.rough.features([view.found for view in views], plan.found_on, self.progress)

    def ranked(
        self,
        positions: Sequence[int],
        views: Sequence[QueryView],
        plan: Plan,
        triggered: Sequence[Float[Tensor, "n d"]],
        *,
        copies: Sequence[Recognised | None] | None = None,
    ) -> list[Ranking]:
        """Head, scores, recognition, ranking, for queries that shared the pass.

        Args:
            positions: Of the queries in the search.
            views: The queries.
            plan: The exemplars that they are compared with.
            triggered: What `passed` found.
            copies: As `TmmNN.rank_many`, of these queries.
        """
        scorers, scores = self._scored(positions, views, plan, triggered)
        recognised: Sequence[Recognised | None] = [None] * len(views)
        if self.config.rank.recognition is not None and len(plan.scored) > 1:
            with self.timings.step("recognition", positions), torch.inference_mode():
                recognised = copies or [self._nearest(own, plan) for own in scores]
                moved = [self._moved(view, own) for view, own in zip(views, recognised, strict=True)]
            scorers, again = self._scored(positions, moved, plan, triggered)
            scores = [new._replace(confidences=own.confidences) for new, own in zip(again, scores, strict=True)]
        rankings = []
        for number, (position, view) in enumerate(zip(positions, views, strict=True)):
            copy_of = recognised[number]
            with self.timings.step("ranking", [position]), torch.inference_mode():
                rows, final = self._rescored(view, scorers[number], scores[number], copy_of, plan)
                answer = best(final, rows, self.exact.store.ids, k=self.k)
            rankings.append(Ranking(*answer, view, plan, copy_of, self.timings.of(position)))
        return rankings

    def _scored(
        self,
        positions: Sequence[int],
        views: Sequence[QueryView],
        plan: Plan,
        triggered: Sequence[Float[Tensor, "n d"]],
    ) -> tuple[list[Scorer], list[Scores]]:
        """Steps 2 and 3 of the paper."""
        scorers = []
        for position, view, features in zip(positions, views, triggered, strict=True):
            with self.timings.step("tuning", [position]), torch.inference_mode():
                scorers.append(self.heads.scorer(view, plan.found_on, features, self.config))
        with self.timings.step("scoring", positions), torch.inference_mode():
            if plan.streamed:
                return scorers, self.rough.scores([view.found for view in views], scorers, self.progress)
            kept = len(plan.scored)
            pairs = zip(scorers, triggered, strict=True)
            return scorers, [scorer.score(features[:kept], plan.candidates) for scorer, features in pairs]

    def _nearest(self, scores: Scores, plan: Plan) -> Recognised:
        """The exemplar that the query may be a copy of, by what is scored."""
        threshold = self.config.rank.recognition
        assert threshold is not None
        matches = scores.matches.cpu().numpy()
        first, second = best_first(matches, plan.scored, self.exact.store.ids, k=2)
        distances = chord(float(matches[first])), chord(float(matches[second]))
        return Recognised.nearest(int(plan.scored[first]), distances, threshold=threshold)

    def _moved(self, view: QueryView, recognised: Recognised | None) -> QueryView:
        """The query with its features moved to those of the exemplar that it may be a copy of."""
        if recognised is None:
            return view
        row = np.array([recognised.row])
        [triggered] = self.exact.features([view.found], row, silent)
        column = self.heads.clean_column(self.config.view)
        clean = self.exact.tensors.features(row, triggered.dtype, column=column)
        return view.moved(recognised, torch.cat([triggered, clean]))

    def _rescored(
        self, view: QueryView, scorer: Scorer, scores: Scores, recognised: Recognised | None, plan: Plan
    ) -> tuple[Int64[np.ndarray, "n"], Scores]:
        """All rows with their scores; after an inexact pass the best of them, scored again exactly."""
        if self.rough.backbone.exact or self.rough.stored:
            return plan.scored, scores
        ids, count = self.exact.store.ids, max(RESCORED, 2 * self.k)
        kept = best_first(scores.scores.cpu().numpy(), plan.scored, ids, k=count)
        rows = plan.scored[kept]
        [features] = self.exact.features([view.found], rows, silent)
        exact = scorer.score(features, rows)  # its confidences are of the recognised exemplar, if there is one
        return rows, exact if recognised is None else exact._replace(confidences=scores.confidences[kept])
