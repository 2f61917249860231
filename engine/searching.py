"""A search: from queries and options to answers, by descriptors, by TMM-NN or by plain neighbours."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8

from tmm_engine.explaining import Asked, Explainer
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.descriptors.columns import COPY_FEATURE, ROBUST_FEATURE, Describer
from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.names import spelled
from tmm_engine.index.neighbours.factories import SearchPrecision
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.progress import Progress
from tmm_engine.index.sources.records import Metadata
from tmm_engine.index.store.embedding import predict
from tmm_engine.index.store.exemplars import ExemplarStore, Subset
from tmm_engine.nearest import Compared, Gate, NearestSearch
from tmm_engine.options import Mode, Prefilter, SearchOptions
from tmm_engine.query import Query
from tmm_engine.rerank.columns import STRETCHED_FEATURE
from tmm_engine.rerank.rank import Ranking
from tmm_engine.rerank.recognise import Recognised
from tmm_engine.rerank.settings import TunedHead
from tmm_engine.rerank.timing import Timings
from tmm_engine.rerank.tmm import Choose, TmmNN
from tmm_engine.rerank.view import QueryView
from tmm_engine.results import Explanation, Hit, SearchResult
from tmm_engine.scanning import ByRanking, ByVector, RankedBy

FEW_EXEMPLARS = 300
"""Among fewer, mode robust takes more than one stranger in fifty for a copy, on the mean of four data sets
(docs/ROBUST.md)."""


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What was found for a query, in any mode.

    Attributes:
        rows: The best exemplars', best first.
        scores: Larger is better.
        predicted: The model's prediction on the query.
        scored: How many exemplars were scored.
        recognised: The exemplar that the query may be a copy of, where that was asked.
        features: φ(x_q), of the stretched image where the search stretches.
        ranked_by: What all exemplars were ranked by.
        ranking: Of TMM-NN, if it was that.
        agreement: Of search in less than fp32 with what is scored again.
        put_first: Whether the first row is so by the recogniser, and has not the largest score.
    """

    rows: Int64[np.ndarray, "k"]
    scores: Float[np.ndarray, "k"]
    predicted: int
    scored: int
    recognised: Recognised | None
    features: Float32[np.ndarray, "d"]
    ranked_by: RankedBy
    ranking: Ranking | None = None
    agreement: float = 1.0
    put_first: bool = False

    @property
    def original(self) -> int | None:
        """The exemplar that the query is taken for, if it is."""
        recognised = self.recognised
        return None if recognised is None or recognised.share < 0.5 else recognised.row

    @property
    def visible(self) -> Int64[np.ndarray, "rows"]:
        """The rows whose images an answer looks at: its hits, and the exemplar that was recognised."""
        return self.rows if self.original is None else np.append(self.rows, self.original)


@dataclass(frozen=True, slots=True, eq=False)
class _Shown:
    """What is shown of the exemplars in the answers to a list, read at once.

    Attributes:
        places: Of the rows' images.
        images: Of all of them.
        metadata: By row.
    """

    places: dict[int, int]
    images: UInt8[np.ndarray, "n c h w"]
    metadata: dict[int, Metadata]

    @classmethod
    def of(cls, store: ExemplarStore, answers: list[Int64[np.ndarray, "_"]]) -> "_Shown":
        """Of all rows in some answers."""
        rows = np.unique(np.concatenate([np.empty(0, np.int64), *answers]))
        own = rows.tolist()
        return cls(
            {row: place for place, row in enumerate(own)},
            store.images(rows),
            dict(zip(own, store.metadata(rows), strict=True)),
        )

    def image(self, row: int) -> UInt8[np.ndarray, "c h w"]:
        """Of one exemplar."""
        return self.images[self.places[row]]


