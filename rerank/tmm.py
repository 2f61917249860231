"""TMM-NN: trigger, tuned head, scores — the three steps in order.

Ghosh, Harikumar, Rana, arXiv 2511.06261, Algorithm 1. Step 1 is in `rerank.jobs`, the pass over the exemplars in
`rerank.triggered_exemplars`, step 2 in `rerank.fitting`, and what step 3 scores by in `rerank.score`.
"""

import copy
from collections.abc import Iterator, Sequence
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
from tmm_engine.rerank.exemplars import DEFAULT_CACHE_BYTES, ExemplarTensors
from tmm_engine.rerank.fitting import ScorerFitter
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.jobs import Job, make_jobs, timed
from tmm_engine.rerank.recognise import Recognised, chord
from tmm_engine.rerank.score import Scores
from tmm_engine.rerank.settings import TmmConfig, Trigger
from tmm_engine.rerank.triggered_exemplars import TriggeredExemplars

Rows = Int64[np.ndarray, "rows"]

RESCORED = 256  # of the best of an inexact pass, scored again exactly; or twice k, if that is more
TOGETHER_BYTES = 512 << 20  # triggered features of the queries that share a pass


@dataclass(frozen=True, slots=True)
class Ranking:
    """What TMM-NN says of one query.

    Attributes:
        rows: The best exemplars' rows, best first; ties in order of id.
        scores: Their scores; larger is better.
        confidences: Their P(dummy class), or the positive part of their decorrelated similarity, to the query itself
            even where it was recognised; in [0, 1].
        scored: How many exemplars were scored.
        tuned_on: How many exemplars the head was tuned on.
        label: y_q.
        trigger: (c, h, w), τ in pixel units.
        triggered_query: (c, h, w), x_q^t.
        trigger_loss: Eq. 8 at τ₀ and at τ; NaN for the global trigger, which is not the query's.
        trigger_steps: Evaluations of Eq. 8 for this query.
        recognised: The exemplar that the query may be a copy of, where the configuration asks.
        intensity: ω.
        timings: Seconds by step; a step done for several queries together counts as shared equally.
    """

    rows: Int64[np.ndarray, "k"]
    scores: Float[np.ndarray, "k"]
    confidences: Float[np.ndarray, "k"]
    scored: int
    tuned_on: int
    label: int
    trigger: Float[np.ndarray, "c h w"]
    triggered_query: Float[np.ndarray, "c h w"]
    trigger_loss: tuple[float, float]
    trigger_steps: int
    recognised: Recognised | None
    intensity: float
    timings: dict[str, float]


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
        self.store = store
        self.global_trigger = global_trigger
        self._exact = TorchBackbone(self.classifier)
        self.backbone = backbone or TorchBackbone(self.classifier, precision)
        self._tensors = ExemplarTensors(store, device=classifier.device, cache_bytes=cache_bytes)
        self._cache_bytes = cache_bytes
        self._fitter = ScorerFitter(self.classifier, store, self._tensors)

    def over(self, store: ExemplarStore) -> "TmmNN":
        """The same over other exemplars with features of the same classifier."""
        other = copy.copy(self)
        other.store = store
        other._tensors = ExemplarTensors(store, device=self.classifier.device, cache_bytes=self._cache_bytes)
        other._fitter = ScorerFitter(self.classifier, store, other._tensors)
        return other

    def rank(
        self,
        query: Float[Tensor, "c h w"],
        *,
        k: int,
        config: TmmConfig,
        candidates: Rows | None = None,
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
        candidates: Sequence[Int64[np.ndarray, "_"] | None] | None = None,
        labels: Sequence[int | None] | None = None,
        together: bool = False,
        progress: Progress = silent,
    ) -> list[Ranking]:
        """For each query the k exemplars with the largest scores; queries share the pass over the images in memory.

        Args:
            queries: Pixels in [0, 1], on the classifier's device and in its dtype; one may equal an exemplar, which
                then stays (§4.4).
            k: At least 1; fewer are returned where fewer are scored.
            config: The reading of TMM-NN.
            candidates: For each query the rows to score, None for all; the head is then tuned on them and on
                `candidate_companions` random others.
            labels: y_q for each query; None takes the model's prediction.
            together: Optimise the triggers jointly, several times as fast. Without it each query's answer is bit for
                bit what it is alone; with it triggers differ slightly, since the optimisation amplifies rounding.
            progress: Told of exemplars passed through the backbone.

        Raises:
            InputError: a label that is no class; ω makes every triggered image the same or leaves the trigger out (a
                constant query image); or a global trigger is asked for that the index does not have, or has for another
                blend.
        """
        count = len(queries)
        jobs = make_jobs(
            self.classifier,
            queries,
            config,
            candidates=candidates or [None] * count,
            labels=labels or [None] * count,
            shared=self.global_trigger,
            together=together,
        )
        rankings: list[Ranking] = []
        for group in self._groups(jobs, config):
            rankings += self._rank_triggered(group, self._triggered(group, config, progress), k, config, progress)
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
        if any(config.before_tuning != first.before_tuning for config in configs):
            raise InputError(
                "expected configurations that differ only after the pass: in tuning, score, fusion or recognition"
            )
        [job] = make_jobs(
            self.classifier,
            query[None],
            first,
            candidates=[None],
            labels=[label],
            shared=self.global_trigger,
            together=False,
        )
        triggered = self._triggered([job], first, silent)
        return [
            self._rank_triggered([replace(job, timings=dict(job.timings))], triggered, k, config, silent)[0]
            for config in configs
        ]

    def _groups(self, jobs: list[Job], config: TmmConfig) -> Iterator[list[Job]]:
        """Queries that share a pass: those without candidates, as many as TOGETHER_BYTES hold the features of."""
        if any(job.candidates is not None for job in jobs):
            size = 1
        else:
            tuned_on = min(len(self.store), config.max_tuning_exemplars)
            size = max(1, TOGETHER_BYTES // (tuned_on * self.classifier.feature_dim * jobs[0].query.element_size()))
        for start in range(0, len(jobs), size):
            yield jobs[start : start + size]

    def _rows(
        self, candidates: Int64[np.ndarray, "candidates"] | None, config: TmmConfig
    ) -> tuple[Int64[np.ndarray, "tuning"] | None, Int64[np.ndarray, "candidates"] | None]:
        """(rows that tune the head, rows that are scored); None is all.

        Scored candidates come first among the tuning rows.
        """
        generator = np.random.default_rng(config.seed)
        n = len(self.store)
        if candidates is None:
            if n <= config.max_tuning_exemplars:
                return None, None
            return np.sort(generator.choice(n, config.max_tuning_exemplars, replace=False)), None
        others = np.setdiff1d(np.arange(n), candidates)
        companions = generator.choice(others, min(config.candidate_companions, len(others)), replace=False)
        return np.concatenate([candidates, np.sort(companions)]), candidates

    def _triggered(self, group: list[Job], config: TmmConfig, progress: Progress) -> list[Float[Tensor, "n d"]]:
        """The pass: φ(x_i^t) of the rows that tune the head, for queries that share their exemplars."""
        tuning_rows, _ = self._rows(group[0].candidates, config)
        with timed(group, "pass"):
            return self._exemplars(self.backbone, config).features(group, tuning_rows, progress)

    def _rank_triggered(
        self, group: list[Job], triggered: list[Float[Tensor, "n d"]], k: int, config: TmmConfig, progress: Progress
    ) -> list[Ranking]:
        """Steps 2 and 3."""
        _, scored_rows = self._rows(group[0].candidates, config)
        rows = np.arange(len(self.store)) if scored_rows is None else scored_rows
        scores = self._scores(group, triggered, config, progress)
        if config.recognition is not None and len(rows) > 1:
            with timed(group, "recognition"), torch.inference_mode():
                for job, found in zip(group, scores, strict=True):
                    self._recognise(job, found, rows, config)
            seen = self._scores(group, triggered, config, progress)
            scores = [again._replace(confidences=own.confidences) for again, own in zip(seen, scores, strict=True)]
        with timed(group, "ranking"), torch.inference_mode():
            return [
                self._ranking(job, found, rows=rows, tuned_on=len(triggered[0]), k=k, config=config)
                for job, found in zip(group, scores, strict=True)
            ]

    def _scores(
        self, group: list[Job], triggered: list[Float[Tensor, "n d"]], config: TmmConfig, progress: Progress
    ) -> list[Scores]:
        """Step 2, and the scores of step 3."""
        tuning_rows, scored_rows = self._rows(group[0].candidates, config)
        for job, features in zip(group, triggered, strict=True):
            with timed([job], "tuning"), torch.inference_mode():
                self._fitter.fit(job, tuning_rows, features, config)
        with timed(group, "scoring"), torch.inference_mode():
            if scored_rows is None and tuning_rows is not None:  # tuned on a sample: a second pass scores all
                return self._exemplars(self.backbone, config).scores(group, progress)
            kept = len(self.store) if scored_rows is None else len(scored_rows)
            return [job.score(part[:kept], scored_rows) for job, part in zip(group, triggered, strict=True)]

    def _recognise(self, job: Job, scores: Scores, rows: Rows, config: TmmConfig) -> None:
        """Move the query's features to those of the exemplar that it may be a copy of."""
        assert config.recognition is not None
        assert job.features is not None
        matches = scores.matches.cpu().numpy()
        first, second = best_first(matches, rows, self.store.ids, k=2)
        row = rows[[first]]
        [triggered] = self._exemplars(self._exact, config).features([job], row, silent)
        clean = self._tensors.features(row, triggered.dtype, column=self._fitter.clean_column(config))
        distances = chord(float(matches[first])), chord(float(matches[second]))
        job.recognised = Recognised.nearest(int(row[0]), distances, threshold=config.recognition)
        job.features = job.recognised.moved(job.features, torch.cat([triggered, clean]))

    def _ranking(self, job: Job, scores: Scores, *, rows: Rows, tuned_on: int, k: int, config: TmmConfig) -> Ranking:
        scored, found = len(rows), job.found
        if not self.backbone.exact and config.trigger is not Trigger.GLOBAL:
            kept = best_first(scores.scores.cpu().numpy(), rows, self.store.ids, k=max(RESCORED, 2 * k))
            rows = rows[kept]
            [features] = self._exemplars(self._exact, config).features([job], rows, silent)
            exact = job.score(features, rows)  # its confidences are of the recognised exemplar, if there is one
            scores = exact if job.recognised is None else exact._replace(confidences=scores.confidences[kept])
        values, confidences = scores.scores.cpu().numpy(), scores.confidences.cpu().numpy()
        best = best_first(values, rows, self.store.ids, k=k)
        assert job.label is not None
        return Ranking(
            rows=rows[best],
            scores=values[best],
            confidences=confidences[best],
            scored=scored,
            tuned_on=tuned_on,
            label=job.label,
            trigger=found.trigger.cpu().numpy(),
            triggered_query=job.triggered_query(config).cpu().numpy(),
            trigger_loss=found.loss,
            trigger_steps=found.steps,
            recognised=job.recognised,
            intensity=found.intensity,
            timings=job.timings,
        )

    def _exemplars(self, backbone: Backbone, config: TmmConfig) -> TriggeredExemplars:
        return TriggeredExemplars(self.store, self._tensors, backbone, config)
