"""TMM-NN: trigger, tuned head, scores — the three steps in order.

Ghosh, Harikumar, Rana, arXiv 2511.06261, Algorithm 1.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from index.classifier import Classifier
from index.errors import ImageError, InputError
from index.progress import Progress, silent
from index.ranking import best_first
from index.store import FEATURE, GLOBAL_FEATURE, STRETCHED_FEATURE, ExemplarStore
from rerank.backbone import Backbone, Precision, TorchBackbone, specialised
from rerank.config import TmmConfig, Trigger, Tuning
from rerank.contrast import stretch_contrast, stretch_images
from rerank.discriminant import Discriminant
from rerank.global_trigger import GlobalTrigger
from rerank.scorers import DiscriminantScorer, FusedScorer, HeadScorer, Scorer, Scores
from rerank.scoring import DEFAULT_CACHE_BYTES, ExemplarTensors
from rerank.trigger import apply_trigger, intensity_of, make_trigger
from rerank.tuning import Fisher, TuningSet, fisher_diagonal, tune_head

Rows = Int64[np.ndarray, "rows"]

RESCORED = 256  # of the best of an inexact pass, scored again exactly; or twice k, if that is more
TRIGGERS_TOGETHER = 32  # queries whose triggers are optimised jointly
TOGETHER_BYTES = 512 << 20  # triggered features of the queries that share a pass


@dataclass(frozen=True, slots=True)
class Ranking:
    """What TMM-NN says of one query.

    Attributes:
        rows: The best exemplars' rows, best first; ties in order of id.
        scores: Their scores; larger is better.
        confidences: Their P(dummy class), or the positive part of their decorrelated similarity; in [0, 1].
        scored: How many exemplars were scored.
        tuned_on: How many exemplars the head was tuned on.
        label: y_q.
        trigger: (c, h, w), τ in pixel units.
        triggered_query: (c, h, w), x_q^t.
        trigger_loss: Eq. 8 at τ₀ and at τ; NaN for the global trigger, which is not the query's.
        trigger_steps: Evaluations of Eq. 8 for this query.
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
    intensity: float
    timings: dict[str, float]