class Searcher:
    """Answers searches over one store's exemplars: descriptors, L2 and cosine, or TMM-NN.

    Args:
        classifier: Embeds the queries as it embedded the exemplars: unlike `tmm.classifier`, without any rearrangement.
        tmm: Ranks the exemplars of its store.
        describer: Of the store's descriptors, if it has them.
        vocabulary: Of the store's labels.
        nearest: Finds the nearest exemplars of the same store.
    """

    def __init__(
        self,
        classifier: Classifier,
        tmm: TmmNN,
        describer: Describer | None,
        *,
        vocabulary: Vocabulary,
        nearest: NearestSearch,
    ) -> None:
        self._classifier, self._tmm, self._store = classifier, tmm, tmm.store
        self._vocabulary, self._describer = vocabulary, describer
        self._numbers = vocabulary.numbers()
        self._nearest = nearest

    @property
    def backend(self) -> str:
        """What passes exemplars through the backbone: software, precision, device."""
        return self._tmm.backbone.name

    @property
    def tmm(self) -> TmmNN:
        """Ranks by TMM-NN."""
        return self._tmm

    @property
    def describer(self) -> Describer | None:
        """Of the store's descriptors, if it has them."""
        return self._describer

    @property
    def nearest(self) -> NearestSearch:
        """What finds the nearest exemplars."""
        return self._nearest

    def over(self, store: Subset) -> "Searcher":
        """The same over some of the exemplars, where search is exact."""
        tmm = self._tmm.over(store)
        nearest = self._nearest.among(store)
        return Searcher(self._classifier, tmm, self._describer, vocabulary=self._vocabulary, nearest=nearest)

    def close(self) -> None:
        """Let go of what was made of the columns."""
        self._nearest.close()

    def search(self, queries: list[Query], options: SearchOptions, progress: Progress) -> list[SearchResult]:
        """An answer to every query, in their order.

        Args:
            queries: Of the store's image shape.
            options: What is asked for; the filter is the caller's.
            progress: Told of exemplars scored.

        Raises:
            InputError: the index lacks what the options need; or as `TmmNN.rank_many`.
        """
        return [result for result, _ in self.search_ranked(queries, options, progress)]

    def search_ranked(
        self, queries: list[Query], options: SearchOptions, progress: Progress, *, whole: bool = False
    ) -> list[tuple[SearchResult, RankedBy]]:
        """As `search`, and what every answer's exemplars were ranked by.

        Args:
            queries: As for `search`.
            options: As for `search`.
            progress: As for `search`.
            whole: Of TMM-NN all exemplars that were scored, not only the k best.
        """
        timings = Timings(len(queries))
        if options.mode == Mode.TMM:
            found = self._by_tmm(queries, options, timings, progress, whole=whole or options.explain)
        else:
            found = self._by_nearest(queries, options, timings)
        explanations: list[Explanation | None] = [None] * len(queries)
        if options.explain:
            with timings.step("explanation"):
                explanations = [*self._explanations(found)]
        with timings.step("reading"):
            shown = _Shown.of(self._store, [own.visible for own in found])
        return [
            (self._result(query, own, options, explanation=said, shown=shown, timings=timings.of(place)), own.ranked_by)
            for place, (query, own, said) in enumerate(zip(queries, found, explanations, strict=True))
        ]

    @cached_property
    def _explainer(self) -> Explainer:
        return Explainer(self._store, self._tmm.classes, self._classifier.head)

    def _explanations(self, found: list[_Found]) -> Iterator[Explanation]:
        asked = [Asked(own.features, own.ranked_by, own.predicted) for own in found]
        for own, reasons in zip(found, self._explainer.explained(asked), strict=True):
            name = self._vocabulary.class_names[own.predicted]
            notes = (
                [] if len(reasons.unlike.rows) else [f"no exemplar that was scored is of another class than {name!r}"]
            )
            if own.predicted not in self._tmm.classes.numbers:
                notes.append(f"no exemplar is of the class {name!r}, so that it has no prototype")
            yield Explanation(
                class_name=name,
                unlike=self._hits(*reasons.unlike),
                prototypes=self._hits(*reasons.prototypes),
                pulled_towards=self._hits(*reasons.towards),
                pulled_away=self._hits(*reasons.away),
                notes=tuple(notes),
            )

    def compared(self, queries: list[Query], options: SearchOptions, timings: Timings) -> Compared:
        """The queries as they are compared with the exemplars in any mode but ``tmm``.

        Raises:
            InputError: the index has no descriptors, and the mode is ``robust``.
            ImageError: the network makes numbers of a query that are not finite.
        """
        if options.mode == Mode.ROBUST:
            return self._by_descriptor(queries, options, timings)
        return self._by_metric(queries, options, timings)

    def _by_nearest(self, queries: list[Query], options: SearchOptions, timings: Timings) -> list[_Found]:
        """By descriptors, L2 or cosine."""
        compared = self.compared(queries, options, timings)
        nearest = self._nearest.search(compared, k=options.k, timings=timings)
        return [
            _Found(
                own.rows,
                own.scores,
                predicted,
                len(self._store),
                own.recognised,
                plain,
                ByVector(own.query, compared.column, compared.metric),
                agreement=own.agreement,
                put_first=own.put_first,
            )
            for own, predicted, plain in zip(nearest, compared.predicted, compared.plain, strict=True)
        ]

    def _by_metric(self, queries: list[Query], options: SearchOptions, timings: Timings) -> Compared:
        """By L2 or cosine."""
        features, predicted = [], []
        for positions, batch in self._batches(queries, options):
            with timings.step("embedding", positions), torch.inference_mode():
                pixels = self._pixels(batch)
                viewed = stretch_contrast(pixels) if options.stretches else pixels
                features.append(_finite(self._classifier.features(viewed).float().cpu().numpy(), batch))
                predicted += predict(features[-1], self._classifier).tolist()
        queried, column = np.concatenate(features), STRETCHED_FEATURE if options.stretches else FEATURE
        gate = self._gate(queries, options, timings) or _own_gate(column, queried, options)
        return Compared(queried, Metric(str(options.mode)), column, gate, predicted, queried)

    def _by_descriptor(self, queries: list[Query], options: SearchOptions, timings: Timings) -> Compared:
        """By descriptors."""
        describer = self._describer
        if describer is None:
            raise InputError(
                "the index has no descriptors, which the mode 'robust' needs: build it again with `views=…` of 1 "
                "or more (as by default), or search in another mode"
            )
        copies, robust, predicted, plain = [], [], [], []
        for positions, batch in self._batches(queries, options):
            with timings.step("embedding", positions), torch.inference_mode():
                views = describer.views(self._pixels(batch))
                copies.append(_finite(describer.described(views, describer.descriptors.recogniser), batch))
                robust.append(_finite(describer.described(views, describer.descriptors.robust), batch))
                predicted += describer.predicted(views)
                plain.append(views[0].features.float().cpu().numpy())
        threshold = options.threshold
        gate = None if threshold is None else Gate(COPY_FEATURE, np.concatenate(copies), threshold, puts_first=True)
        return Compared(np.concatenate(robust), Metric.COSINE, ROBUST_FEATURE, gate, predicted, np.concatenate(plain))

    def _batches(self, queries: list[Query], options: SearchOptions) -> Iterator[tuple[range, list[Query]]]:
        """The queries that pass the network together, and their positions; in mode ``tmm`` each alone."""
        alone = options.alone or options.mode == Mode.TMM
        size = 1 if alone else forward_batch_size(self._store.image_shape)
        for start in range(0, len(queries), size):
            yield range(start, min(start + size, len(queries))), queries[start : start + size]

    def _by_tmm(
        self, queries: list[Query], options: SearchOptions, timings: Timings, progress: Progress, *, whole: bool
    ) -> list[_Found]:
        """By TMM-NN, over all exemplars or over candidates."""
        gate = self._gate(queries, options, timings)
        rankings = self._tmm.rank_many(
            self._pixels(queries),
            k=len(self._store) if whole else options.k,
            config=options.tmm,
            candidates=self._chooser(queries, options, timings),
            labels=[options.label] * len(queries),
            together=options.together,
            copies=None if gate is None else self._nearest.recognised(gate, Metric.COSINE, timings),
            progress=progress,
            timings=timings,
        )
        return [
            _Found(
                own.rows[: options.k],
                own.scores[: options.k],
                own.view.predicted,
                own.scored,
                own.recognised,
                own.view.features[1].float().cpu().numpy(),
                ByRanking(own.rows, own.scores),
                own,
            )
            for own in rankings
        ]

    def _gate(self, queries: list[Query], options: SearchOptions, timings: Timings) -> Gate | None:
        """What recognises copies in any mode, where that is asked for and the index has descriptors."""
        describer = self._describer
        if options.threshold is None or describer is None:
            return None
        copies = []
        for positions, batch in self._batches(queries, options):
            with timings.step("recognition", positions), torch.inference_mode():
                views = describer.views(self._pixels(batch))
                copies.append(_finite(describer.described(views, describer.descriptors.recogniser), batch))
        return Gate(COPY_FEATURE, np.concatenate(copies), options.threshold)

    def _pixels(self, queries: list[Query]) -> Float32[torch.Tensor, "q c h w"]:
        return torch.from_numpy(np.stack([query.pixels for query in queries])).to(self._classifier.device)

    def _chooser(self, queries: list[Query], options: SearchOptions, timings: Timings) -> Choose | None:
        """What chooses the rows that each query's rerank scores; None where all are."""
        count = options.candidates
        if count is None or count >= len(self._store):
            return None
        if options.prefilter == Prefilter.GLOBAL:
            return lambda views: self._by_global_trigger(queries, options, count, timings)
        prefilter = Prefilter(options.prefilter or Prefilter.UNION)
        if prefilter is Prefilter.ROBUST:
            return lambda views: self._by_robust(queries, options, count, timings)

        def choose(views: list[QueryView]) -> list[Int64[np.ndarray, "candidates"]]:
            features = np.stack([view.features[1].float().cpu().numpy() for view in views])
            return self._nearest.candidates(
                features, prefilter, count=count, stretch=options.stretches, timings=timings
            )

        return choose

    def _by_robust(
        self, queries: list[Query], options: SearchOptions, count: int, timings: Timings
    ) -> list[Int64[np.ndarray, "candidates"]]:
        """The nearest by the index's descriptors."""
        compared = replace(self._by_descriptor(queries, options, timings), gate=None)
        return [own.rows for own in self._nearest.search(compared, k=count, timings=timings)]

    def _by_global_trigger(
        self, queries: list[Query], options: SearchOptions, count: int, timings: Timings
    ) -> list[Int64[np.ndarray, "candidates"]]:
        """The best by TMM-NN with the index's trigger instead of the configuration's own."""
        shared = self._tmm.global_trigger
        if shared is None:
            raise InputError(
                "the index has no global trigger, which the prefilter 'global' needs: build it with one "
                "(global_trigger=…), or choose another prefilter, such as 'union'"
            )
        config, labels = shared.as_asked_of(options.tmm), [options.label] * len(queries)
        with timings.step("prefilter"):
            rankings = self._tmm.rank_many(self._pixels(queries), k=count, config=config, labels=labels)
        return [ranking.rows for ranking in rankings]

    def _result(
        self,
        query: Query,
        found: _Found,
        options: SearchOptions,
        *,
        explanation: Explanation | None,
        shown: _Shown,
        timings: dict[str, float],
    ) -> SearchResult:
        ranking, recognised = found.ranking, found.recognised
        original = None if found.original is None else str(self._store.ids[found.original])
        true_label, true_class = self._true(query)
        notes = [f"the query was {assumption}" for assumption in query.assumed]
        if true_class is not None and true_label is None:
            notes.append(f"the query's label {true_class!r} is none of the index's")
        if ranking is not None and isinstance(options.tmm.head, TunedHead):
            notes += self._tmm.classes.notes
        if found.original is not None and not np.array_equal(
            np.rint(query.pixels * 255.0), shown.image(found.original)
        ):
            few = options.mode == Mode.ROBUST and len(self._store) < FEW_EXEMPLARS
            doubt = f"; with {len(self._store)} exemplars a stranger is sometimes taken for one" if few else ""
            notes.append(f"recognised as {original}: ranked by what is like that exemplar{doubt}")
        if found.put_first:
            notes.append(f"{self._store.ids[found.rows[0]]} comes first by what recognises copies, not by its score")
        precision, own = self._nearest.precision, found.ranked_by
        if ranking is None and precision not in (None, SearchPrecision.FP32):
            notes.append(
                f"looked for in {precision}, the best again in fp32: {found.agreement:.0%} of hits were so before"
            )
        if len(found.rows) < options.k:
            notes.append(
                f"k = {options.k} is more than the {found.scored} exemplars scored: returned {len(found.rows)}"
            )
        return SearchResult(
            query=query.name,
            mode=str(options.mode),
            hits=self._hits(found.rows, found.scores, None if ranking is None else ranking.confidences, shown=shown),
            predicted_label=found.predicted,
            predicted_class=self._vocabulary.class_names[found.predicted],
            true_label=true_label,
            true_class=true_class,
            scored=found.scored,
            exemplars=len(self._store),
            config=options.tmm.to_json() if ranking else None,
            backend=self._nearest.backend(own.column, COPY_FEATURE) if isinstance(own, ByVector) else self.backend,
            timings=timings,
            notes=tuple(notes),
            recognised_as=original,
            recognised_share=None if recognised is None else recognised.share,
            put_first=found.put_first,
            query_image=np.rint(query.pixels * 255.0).astype(np.uint8),
            trigger=ranking.view.found.trigger.cpu().numpy() if ranking else None,
            triggered_query=ranking.view.triggered.cpu().numpy() if ranking else None,
            explanation=explanation,
        )

    def _true(self, query: Query) -> tuple[int | None, str | None]:
        """The number of a query's label, where the index has it, and its name, where it has a label."""
        names = self._vocabulary.names
        if isinstance(query.label, str):
            return self._numbers.get(spelled([query.label], self._numbers).get(query.label, "")), query.label
        if query.label is None:
            return None, None
        return (query.label, names[query.label]) if 0 <= query.label < len(names) else (None, str(query.label))

    def _hits(
        self,
        rows: Int64[np.ndarray, "k"],
        scores: Float[np.ndarray, "k"],
        confidences: Float[np.ndarray, "_"] | None = None,
        *,
        shown: _Shown | None = None,
    ) -> tuple[Hit, ...]:
        store, shown = self._store, shown or _Shown.of(self._store, [rows])
        names, predicted = self._vocabulary.names, store.predictions(rows).tolist()
        return tuple(
            Hit(
                rank=rank,
                id=str(store.ids[row]),
                label=int(store.labels[row]),
                class_name=names[store.labels[row]],
                label_is_predicted=bool(store.label_is_predicted[row]),
                label_is_class=self._vocabulary.is_class(int(store.labels[row])),
                predicted_label=predicted[rank],
                predicted_class=names[predicted[rank]],
                score=float(scores[rank]),
                confidence=None if confidences is None else float(confidences[rank]),
                metadata=dict(shown.metadata[row]),
                image=shown.image(row),
            )
            for rank, row in enumerate(rows.tolist())
        )


def _own_gate(column: str, features: Float32[np.ndarray, "q d"], options: SearchOptions) -> Gate | None:
    """Without descriptors: what ranks recognises too."""
    return None if options.threshold is None else Gate(column, features, options.threshold)


def _finite(features: Float32[np.ndarray, "q d"], queries: list[Query]) -> Float32[np.ndarray, "q d"]:
    if not (finite := np.isfinite(features).all(axis=1)).all():
        raise ImageError(
            f"{queries[int(finite.argmin())].name}: the model's features of this image are not finite numbers (is the "
            f"image constant?); search for another, or check the weights"
        )
    return features
