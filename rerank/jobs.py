"""A query on its way through the three steps of TMM-NN; what step 1 finds for it: trigger, intensity, loss."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.rerank.contrast import stretch_contrast
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.recognise import Recognised
from tmm_engine.rerank.score import Scorer, Scores
from tmm_engine.rerank.settings import TmmConfig, Trigger
from tmm_engine.rerank.trigger import apply_trigger, intensity_of, make_trigger

TRIGGERS_TOGETHER = 32  # queries whose triggers are optimised jointly


@dataclass(frozen=True, slots=True, eq=False)
class QueryTrigger:
    """What step 1 finds for a query.

    Attributes:
        intensity: ω.
        trigger: (c, h, w), τ in pixel units.
        loss: Eq. 8 at τ₀ and at τ; NaN for the global trigger, which is not the query's.
        steps: Evaluations of Eq. 8 for this query.
    """

    intensity: float
    trigger: Float[Tensor, "c h w"]
    loss: tuple[float, float]
    steps: int


@dataclass(slots=True)
class Job:
    """One query on its way through the three steps.

    Attributes:
        query: (c, h, w), x_q; stretched where the configuration says so.
        candidates: The rows to score; None is all.
        found: By step 1.
        label: y_q; step 2 sets it where none was given.
        features: (2, d), φ(x_q^t) and φ(x_q), from step 2 on; recognition moves them.
        scorer: What step 2 finds.
        recognised: The exemplar that the query may be a copy of, where the configuration asks.
        timings: Seconds by step.
    """

    query: Float[Tensor, "c h w"]
    candidates: Int64[np.ndarray, "candidates"] | None
    found: QueryTrigger
    label: int | None
    features: Float[Tensor, "2 d"] | None = None
    scorer: Scorer | None = None
    recognised: Recognised | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def triggered_query(self, config: TmmConfig) -> Float[Tensor, "c h w"]:
        """x_q^t."""
        found = self.found
        return apply_trigger(
            self.query, found.trigger, intensity=found.intensity, blend=config.blend, clamp=config.clamp
        )

    def score(self, triggered: Float[Tensor, "n d"], rows: Int64[np.ndarray, "n"] | None) -> Scores:
        """Of φ(x_i^t) of the exemplars at `rows` of the store (None: all, in order), after step 2."""
        assert self.scorer is not None
        return self.scorer.score(triggered, rows)


def make_jobs(
    classifier: Classifier,
    queries: Float[Tensor, "q c h w"],
    config: TmmConfig,
    *,
    candidates: Sequence[Int64[np.ndarray, "_"] | None],
    labels: Sequence[int | None],
    shared: GlobalTrigger | None,
    together: bool,
) -> list[Job]:
    """Step 1 for all queries.

    Args:
        classifier: f.
        queries: Pixels in [0, 1], on the classifier's device and in its dtype.
        config: The reading of TMM-NN.
        candidates: For each query the rows to score, None for all.
        labels: y_q for each query, None where step 2 finds it.
        shared: The index's global trigger, if it has one.
        together: Optimise the queries' own triggers jointly.

    Raises:
        InputError: a label that is no class; or a global trigger is asked for that the index does not have, or has for
            another configuration.
        ImageError: ω makes every triggered image the same or leaves the trigger out (a constant query image).
    """
    for label in labels:
        if label is not None and not 0 <= label < classifier.num_classes:
            raise InputError(f"label: expected 0 to {classifier.num_classes - 1}, got {label}")
    start = time.perf_counter()
    if config.stretch:
        queries = stretch_contrast(queries)
    if config.trigger is Trigger.GLOBAL:
        found = [_shared_trigger(shared, queries, config)] * len(queries)
    else:
        found = _own_triggers(classifier, queries, config, together=together)
    jobs = [Job(*parts) for parts in zip(queries, candidates, found, labels, strict=True)]
    _share(jobs, "trigger", time.perf_counter() - start)
    return jobs


def _shared_trigger(shared: GlobalTrigger | None, queries: Float[Tensor, "q c h w"], config: TmmConfig) -> QueryTrigger:
    if shared is None:
        raise InputError(
            "the index has no global trigger, which this configuration needs: build it with --global-trigger, or "
            "search with the query's own (--preset paper, or trigger=query)"
        )
    shared.check(config)
    return QueryTrigger(shared.intensity, shared.trigger.to(queries), (float("nan"), float("nan")), 0)


def _own_triggers(
    classifier: Classifier, queries: Float[Tensor, "q c h w"], config: TmmConfig, *, together: bool
) -> list[QueryTrigger]:
    intensities = [intensity_of(query, config) for query in queries]
    for intensity in intensities:
        _refuse_degenerate(intensity, config)
    parts = [make_trigger(classifier, part, config) for part in queries.split(TRIGGERS_TOGETHER if together else 1)]
    triggers, steps = torch.cat([part.trigger for part in parts]), torch.cat([part.steps for part in parts]).tolist()
    losses = [
        (float(first), float(last)) for part in parts for first, last in zip(part.initial_loss, part.loss, strict=True)
    ]
    return [QueryTrigger(*found) for found in zip(intensities, triggers, losses, steps, strict=True)]


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
def timed(jobs: Sequence[Job], step: str) -> Iterator[None]:
    """Time a step, shared equally by the queries it serves."""
    start = time.perf_counter()
    yield
    _share(jobs, step, time.perf_counter() - start)


def _share(jobs: Sequence[Job], step: str, seconds: float) -> None:
    for job in jobs:
        job.timings[step] = job.timings.get(step, 0.0) + seconds / len(jobs)