@dataclass(slots=True)
class _Job:
    """One query on its way through the three steps."""

    query: Float[Tensor, "c h w"]
    candidates: Rows | None
    intensity: float
    trigger: Float[Tensor, "c h w"]
    trigger_loss: tuple[float, float]
    trigger_steps: int
    label: int | None
    scorer: Scorer | None = None  # what step 2 finds
    timings: dict[str, float] = field(default_factory=dict)


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
        self._labels = torch.tensor(store.labels, device=classifier.device)  # a copy: a store's may be read-only
        self._fishers_of_all: dict[str, Fisher] = {}
        self._global_discriminants: dict[float, tuple[Discriminant, Tensor]] = {}

    def over(self, store: ExemplarStore) -> "TmmNN":
        """The same over other exemplars with features of the same classifier."""
        other = copy.copy(self)
        other.store = store
        other._tensors = ExemplarTensors(store, device=self.classifier.device, cache_bytes=self._cache_bytes)
        other._labels = torch.tensor(store.labels, device=self.classifier.device)
        other._fishers_of_all = {}
        other._global_discriminants = {}
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
        jobs = self._jobs(queries, candidates or [None] * count, labels or [None] * count, config, together=together)
        rankings: list[Ranking] = []
        for group in self._groups(jobs, config):
            rankings += self._rank_group(group, k=k, config=config, progress=progress)
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
            raise InputError("expected configurations that differ only after the pass: in tuning, score or fusion")
        [job] = self._jobs(query[None], [None], [label], first, together=False)
        tuning_rows, _ = self._rows(None, first)
        with _timed([job], "pass"):
            triggered = self._triggered([job], tuning_rows, first, silent)
        return [
            self._rank_triggered([replace(job, timings=dict(job.timings))], triggered, k, config, silent)[0]
            for config in configs
        ]

    def _jobs(
        self,
        queries: Float[Tensor, "q c h w"],
        candidates: Sequence[Int64[np.ndarray, "_"] | None],
        labels: Sequence[int | None],
        config: TmmConfig,
        *,
        together: bool,
    ) -> list[_Job]:
        """Step 1 for all queries."""
        classes = self.classifier.num_classes
        for label in labels:
            if label is not None and not 0 <= label < classes:
                raise InputError(f"label: expected 0 to {classes - 1}, got {label}")
        start = time.perf_counter()
        if config.stretch:
            queries = stretch_contrast(queries)
        if config.trigger is Trigger.GLOBAL:
            shared = self._global_trigger(config)
            triggers = shared.trigger.to(queries).expand(queries.shape)
            intensities = [shared.intensity] * len(queries)
            losses, steps = [(float("nan"), float("nan"))] * len(queries), [0] * len(queries)
        else:
            intensities = [intensity_of(query, config) for query in queries]
            for intensity in intensities:
                _refuse_degenerate(intensity, config)
            parts = queries.split(TRIGGERS_TOGETHER if together else 1)
            found = [make_trigger(self.classifier, part, config) for part in parts]
            triggers = torch.cat([part.trigger for part in found])
            steps = torch.cat([part.steps for part in found]).tolist()
            losses = [
                (float(first), float(last))
                for part in found
                for first, last in zip(part.initial_loss, part.loss, strict=True)
            ]
        jobs = [
            _Job(*parts)
            for parts in zip(queries, candidates, intensities, triggers, losses, steps, labels, strict=True)
        ]
        _share(jobs, "trigger", time.perf_counter() - start)
        return jobs

    def _rank_group(self, group: list[_Job], *, k: int, config: TmmConfig, progress: Progress) -> list[Ranking]:
        """The pass, and steps 2 and 3, for queries that share their exemplars."""
        tuning_rows, _ = self._rows(group[0].candidates, config)
        with _timed(group, "pass"):
            triggered = self._triggered(group, tuning_rows, config, progress)
        return self._rank_triggered(group, triggered, k, config, progress)

    def _rank_triggered(
        self,
        group: list[_Job],
        triggered: list[Float[Tensor, "n d"]],
        k: int,
        config: TmmConfig,
        progress: Progress,
    ) -> list[Ranking]:
        """Steps 2 and 3."""
        tuning_rows, scored_rows = self._rows(group[0].candidates, config)
        for job, features in zip(group, triggered, strict=True):
            with _timed([job], "tuning"), torch.inference_mode():
                self._tune(job, tuning_rows, features, config)
        with _timed(group, "scoring"), torch.inference_mode():
            if scored_rows is None and tuning_rows is not None:  # tuned on a sample: a second pass scores all
                scores = self._scores_of_all(group, config, progress)
            else:
                kept = len(self.store) if scored_rows is None else len(scored_rows)
                scores = [_scores(job, part[:kept], scored_rows) for job, part in zip(group, triggered, strict=True)]
            rows = np.arange(len(self.store)) if scored_rows is None else scored_rows
            return [
                self._ranking(job, both, rows=rows, tuned_on=len(triggered[0]), k=k, config=config)
                for job, both in zip(group, scores, strict=True)
            ]

    def _groups(self, jobs: list[_Job], config: TmmConfig) -> Iterator[list[_Job]]:
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

    def _triggered(
        self, group: list[_Job], rows: Rows | None, config: TmmConfig, progress: Progress
    ) -> list[Float[Tensor, "n d"]]:
        """φ(x_i^t) of the rows, for each query of the group."""
        dtype, n = group[0].query.dtype, len(self.store) if rows is None else len(rows)
        if config.trigger is Trigger.GLOBAL:
            return [self._tensors.features(rows, dtype, column=GLOBAL_FEATURE)] * len(group)
        features = [
            torch.empty((n, self.classifier.feature_dim), dtype=dtype, device=self.classifier.device) for _ in group
        ]
        done = 0
        for chunk in self._tensors.image_chunks(rows):
            for job, target in zip(group, features, strict=True):
                target[done : done + len(chunk)] = self._pass(self.backbone, job, chunk, config)
            done += len(chunk)
            progress("triggering exemplars", done, n)
        return features

    def _scores_of_all(self, group: list[_Job], config: TmmConfig, progress: Progress) -> list[Scores]:
        parts: list[list[Scores]] = [[] for _ in group]
        done, n = 0, len(self.store)
        if config.trigger is Trigger.GLOBAL:
            chunks = self._tensors.feature_chunks(group[0].query.dtype, column=GLOBAL_FEATURE)
        else:
            chunks = self._tensors.image_chunks(None)
        for chunk in chunks:
            rows = np.arange(done, done + len(chunk))
            for job, scores in zip(group, parts, strict=True):
                triggered = chunk if config.trigger is Trigger.GLOBAL else self._pass(self.backbone, job, chunk, config)
                scores.append(_scores(job, triggered, rows))
            done += len(chunk)
            if config.trigger is not Trigger.GLOBAL:
                progress("scoring exemplars", done, n)
        return [Scores(*map(torch.cat, zip(*scores, strict=True))) for scores in parts]

    def _pass(
        self, backbone: Backbone, job: _Job, images: UInt8[Tensor, "n c h w"], config: TmmConfig
    ) -> Float[Tensor, "n d"]:
        """φ(x^t); in smaller chunks where the device has no room for a whole one."""
        image_weight, trigger_weight = config.blend.weights(job.intensity)
        if config.stretch:
            images = stretch_images(images)
        try:
            return backbone(
                images, job.trigger, image_weight=image_weight, trigger_weight=trigger_weight, clamp=config.clamp
            )
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                raise InputError(
                    f"{self.classifier.device} has no memory for one image of {tuple(images.shape[1:])}: free some, "
                    f"cache less (--cache-images), or use --device cpu"
                ) from error
        halves = images.split((len(images) + 1) // 2)
        return torch.cat([self._pass(backbone, job, half, config) for half in halves])

    def _tune(self, job: _Job, rows: Rows | None, triggered: Float[Tensor, "n d"], config: TmmConfig) -> None:
        """Step 2: sets the job's scorer, and its label where none was given."""
        both = self.classifier.features(torch.stack([_triggered_query(job, config), job.query]))
        if job.label is None:
            job.label = int(self.classifier.logits(both[1:]).argmax())
        if config.tuning is Tuning.DISCRIMINANT:
            job.scorer = self._discriminant_scorer(both[0], triggered, config)
        else:
            job.scorer = HeadScorer(self._tuned_head(job.label, both, rows, triggered, config), config.score)
        if config.fusion > 0:
            clean = partial(self._tensors.features, dtype=triggered.dtype, column=self._clean_column(config))
            job.scorer = FusedScorer(job.scorer, config.fusion, both[1], clean)

    def _tuned_head(
        self,
        label: int,
        query: Float[Tensor, "2 d"],
        rows: Int64[np.ndarray, "n"] | None,
        triggered: Float[Tensor, "n d"],
        config: TmmConfig,
    ) -> nn.Linear:
        labels = self._labels if rows is None else self._labels[torch.from_numpy(rows).to(self.classifier.device)]
        column = self._clean_column(config)
        clean = self._tensors.features(rows, triggered.dtype, column=column)
        if rows is None and column not in self._fishers_of_all:
            self._fishers_of_all[column] = fisher_diagonal(self.classifier.head, clean)
        data = TuningSet(query[0], query[1], label, triggered, clean, labels)
        return tune_head(
            self.classifier.head, data, config, fisher=self._fishers_of_all[column] if rows is None else None
        )

    def _clean_column(self, config: TmmConfig) -> str:
        """Of φ(x_i), or of φ of x_i with its contrast stretched."""
        if config.stretch and STRETCHED_FEATURE not in self.store.feature_columns:
            raise InputError(
                "the index has no features of images with their contrast stretched: build it with --global-trigger, "
                "or search with --no-stretch"
            )
        return STRETCHED_FEATURE if config.stretch else FEATURE

    def _discriminant_scorer(
        self, query: Float[Tensor, "d"], triggered: Float[Tensor, "n d"], config: TmmConfig
    ) -> DiscriminantScorer:
        """Under the global trigger, of all exemplars and fitted once, whatever the candidates."""
        if config.trigger is not Trigger.GLOBAL:
            return DiscriminantScorer(Discriminant.fit([triggered], shrinkage=config.shrinkage), query)
        if config.shrinkage not in self._global_discriminants:
            features = partial(self._tensors.feature_chunks, triggered.dtype, column=GLOBAL_FEATURE)
            fitted = Discriminant.fit(features(), shrinkage=config.shrinkage)
            lengths = torch.cat([fitted.lengths(chunk) for chunk in features()])
            self._global_discriminants[config.shrinkage] = fitted, lengths
        fitted, lengths = self._global_discriminants[config.shrinkage]
        return DiscriminantScorer(fitted, query, lengths)

    def _ranking(self, job: _Job, scores: Scores, *, rows: Rows, tuned_on: int, k: int, config: TmmConfig) -> Ranking:
        scored = len(rows)
        if not self.backbone.exact and config.trigger is not Trigger.GLOBAL:
            rows = rows[best_first(scores.scores.cpu().numpy(), rows, self.store.ids, k=max(RESCORED, 2 * k))]
            chunks = [self._pass(self._exact, job, chunk, config) for chunk in self._tensors.image_chunks(rows)]
            scores = _scores(job, torch.cat(chunks), rows)
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
            trigger=job.trigger.cpu().numpy(),
            triggered_query=_triggered_query(job, config).cpu().numpy(),
            trigger_loss=job.trigger_loss,
            trigger_steps=job.trigger_steps,
            intensity=job.intensity,
            timings=job.timings,
        )

    def _global_trigger(self, config: TmmConfig) -> GlobalTrigger:
        shared = self.require_global_trigger()
        shared.check(config)
        return shared

    def require_global_trigger(self) -> GlobalTrigger:
        """The index's.

        Raises:
            InputError: it has none.
        """
        if self.global_trigger is None:
            raise InputError(
                "the index has no global trigger, which this configuration needs: build it with --global-trigger, or "
                "search with the query's own (--preset paper, or trigger=query)"
            )
        return self.global_trigger


