"""What the benchmarks compare: ways to score every exemplar for a query, all with one face."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor
from torch.nn.functional import normalize

from tmm_engine.bench.methods import DescriptorOptions, Method
from tmm_engine.bench.triggers import global_trigger, optimisation
from tmm_engine.describing import chosen_descriptors
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.descriptors.columns import Describer
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.index.neighbours.search import exact_scores
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank.blending import apply_trigger
from tmm_engine.rerank.columns import GLOBAL_FEATURE, STRETCHED_FEATURE, GlobalColumn
from tmm_engine.rerank.discriminant import Discriminant
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.rank import Ranking
from tmm_engine.rerank.recognise import Recognised, comes_first, recognise_nearest
from tmm_engine.rerank.settings import (
    ClosedForm,
    GlobalRecipe,
    IndexTrigger,
    TmmConfig,
)
from tmm_engine.rerank.tmm import TmmNN

Image = Float32[np.ndarray, "c h w"]


@runtime_checkable
class Retriever(Protocol):
    """Scores all exemplars of a store for one query."""

    name: str

    def scores(self, query: Float32[np.ndarray, "c h w"], *, seed: int = 0) -> Float[np.ndarray, "n"]:
        """A score for every exemplar row; larger is better, no NaN. `query` is in pixels of [0, 1]."""

    def embedding(self, pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n e"]:
        """What it ranks by, differentiable: who moves this moves the ranks. `pixels` are in [0, 1], on any device."""


@runtime_checkable
class Recogniser(Protocol):
    """Says which exemplar a query may be a copy of."""

    def recognised(self, query: Float32[np.ndarray, "c h w"]) -> Recognised | None:
        """None where the method does not recognise copies, or has one exemplar only."""


class MetricRetriever:
    """L2 or cosine between features, in float64: the slow, plain version of the FAISS search."""

    def __init__(self, method: Method, classifier: Classifier, store: MemoryStore) -> None:
        assert method.metric is not None
        self.name = method.name
        self._metric, self._stretch, self._recognition = method.metric, method.stretch, method.recognition
        self._classifier = classifier
        column = STRETCHED_FEATURE if method.stretch else FEATURE
        self._features = store.features(np.arange(len(store)), column=column)

    def scores(self, query: Float32[np.ndarray, "c h w"], *, seed: int = 0) -> Float[np.ndarray, "n"]:
        """Minus the distance, or the similarity."""
        features = self._features_of(query)
        recognised = self._nearest(features)
        if recognised is not None:
            features = recognised.moved(features, torch.from_numpy(self._features[recognised.row]))
        return exact_scores(features.numpy(), self._features, self._metric)

    def recognised(self, query: Float32[np.ndarray, "c h w"]) -> Recognised | None:
        """The exemplar nearest to the query, where the method recognises copies."""
        return self._nearest(self._features_of(query))

    def _nearest(self, features: Float32[Tensor, "d"]) -> Recognised | None:
        if self._recognition is None:
            return None
        scores = exact_scores(features.numpy(), self._features, self._metric)
        nearest = [(row, float(scores[row])) for row in np.argsort(-scores, kind="stable")[:2].tolist()]
        return recognise_nearest(features, nearest, metric=self._metric, threshold=self._recognition)

    def embedding(self, pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """φ, of the stretched image where the method stretches; for cosine of unit length."""
        features = self._embedded(pixels)
        return normalize(features) if self._metric is Metric.COSINE else features

    def _features_of(self, query: Float32[np.ndarray, "c h w"]) -> Float32[Tensor, "d"]:
        with torch.inference_mode():
            return self._embedded(torch.from_numpy(query)[None])[0].cpu()

    def _embedded(self, pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        pixels = pixels.to(self._classifier.head.weight)
        return self._classifier.features(stretch_contrast(pixels) if self._stretch else pixels)


class DescriptorRetriever:
    """Mode robust: the slow, plain version of its search, in float64."""

    def __init__(self, method: Method, describer: Describer, store: MemoryStore) -> None:
        assert method.described is not None
        self.name, self._recognition, self._describer = method.name, method.recognition, describer
        self._alone = method.described.alone
        images = store.images(np.arange(len(store)))
        step = forward_batch_size(store.image_shape)
        parts = [images[start : start + step] for start in range(0, len(images), step)]
        known = describer.descriptors
        both = [[describer.of_stored(part, which) for which in (known.recogniser, known.robust)] for part in parts]
        self._copies, self._robust = (np.concatenate(column) for column in zip(*both, strict=True))
        if self._alone:
            self._robust = self._copies

    def scores(self, query: Float32[np.ndarray, "c h w"], *, seed: int = 0) -> Float[np.ndarray, "n"]:
        """Cosine similarity of descriptors, where the query is recognised with the exemplar's in its place.

        An exemplar that is put first has a score just above all others.
        """
        copy, robust = self._described(query)
        robust = copy if self._alone else robust
        recognised = self._nearest(copy)
        if recognised is not None:
            robust = recognised.moved(torch.from_numpy(robust), torch.from_numpy(self._robust[recognised.row])).numpy()
        scores = exact_scores(robust, self._robust, Metric.COSINE)
        if recognised is not None and not self._alone:
            rank = int((scores > scores[recognised.row]).sum())
            if comes_first(recognised, rank, len(scores)):
                scores[recognised.row] = np.nextafter(scores.max(), np.inf)
        return scores

    def recognised(self, query: Float32[np.ndarray, "c h w"]) -> Recognised | None:
        """The exemplar nearest to the query, where the method recognises copies."""
        return self._nearest(self._described(query)[0])

    def embedding(self, pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n e"]:
        """Both descriptors side by side: an attack on it aims at the gate as well. Of a layer alone the one."""
        describer, known = self._describer, self._describer.descriptors
        views = describer.views(pixels.to(describer.classifier.head.weight))
        head = describer.classifier.head
        copies = known.recogniser(views, head)
        return copies if self._alone else torch.cat([copies, known.robust(views, head)], dim=1)

    def _described(self, query: Image) -> list[Float32[np.ndarray, "_"]]:
        describer, known = self._describer, self._describer.descriptors
        with torch.inference_mode():
            views = describer.views(torch.from_numpy(query)[None].to(describer.classifier.device))
            return [describer.described(views, which)[0] for which in (known.recogniser, known.robust)]

    def _nearest(self, copy: Float32[np.ndarray, "c"]) -> Recognised | None:
        if self._recognition is None:
            return None
        scores = exact_scores(copy, self._copies, Metric.COSINE)
        nearest = [(row, float(scores[row])) for row in np.argsort(-scores, kind="stable")[:2].tolist()]
        return recognise_nearest(torch.from_numpy(copy), nearest, metric=Metric.COSINE, threshold=self._recognition)


class TmmRetriever:
    """TMM-NN over all exemplars."""

    def __init__(self, method: Method, tmm: TmmNN) -> None:
        assert method.config is not None
        self.name, self.config, self.tmm = method.name, method.config, tmm

    def scores(self, query: Float32[np.ndarray, "c h w"], *, seed: int = 0) -> Float[np.ndarray, "n"]:
        """The scores of the configuration; ``seed`` is added to its own."""
        config = self.config.with_seed(self.config.seed + seed)
        return _by_row(self.tmm.rank(self._pixels(query), k=len(self.tmm.store), config=config))

    def scores_beside(
        self, others: "Sequence[TmmRetriever]", query: Float32[np.ndarray, "c h w"]
    ) -> list[Float[np.ndarray, "n"]]:
        """Its own and those of others that share the trigger and the pass."""
        configs = [self.config, *(other.config for other in others)]
        rankings = self.tmm.rank_variants(self._pixels(query), k=len(self.tmm.store), configs=configs)
        return [_by_row(ranking) for ranking in rankings]

    def recognised(self, query: Float32[np.ndarray, "c h w"]) -> Recognised | None:
        """The exemplar nearest to the query, where the configuration recognises copies."""
        if self.config.rank.recognition is None:
            return None
        return self.tmm.rank(self._pixels(query), k=1, config=self.config).recognised

    def embedding(self, pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n e"]:
        """φ(x^t) of unit length, decorrelated first where the discriminant does so, and √fusion · φ(x) of unit length.

        Of the stretched image where the method stretches. With the discriminant, half the squared distance to an
        exemplar in it is what the exemplar's score lacks of the largest. A trigger of the query's own is not
        differentiated through: then it is φ(x), as it comes. Nor is recognition: the attack does not aim at its gate.
        """
        phi, shared = self.tmm.classifier.features, self.tmm.global_trigger
        pixels = pixels.to(self.tmm.classifier.head.weight)
        clean = stretch_contrast(pixels) if self.config.view.stretch else pixels
        if shared is None:
            return phi(clean)
        trigger = shared.trigger.to(clean)
        blended = apply_trigger(clean, trigger, intensity=shared.intensity, blend=shared.blend, clamp=shared.clamp)
        triggered = phi(blended)
        if isinstance(self.config.head, ClosedForm):
            triggered = self._discriminant.decorrelated(triggered)
        return torch.cat([normalize(triggered), math.sqrt(self.config.rank.fusion) * normalize(phi(clean))], dim=1)

    @cached_property
    def _discriminant(self) -> Discriminant:
        """Of all exemplars under the global trigger."""
        assert isinstance(self.config.head, ClosedForm)
        features = self.tmm.store.features(np.arange(len(self.tmm.store)), column=GLOBAL_FEATURE)
        device = self.tmm.classifier.device
        return Discriminant.fit([torch.from_numpy(features).to(device)], shrinkage=self.config.head.shrinkage)

    def _pixels(self, query: Image) -> torch.Tensor:
        return torch.from_numpy(query).to(self.tmm.classifier.device)


def make_retrievers(
    methods: Sequence[Method],
    classifier: Classifier,
    store: MemoryStore,
    *,
    triggers: Path | None = None,
    progress: Progress = silent,
) -> list[Retriever]:
    """A retriever for each method; those with the same global trigger share its features.

    Args:
        methods: With different names.
        classifier: f.
        store: Exemplars, their clean features, and those of them stretched.
        triggers: The folder that keeps global triggers (`bench.triggers`), if any does.
        progress: Told of the global triggers' optimisation.

    Raises:
        InputError: two methods of one name, or as `global_trigger`.
    """
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise InputError(f"expected different methods, got {', '.join(names)}")
    describers: dict[DescriptorOptions, Describer] = {}
    engines: dict[Any, TmmNN] = {}
    optimised: dict[Any, GlobalTrigger] = {}
    retrievers: list[Retriever] = []
    for method in methods:
        config = method.config
        if method.described is not None:
            options = replace(method.described, alone=False)
            if options not in describers:
                describers[options] = _describer(options, classifier, store, progress)
            retrievers.append(DescriptorRetriever(method, describers[options], store))
            continue
        if config is None:
            retrievers.append(MetricRetriever(method, classifier, store))
            continue
        kind: Any = None
        if isinstance(config.trigger, IndexTrigger):
            recipe = method.recipe or GlobalRecipe.of(config)
            how = optimisation(recipe)
            if how not in optimised:
                optimised[how] = global_trigger(store, classifier, recipe, folder=triggers, progress=progress)
            kind = (how, config.blending, config.view)
        if kind not in engines:
            engines[kind] = (
                TmmNN(classifier, store)
                if kind is None
                else _with_global(classifier, store, config, optimised[kind[0]])
            )
        retrievers.append(TmmRetriever(method, engines[kind]))
    return retrievers


def _describer(options: DescriptorOptions, classifier: Classifier, store: MemoryStore, progress: Progress) -> Describer:
    """As an index of these exemplars would have it."""
    source = ArraySource(store.images(np.arange(len(store))), store.labels)
    chosen = chosen_descriptors(source, classifier, options.views, options.recogniser, progress)
    return Describer(chosen, classifier)


def scores_of_all(retrievers: Sequence[Retriever], query: Image) -> Iterator[tuple[Retriever, Float[np.ndarray, "n"]]]:
    """Every retriever's scores; those of TMM-NN that share trigger and pass are computed together."""

    def shared(retriever: Retriever) -> Any:
        return (
            (id(retriever.tmm), retriever.config.triggering) if isinstance(retriever, TmmRetriever) else retriever.name
        )

    order = list(dict.fromkeys(shared(retriever) for retriever in retrievers))
    for _, members in groupby(sorted(retrievers, key=lambda one: order.index(shared(one))), key=shared):
        first, *others = members
        if isinstance(first, TmmRetriever):
            group = [first, *(other for other in others if isinstance(other, TmmRetriever))]
            yield from zip(group, first.scores_beside(group[1:], query), strict=True)
        else:
            yield first, first.scores(query)


