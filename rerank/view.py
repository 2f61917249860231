"""A query as TMM-NN looks at it: stretched, with its trigger, and what the network makes of it; all of it once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.recognise import Recognised
from tmm_engine.rerank.settings import TmmConfig
from tmm_engine.rerank.timing import Timings
from tmm_engine.rerank.trigger import FoundTrigger, find_triggers


@dataclass(frozen=True, slots=True, eq=False)
class QueryView:
    """One query, ready to be compared with exemplars.

    Attributes:
        pixels: (c, h, w), x_q; stretched where the configuration says so.
        found: Its trigger τ and intensity ω.
        triggered: (c, h, w), x_q^t.
        features: (2, d), φ(x_q^t) and φ(x_q).
        predicted: The model's prediction on x_q.
        label: y_q.
    """

    pixels: Float[Tensor, "c h w"]
    found: FoundTrigger
    triggered: Float[Tensor, "c h w"]
    features: Float[Tensor, "2 d"]
    predicted: int
    label: int

    def moved(self, recognised: Recognised, exemplar: Float[Tensor, "2 d"]) -> "QueryView":
        """The same with its features moved to those of the exemplar that it may be a copy of."""
        return replace(self, features=recognised.moved(self.features, exemplar))


def view_queries(
    classifier: Classifier,
    queries: Float[Tensor, "q c h w"],
    config: TmmConfig,
    *,
    labels: Sequence[int | None],
    shared: GlobalTrigger | None,
    together: bool,
    timings: Timings,
    progress: Progress = silent,
) -> list[QueryView]:
    """Stretch the queries, find their triggers, embed each with and without.

    Args:
        classifier: f, best `specialised`.
        queries: Pixels in [0, 1], on the classifier's device and in its dtype.
        config: The reading of TMM-NN.
        labels: y_q for each query; None takes the model's prediction.
        shared: The index's global trigger, if it has one.
        together: Optimise the queries' own triggers jointly.
        timings: Of the search.
        progress: Told of steps of optimisation.

    Raises:
        InputError: a label that is no class; or as `find_triggers`.
    """
    for label in labels:
        if label is not None and not 0 <= label < classifier.num_classes:
            raise InputError(f"label: expected 0 to {classifier.num_classes - 1}, got {label}")
    with timings.step("trigger"):
        pixels = stretch_contrast(queries) if config.view.stretch else queries
        found = find_triggers(classifier, pixels, config, shared=shared, together=together, progress=progress)
    views = []
    for position, (own, trigger, label) in enumerate(zip(pixels, found, labels, strict=True)):
        with timings.step("embedding", [position]), torch.inference_mode():
            triggered = trigger.applied(own)
            features = classifier.features(torch.stack([triggered, own]))
            predicted = int(classifier.logits(features[1:]).argmax())
        views.append(QueryView(own, trigger, triggered, features, predicted, predicted if label is None else label))
    return views