def _scores(job: _Job, triggered: Float[Tensor, "n d"], rows: Int64[np.ndarray, "n"] | None) -> Scores:
    assert job.scorer is not None
    return job.scorer.score(triggered, rows)


def _triggered_query(job: _Job, config: TmmConfig) -> Float[Tensor, "c h w"]:
    return apply_trigger(job.query, job.trigger, intensity=job.intensity, blend=config.blend, clamp=config.clamp)


def _refuse_degenerate(intensity: float, config: TmmConfig) -> None:
    image_weight, trigger_weight = config.blend.weights(intensity)
    if min(image_weight, trigger_weight) < 1e-6:
        vanishes = "every triggered image the same" if image_weight < trigger_weight else "the trigger invisible"
        raise ImageError(
            f"the query's intensity ω = {intensity:g} (the standard deviation of its pixels, unless it was set) makes "
            f"{vanishes} with the blend {str(config.blend)!r}: is the image constant? Give another image, the blend "
            f"'added', or an intensity between 0 and 1"
        )


@contextmanager
def _timed(jobs: Sequence[_Job], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    _share(jobs, step, time.perf_counter() - start)


def _share(jobs: Sequence[_Job], step: str, seconds: float) -> None:
    for job in jobs:
        job.timings[step] = seconds / len(jobs)
