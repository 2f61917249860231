"""TMM-NN: trigger, tuned head, scores — the three steps in order (Ghosh, Harikumar, Rana, arXiv 2511.06261, Algorithm
1).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from index.classifier import Classifier
from index.errors import InputError
from index.progress import Progress, silent
from index.ranking import best_first
from index.store import ExemplarStore
from rerank.config import Score, TmmConfig
from rerank.scoring import DEFAULT_CACHE_BYTES, ExemplarTensors, TriggeredBackbone, dummy_scores
from rerank.trigger import intensity_of, make_trigger
from rerank.tuning import TuningSet, tune_head

Rows = Int64[np.ndarray, "rows"]


@dataclass(frozen=True, slots=True)
class Ranking:
    """What TMM-NN says of one query.

    Attributes:
        rows: The best exemplars' rows, best first; ties in order of id.
        scores: Their scores; larger is better.
        confidences: Their P(dummy class), in [0, 1].
        scored: How many exemplars were scored.
        tuned_on: How many exemplars the head was tuned on.
        label: y_q.
        trigger: (c, h, w), τ in pixel units.
        triggered_query: (c, h, w), x_q^t.
        trigger_loss: Eq. 8 at τ₀ and at τ.
        trigger_steps: Evaluations of Eq. 8.
        intensity: ω.
        timings: Seconds by step.
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


class TmmNN:
    """Ranks a store's exemplars by how much the classifier sees each as like a query.

    Args:
        classifier: f = head ∘ φ; never modified.
        store: The exemplars; their features are this classifier's.
        cache_bytes: What may stay on the classifier's device between queries, images first, then features.
    """

    def __init__(self, classifier: Classifier, store: ExemplarStore, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.classifier = classifier
        self.store = store
        self.tensors = ExemplarTensors(store, device=classifier.device, cache_bytes=cache_bytes)
        self.labels = torch.tensor(store.labels, device=classifier.device)

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
        """The k exemplars with the largest scores.

        Args:
            query: Pixels in [0, 1], on the classifier's device and in its dtype; may equal an exemplar, which then
                stays (§4.4).
            k: At least 1; fewer are returned where fewer are scored.
            config: The reading of TMM-NN.
            candidates: Score only these rows; the head is then tuned on them and on `candidate_companions` random
                others.
            label: y_q; None takes the model's prediction.
            progress: Told of exemplars passed through the backbone.

        Raises:
            InputError: ω makes every triggered image the same, or leaves the trigger out (a constant query image).
        """
        timings: dict[str, float] = {}
        intensity = intensity_of(query, config)
        _refuse_degenerate(intensity, config)
        with _timed(timings, "trigger"):
            found = make_trigger(self.classifier, query[None], config)
        backbone = TriggeredBackbone(self.classifier, found.trigger[0], intensity, config)
        tuning_rows, scored_rows = self._rows(candidates, config)
        with _timed(timings, "pass"):
            triggered = self._triggered(backbone, tuning_rows, progress)
        with _timed(timings, "tuning"), torch.inference_mode():
            data = self._tuning_set(query, backbone, tuning_rows, triggered, label)
            head = tune_head(self.classifier.head, data, config)
        with _timed(timings, "scoring"), torch.inference_mode():
            if (
                scored_rows is None and tuning_rows is not None
            ):  # the head was tuned on a sample: a second pass scores all
                scores, log_odds = self._scores_of_all(backbone, head, config, progress)
            else:
                features = triggered if scored_rows is None else triggered[: len(scored_rows)]
                scores, log_odds = _scores(head, features, config)
            rows = np.arange(len(self.store)) if scored_rows is None else scored_rows
            best = best_first(scores, rows, self.store.ids, k=k)
        return Ranking(
            rows=rows[best],
            scores=scores[best],
            confidences=_sigmoid(log_odds[best]),
            scored=len(rows),
            tuned_on=len(triggered),
            label=data.query_label,
            trigger=found.trigger[0].cpu().numpy(),
            triggered_query=backbone.apply(query).cpu().numpy(),
            trigger_loss=(float(found.initial_loss[0]), float(found.loss[0])),
            trigger_steps=int(found.steps[0]),
            intensity=intensity,
            timings=timings,
        )

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

    def _triggered(self, backbone: TriggeredBackbone, rows: Rows | None, progress: Progress) -> Float[Tensor, "n d"]:
        n = len(self.store) if rows is None else len(rows)
        classifier = self.classifier
        features = torch.empty((n, classifier.feature_dim), dtype=backbone.trigger.dtype, device=classifier.device)
        done = 0
        for chunk in self.tensors.image_chunks(rows):
            features[done : done + len(chunk)] = backbone(chunk)
            done += len(chunk)
            progress("triggering exemplars", done, n)
        return features

    def _tuning_set(
        self,
        query: Float[Tensor, "c h w"],
        backbone: TriggeredBackbone,
        rows: Rows | None,
        triggered: Float[Tensor, "n d"],
        label: int | None,
    ) -> TuningSet:
        classifier = self.classifier
        both = classifier.features(torch.stack([backbone.apply(query), query]))
        if label is None:
            label = int(classifier.logits(both[1:]).argmax())
        labels = self.labels if rows is None else self.labels[torch.from_numpy(rows).to(classifier.device)]
        return TuningSet(both[0], both[1], label, triggered, self.tensors.features(rows, triggered.dtype), labels)

    def _scores_of_all(
        self, backbone: TriggeredBackbone, head: nn.Linear, config: TmmConfig, progress: Progress
    ) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        done = 0
        for chunk in self.tensors.image_chunks(None):
            parts.append(_scores(head, backbone(chunk), config))
            done += len(chunk)
            progress("scoring exemplars", done, len(self.store))
        scores, log_odds = zip(*parts, strict=True)
        return np.concatenate(scores), np.concatenate(log_odds)


def _scores(
    head: nn.Linear, features: Float[Tensor, "n d"], config: TmmConfig
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """(scores to rank by, log-odds of the dummy class)."""
    log_odds = dummy_scores(head, features, Score.LOG_ODDS)
    scores = log_odds if config.score is Score.LOG_ODDS else dummy_scores(head, features, config.score)
    return scores.cpu().numpy(), log_odds.cpu().numpy()


def _sigmoid(log_odds: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    return np.asarray(torch.sigmoid(torch.from_numpy(log_odds)).numpy())


def _refuse_degenerate(intensity: float, config: TmmConfig) -> None:
    image_weight, trigger_weight = config.blend.weights(intensity)
    if min(image_weight, trigger_weight) < 1e-6:
        vanishes = "every triggered image the same" if image_weight < trigger_weight else "the trigger invisible"
        raise InputError(
            f"the query's intensity ω = {intensity:g} (the standard deviation of its pixels) makes {vanishes} "
            f"with the blend "
            f"{str(config.blend)!r}: is the image constant? Give another image, the blend 'added', or an "
            f"intensity between 0 and 1"
        )


@contextmanager
def _timed(timings: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[step] = time.perf_counter() - start
