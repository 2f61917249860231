"""`Engine`: open an index, search it."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import nn

from engine.backends import Backend, choose_backbone, choose_device, compare_backends
from engine.living import Living
from engine.query import ImageLike, Query, as_query
from engine.results import FailedQuery, Hit, SearchResult
from index.builder import BuildReport, check_fit, embedded, predict
from index.classifier import Classifier
from index.errors import ImageError, IndexStateError, InputError, ModelError, member, nearest
from index.faiss_cache import FaissCache
from index.lance_store import LanceStore, matching_rows
from index.manifest import CACHE, EXEMPLARS, GLOBAL_TRIGGER, MODEL, Manifest
from index.neighbours import EXACT, Metric, Neighbours
from index.progress import Progress, silent
from index.ranking import in_turn
from index.sources import ArraySource
from index.store import FEATURE, GLOBAL_FEATURE, STRETCHED_FEATURE, ExemplarStore, MemoryStore, Subset
from index.target import locked, recover
from index.where import shortened
from rerank.backbone import Backbone, Precision
from rerank.config import DEFAULT_PRESET, TmmConfig, preset
from rerank.contrast import stretch_contrast
from rerank.global_trigger import GlobalColumn, GlobalTrigger, make_global_trigger
from rerank.scoring import DEFAULT_CACHE_BYTES
from rerank.tmm import Ranking, TmmNN


class Mode(StrEnum):
    """How exemplars are ranked: by TMM-NN, or by distance between features."""

    TMM = "tmm"
    L2 = "l2"
    COSINE = "cosine"


class Prefilter(StrEnum):
    """What chooses the candidates that TMM-NN scores."""

    L2 = "l2"
    COSINE = "cosine"
    UNION = "union"  # both rankings, taken in turn
    GLOBAL = "global"  # TMM-NN with the index's global trigger


class SearchOptions(TypedDict, total=False):
    """The options of `Engine.search`, for type checkers."""

    k: int
    mode: str
    candidates: int | None
    prefilter: str
    config: TmmConfig | str
    label: int | None
    together: bool
    stretch: bool | None
    where: str | None
    progress: Progress


class Engine(Living):
    """Searches one version of an index. Made by `Engine.open` or `Engine.from_arrays`::

    with Engine.open("idx") as engine:
        result = engine.search("query.png", k=10)
    """

    def __init__(
        self,
        classifier: Classifier,
        store: ExemplarStore,
        *,
        class_names: Sequence[str],
        neighbours: str = EXACT,
        manifest: Manifest | None = None,
        path: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        precision: str = Precision.FP32,
        backbone: Backbone | None = None,
        global_trigger: GlobalTrigger | None = None,
    ) -> None:
        self.classifier = classifier
        self.store = store
        self.class_names = tuple(class_names)
        self.manifest = manifest
        self.path = path
        self._options: dict[str, Any] = {}
        self._global_trigger = global_trigger
        self._narrowed: dict[str, Engine] = {}
        self._factory = neighbours
        self._cache = FaissCache(path / CACHE, manifest.content) if path and manifest else None
        self._neighbours: dict[tuple[Metric, str], Neighbours] = {}
        self._tmm = TmmNN(
            classifier,
            store,
            cache_bytes=cache_bytes,
            precision=member(Precision, precision),
            backbone=backbone,
            global_trigger=global_trigger,
        )
        self._rows = {str(id_): row for row, id_ in enumerate(store.ids)}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model: nn.Module | str | None = None,
        device: str = "auto",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        precision: str = Precision.FP32,
        backend: str = Backend.AUTO,
        version: int | None = None,
        verify: bool = False,
    ) -> "Engine":
        """Open an index made by `build_index` or `engine build-index`.

        What is opened stays as it is while others change the index; `refresh` moves on.

        Args:
            path: The index's folder.
            model: Needed only for an index whose model is the user's own code: the module, or
                ``package.module:factory``. Its fingerprint must be the index's.
            device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: CUDA where there is one.
            cache_bytes: What may stay in memory on the device between searches, images first, then features.
            precision: ``fp32``, or ``bf16``: faster, with the best answers scored again in fp32.
            backend: ``torch``, ``onnx`` (ONNX Runtime, fp32 only), or ``auto``: what a measurement when the index was
                built found faster; ``torch`` where there was none, or in bf16.
            version: An older version, as `versions` numbers them; None is the newest.
            verify: Compare the content of every file with what was written, not only of those that are small: takes as
                long as reading all of it.

        Raises:
            InputError: a device or precision that this machine does not have, or a cache smaller than one chunk of
                images.
            IndexStateError: no index there, of another format version, or damaged.
            ModelError: the model cannot be rebuilt, or is not the one that the features were computed with.
        """
        path = Path(path)
        recover(path)
        manifest = Manifest.read(path, version=version)
        manifest.check_sizes(path)
        manifest.check_digests(path, exemplars=verify)
        classifier = Classifier.load(path / MODEL, model=model)
        if classifier.fingerprint != manifest.fingerprint:
            raise ModelError(
                f"{path} was built with the model {manifest.fingerprint[:12]}…, this one is "
                f"{classifier.fingerprint[:12]}…: its "
                f"features would not match; open it with the same model, or build the index again"
            )
        classifier = classifier.to(choose_device(device))
        store = LanceStore(
            path / EXEMPLARS,
            image_shape=manifest.image_shape,
            feature_dim=manifest.feature_dim,
            version=manifest.lance_version,
            global_features=manifest.global_trigger,
        )
        manifest.check_exemplars(path, len(store), store.files)
        engine = cls(
            classifier,
            store,
            class_names=manifest.class_names,
            neighbours=manifest.neighbours,
            manifest=manifest,
            path=path,
            cache_bytes=cache_bytes,
            precision=precision,
            backbone=choose_backbone(
                path, manifest, classifier, backend=member(Backend, backend), precision=member(Precision, precision)
            ),
            global_trigger=_global_trigger(path, manifest),
        )
        engine._options = {
            "model": model,
            "device": device,
            "cache_bytes": cache_bytes,
            "precision": precision,
            "backend": backend,
            "version": version,
            "verify": verify,
        }
        return engine

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray | None,
        classifier: Classifier,
        *,
        ids: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        metadata: dict[str, Sequence[Any]] | None = None,
        neighbours: str = EXACT,
        global_trigger: TmmConfig | str | None = DEFAULT_PRESET,
        progress: Progress = silent,
    ) -> "Engine":
        """An index in memory, with the same methods.

        Args:
            images: (n, c, h, w), (n, h, w, c) or (n, h, w); uint8, or float in [0, 1].
            labels: Class indices, or None: the model's predictions are used and marked.
            classifier: Computes the features.
            ids: Unique; default: positions.
            class_names: In label order; default: the classifier's.
            metadata: Columns of n values.
            neighbours: FAISS factory string.
            global_trigger: A preset or configuration, with whose blend, clamping and intensity a global trigger and the
                exemplars' features under it are made: the default search needs them. None: without.
            progress: Told of images done.

        Raises:
            InputError: shapes, lengths, labels or ids that do not fit.
        """
        source = ArraySource(images, labels, ids=ids, class_names=class_names, metadata=metadata)
        check_fit(source, classifier)
        shared = None
        if global_trigger is not None:
            config = preset(global_trigger) if isinstance(global_trigger, str) else global_trigger
            shared = make_global_trigger(source, classifier, config, progress=progress)
        return cls(
            classifier,
            _memory_store(source, classifier, shared, progress),
            class_names=class_names or classifier.class_names,
            neighbours=neighbours,
            global_trigger=shared,
        )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._neighbours.clear()

    def __len__(self) -> int:
        return len(self.store)

    @property
    def backend(self) -> str:
        """What passes exemplars through the backbone: software, precision, device."""
        return self._tmm.backbone.name

    def compare_backends(self) -> dict[str, float]:
        """Time PyTorch and ONNX Runtime on this index, and note the images a second for ``backend="auto"``.

        Raises:
            InputError: the index is in memory only, or the 'onnx' extra is not installed.
        """
        if self.manifest is None or self.path is None:
            raise InputError("an index in memory has no place for ONNX graphs; build one on disk")
        speeds = compare_backends(self.path, self.classifier, self.store).images_per_second
        with locked(self.path):
            replace(Manifest.read(self.path), backend_speeds=speeds).write(self.path)
        return speeds

    def matching(self, where: str) -> "Engine":
        """An engine over those exemplars alone for which a filter is true; its answers are those of an index of them.

        L2 and cosine are exact there, whatever the index's FAISS factory string. The last filter's is kept.

        Args:
            where: SQL over id, label and metadata, as in ``label = 3 AND page > 10``.

        Raises:
            InputError: not such a filter, or nothing matches it.
        """
        narrowed = self._narrowed.get(where)
        if narrowed is None:
            rows = matching_rows(self.store, where)
            if len(rows) == 0:
                raise InputError(f"no exemplar matches {shortened(where)}")
            narrowed = copy.copy(self)
            narrowed.store = Subset(self.store, rows)
            narrowed._factory, narrowed._cache, narrowed._neighbours, narrowed._narrowed = EXACT, None, {}, {}
            narrowed._tmm = self._tmm.over(narrowed.store)
            narrowed._rows = {str(id_): row for row, id_ in enumerate(narrowed.store.ids)}
            self._narrowed.clear()
            self._narrowed[where] = narrowed
        return narrowed

    def exemplar(self, id_: str) -> Query:
        """A stored exemplar as a query, by its id.

        Raises:
            InputError: no exemplar has it.
        """
        row = self._rows.get(id_)
        if row is None:
            raise InputError(f"no exemplar has the id {id_!r}{nearest(id_, self._rows)}")
        image = self.store.images(np.array([row]))[0]
        return Query(id_, image.astype(np.float32) / 255.0, int(self.store.labels[row]))

    @overload
    def search(self, query: list[ImageLike | Query], **options: Unpack[SearchOptions]) -> list[SearchResult]: ...
    @overload
    def search(self, query: ImageLike | Query, **options: Unpack[SearchOptions]) -> SearchResult: ...
    def search(
        self,
        query: ImageLike | Query | list[ImageLike | Query],
        *,
        k: int = 10,
        mode: str = Mode.TMM,
        candidates: int | None = None,
        prefilter: str = Prefilter.UNION,
        config: TmmConfig | str = DEFAULT_PRESET,
        label: int | None = None,
        together: bool = False,
        stretch: bool | None = None,
        where: str | None = None,
        progress: Progress = silent,
    ) -> SearchResult | list[SearchResult]:
        """The k exemplars that the model sees as most like the query.

        Args:
            query: A path, a PIL image, an array (uint8, or float in [0, 1]), a `Query`; or a list of them, for a list
                of results.
            k: How many, at least 1; all are returned (and a note says so) where there are fewer.
            mode: ``tmm``, ``l2`` or ``cosine``.
            candidates: For ``tmm``: score only so many exemplars, chosen by the prefilter. None scores all.
            prefilter: ``l2``, ``cosine``, ``union`` of both, or ``global``, where the index has a global trigger.
            config: A preset's name or a configuration.
            label: y_q; None takes the model's prediction.
            together: For a list: optimise the triggers jointly, several times as fast. Without it each answer is bit
                for bit what it is alone; with it triggers differ slightly, since the optimisation amplifies rounding.
            stretch: Stretch each query's contrast to [0, 1] first, so that a darkened query is searched for as the
                original was. None: as the configuration says for ``tmm``, not for ``l2`` and ``cosine``.
            where: A filter in SQL over id, label and metadata: exemplars outside are neither candidates nor scored nor
                tuned on, as if the index did not have them (`matching`).
            progress: Told of exemplars scored.

        Raises:
            InputError: an unreadable image, an unknown mode, or an option out of range; raised before any search
                begins.
        """
        mode, config = member(Mode, mode), preset(config) if isinstance(config, str) else config
        if stretch is None:
            stretch = mode is Mode.TMM and config.stretch
        request = _Request(
            k=_positive("k", k),
            mode=mode,
            candidates=None if candidates is None else _positive("candidates", candidates),
            prefilter=member(Prefilter, prefilter),
            config=replace(config, stretch=stretch),
            label=label,
            together=together,
        )
        everything = copy.copy(self)  # `refresh` in another thread does not reach it
        current = everything if where is None else everything.matching(where)
        items = query if isinstance(query, list) else [query]
        queries = [current._query(item, position) for position, item in enumerate(items)]
        searched = [_stretched(query) for query in queries] if stretch else queries
        answers = (current._rerank if request.mode is Mode.TMM else current._nearest)(searched, request, progress)
        results = [current._result(query, answer, request) for query, answer in zip(queries, answers, strict=True)]
        if where is not None:
            note = f"restricted to the {len(current):,} of {len(everything):,} exemplars that match {shortened(where)}"
            results = [replace(result, exemplars=len(everything), notes=(note, *result.notes)) for result in results]
        return results if isinstance(query, list) else results[0]

    def search_each(
        self, queries: Sequence[ImageLike | Query], **options: Unpack[SearchOptions]
    ) -> list[SearchResult | FailedQuery]:
        """As `search` for a list, but for an image that cannot be searched with, what is wrong stands in its place.

        Raises:
            InputError: an unknown mode, or an option out of range.
        """
        found: list[SearchResult | FailedQuery | Query] = []
        for position, item in enumerate(queries):
            try:
                found.append(self._query(item, position))
            except ImageError as error:
                found.append(
                    FailedQuery(str(item) if isinstance(item, str | Path) else f"query {position}", str(error))
                )
        answers = iter(self._each([item for item in found if isinstance(item, Query)], options))
        return [next(answers) if isinstance(item, Query) else item for item in found]

    def _each(self, queries: list[Query], options: SearchOptions) -> list[SearchResult | FailedQuery]:
        if not queries:
            return []
        try:
            return [*self.search([*queries], **options)]
        except ImageError as error:
            if len(queries) == 1:
                return [FailedQuery(queries[0].name, str(error))]
        return [answer for query in queries for answer in self._each([query], options)]

    def _query(self, item: ImageLike | Query, position: int) -> Query:
        return as_query(item, shape=self.store.image_shape, name=f"query {position}")

    def _nearest(self, queries: list[Query], request: "_Request", progress: Progress) -> "list[_Answer]":
        """L2 or cosine."""
        answers = [_Answer() for _ in queries]
        searcher = self._searcher(Metric(request.mode), request, answers)
        features = self._embed(queries, answers)
        with _timed(answers, "neighbours"):
            found = searcher.search(features, k=request.k)
        for answer, (rows, scores) in zip(answers, found, strict=True):
            answer.rows, answer.scores, answer.scored = rows, scores, len(self)
        return answers

    def _rerank(self, queries: list[Query], request: "_Request", progress: Progress) -> "list[_Answer]":
        """TMM-NN, over all exemplars or over candidates."""
        answers = [_Answer() for _ in queries]
        features = self._embed(queries, answers)
        pixels = torch.from_numpy(np.stack([query.pixels for query in queries])).to(self.classifier.device)
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
            answer.ranking = ranking
            answer.timings |= ranking.timings
        return answers

    def _result(self, query: Query, answer: "_Answer", request: "_Request") -> SearchResult:
        ranking = answer.ranking
        notes = []
        if len(answer.rows) < request.k:
            notes.append(
                f"k = {request.k} is more than the {answer.scored} exemplars scored: returned {len(answer.rows)}"
            )
        return SearchResult(
            query=query.name,
            mode=str(request.mode),
            hits=self._hits(answer),
            predicted_label=answer.predicted,
            predicted_class=self.class_names[answer.predicted],
            true_label=query.label,
            true_class=None if query.label is None else self.class_names[query.label],
            scored=answer.scored,
            exemplars=len(self),
            config=request.config.to_json() if ranking else None,
            backend=self.backend if ranking else "FAISS",
            timings=answer.timings,
            notes=tuple(notes),
            query_image=np.rint(query.pixels * 255.0).astype(np.uint8),
            trigger=ranking.trigger if ranking else None,
            triggered_query=ranking.triggered_query if ranking else None,
        )

    def _embed(self, queries: list[Query], answers: "list[_Answer]") -> Float32[np.ndarray, "q d"]:
        """φ(x_q), one by one so that an answer does not depend on its neighbours in the list; notes the predictions."""
        features = []
        for query, answer in zip(queries, answers, strict=True):
            with _timed([answer], "embedding"), torch.inference_mode():
                pixels = torch.from_numpy(query.pixels[None]).to(self.classifier.device)
                features.append(self.classifier.features(pixels).float().cpu().numpy())
                answer.predicted = int(predict(features[-1], self.classifier)[0])
        return np.concatenate(features)

    def _candidates(
        self,
        pixels: Float32[torch.Tensor, "q c h w"],
        features: Float32[np.ndarray, "q d"],
        request: "_Request",
        answers: "list[_Answer]",
    ) -> list[Int64[np.ndarray, "candidates"] | None]:
        """The rows that each query's rerank scores; None for all."""
        count = request.candidates
        if count is None or count >= len(self):
            return [None] * len(answers)
        if request.prefilter is Prefilter.GLOBAL:
            config = self._tmm.require_global_trigger().as_asked_of(request.config)
            labels = [request.label] * len(answers)
            with _timed(answers, "prefilter"):
                rankings = self._tmm.rank_many(pixels, k=count, config=config, labels=labels)
            return [ranking.rows for ranking in rankings]
        metrics = list(Metric) if request.prefilter is Prefilter.UNION else [Metric(request.prefilter)]
        searchers = [self._searcher(metric, request, answers) for metric in metrics]
        with _timed(answers, "prefilter"):
            found = [[rows for rows, _ in searcher.search(features, k=count)] for searcher in searchers]
        return [in_turn(rankings)[:count] for rankings in zip(*found, strict=True)]

    def _searcher(self, metric: Metric, request: "_Request", answers: "list[_Answer]") -> Neighbours:
        column = STRETCHED_FEATURE if request.config.stretch else FEATURE
        if column not in self.store.feature_columns:
            raise InputError(
                "the index has no features of images with their contrast stretched: build it with --global-trigger, "
                "or search with --no-stretch"
            )
        if (metric, column) not in self._neighbours:
            with _timed(answers, "loading features"):
                self._neighbours[metric, column] = Neighbours(
                    self.store, metric, column=column, factory=self._factory, cache=self._cache
                )
        return self._neighbours[metric, column]

    def _hits(self, answer: "_Answer") -> tuple[Hit, ...]:
        images, metadata = self.store.images(answer.rows), self.store.metadata(answer.rows)
        confidences = None if answer.ranking is None else answer.ranking.confidences
        return tuple(
            Hit(
                rank=rank,
                id=str(self.store.ids[row]),
                label=int(self.store.labels[row]),
                class_name=self.class_names[self.store.labels[row]],
                label_is_predicted=bool(self.store.label_is_predicted[row]),
                score=float(answer.scores[rank]),
                confidence=None if confidences is None else float(confidences[rank]),
                metadata=metadata[rank],
                image=images[rank],
            )
            for rank, row in enumerate(answer.rows)
        )