def top(
    scores: Float[np.ndarray, "n"], ids: Shaped[np.ndarray, "n"], k: int, *, without: int | None = None
) -> Int64[np.ndarray, "k"]:
    """The rows of the k largest scores, best first, ties by id; `without` one row, such as the query's own."""
    rows = np.arange(len(scores))
    if without is not None:
        rows = np.delete(rows, without)
    return rows[best_first(scores[rows], rows, ids, k=k)]


def rank_of(scores: Float[np.ndarray, "n"], ids: Shaped[np.ndarray, "n"], row: int) -> int:
    """How many exemplars come before this one; 0 is first."""
    tied = scores == scores[row]
    return int((scores > scores[row]).sum() + (ids[tied] < ids[row]).sum())


def _with_global(classifier: Classifier, store: MemoryStore, config: TmmConfig, optimised: GlobalTrigger) -> TmmNN:
    """TMM-NN with the features that the configuration's blend gives under an optimised trigger."""
    rows = np.arange(len(store))
    images = store.images(rows)
    blending = config.blending
    intensity = optimised.intensity if blending.intensity is None else blending.intensity
    shared = replace(
        optimised, blend=blending.formula, clamp=blending.clamp, stretch=config.view.stretch, intensity=intensity
    )
    step = forward_batch_size(store.image_shape)
    column = GlobalColumn(shared, classifier)
    parts = [column.compute(images[start : start + step]) for start in range(0, len(images), step)]
    triggered = MemoryStore(
        images,
        {
            FEATURE: store.features(rows),
            GLOBAL_FEATURE: np.concatenate(parts),
            STRETCHED_FEATURE: store.features(rows, column=STRETCHED_FEATURE),
        },
        store.labels,
        ids=[str(id_) for id_ in store.ids],
    )
    return TmmNN(classifier, triggered, global_trigger=shared)


def _by_row(ranking: Ranking) -> Float[np.ndarray, "n"]:
    scores = np.empty(len(ranking.rows), dtype=ranking.scores.dtype)
    scores[ranking.rows] = ranking.scores
    return scores