@dataclass(frozen=True, slots=True)
class _Request:
    """Checked options of a search."""

    k: int
    mode: Mode
    candidates: int | None
    prefilter: Prefilter
    config: TmmConfig
    label: int | None
    together: bool


@dataclass(slots=True)
class _Answer:
    """What a search finds out about one query, step by step."""

    predicted: int = -1
    rows: Int64[np.ndarray, "k"] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    scores: Float[np.ndarray, "k"] = field(default_factory=lambda: np.empty(0))
    scored: int = 0
    ranking: Ranking | None = None
    timings: dict[str, float] = field(default_factory=dict)


def _global_trigger(path: Path, manifest: Manifest) -> GlobalTrigger | None:
    if not manifest.global_trigger:
        return None
    found = GlobalTrigger.load(path / GLOBAL_TRIGGER)
    if tuple(found.trigger.shape) != manifest.image_shape:
        raise IndexStateError(
            f"{path / GLOBAL_TRIGGER}: expected a trigger of shape {manifest.image_shape}, got "
            f"{tuple(found.trigger.shape)}; build the index again"
        )
    return found


def _stretched(query: Query) -> Query:
    return replace(query, pixels=stretch_contrast(torch.from_numpy(query.pixels)).numpy())


def _memory_store(
    source: ArraySource, classifier: Classifier, shared: GlobalTrigger | None, progress: Progress
) -> MemoryStore:
    report, batches = BuildReport(), []
    for batch in embedded(source, classifier, report):
        batches.append(batch)
        progress("embedding", report.exemplars, len(source))
    records = [record for batch in batches for record in batch.records]
    more: dict[str, np.ndarray] = {}
    if shared is not None:
        parts = [GlobalColumn(shared, classifier).columns(batch.images) for batch in batches]
        more = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return MemoryStore(
        np.concatenate([batch.images for batch in batches]),
        np.concatenate([batch.features for batch in batches]),
        np.concatenate([batch.labels for batch in batches]),
        ids=[record.id for record in records],
        label_is_predicted=np.full(len(records), not source.labelled),
        global_features=more.get(GLOBAL_FEATURE),
        stretched_features=more.get(STRETCHED_FEATURE),
        metadata=[record.metadata for record in records],
    )


@contextmanager
def _timed(answers: "list[_Answer]", step: str) -> Iterator[None]:
    """Time a step, shared equally by the answers it serves."""
    start = time.perf_counter()
    yield
    seconds = (time.perf_counter() - start) / len(answers)
    for answer in answers:
        answer.timings[step] = answer.timings.get(step, 0.0) + seconds


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return int(value)
