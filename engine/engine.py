"""`Engine`: open an index, search it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, TypeVar, Unpack, overload

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import nn

from engine.query import ImageLike, Query, as_query
from engine.results import Hit, SearchResult
from index.builder import BuildReport, check_fit, embedded, predict
from index.classifier import Classifier
from index.errors import InputError, ModelError, member, nearest
from index.lance_store import LanceStore
from index.manifest import EXEMPLARS, MODEL, Manifest
from index.neighbours import EXACT, Metric, Neighbours
from index.progress import Progress, silent
from index.sources import ArraySource
from index.store import ExemplarStore, MemoryStore
from index.target import recover
from rerank.config import DEFAULT_PRESET, TmmConfig, preset
from rerank.scoring import DEFAULT_CACHE_BYTES
from rerank.tmm import Ranking, TmmNN

T = TypeVar("T")


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


class SearchOptions(TypedDict, total=False):
    """The options of `Engine.search`, for type checkers."""

    k: int
    mode: str
    candidates: int | None
    prefilter: str
    config: TmmConfig | str
    label: int | None
    progress: Progress


class Engine:
    """Searches one version of an index. Made by `Engine.open` or `Engine.from_arrays`.

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
    ) -> None:
        self.classifier = classifier
        self.store = store
        self.class_names = tuple(class_names)
        self.manifest = manifest
        self.path = path
        self._factory = neighbours
        self._neighbours: dict[Metric, Neighbours] = {}
        self._tmm = TmmNN(classifier, store, cache_bytes=cache_bytes)
        self._rows = {str(id_): row for row, id_ in enumerate(store.ids)}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model: nn.Module | str | None = None,
        device: str = "auto",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> "Engine":
        """Open an index made by `build_index` or `engine build-index`.

        Args:
            path: The index's folder.
            model: Needed only for an index whose model is the user's own code: the module, or
                ``package.module:factory``. Its fingerprint must be the index's.
            device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: CUDA where there is one.
            cache_bytes: What may stay in memory on the device between searches, images first, then features.

        Raises:
            IndexStateError: no index there, of another format version, or damaged.
            ModelError: the model cannot be rebuilt, or is not the one that the features were computed with.
        """
        path = Path(path)
        recover(path)
        manifest = Manifest.read(path)
        manifest.check_sizes(path)
        classifier = Classifier.load(path / MODEL, model=model)
        if classifier.fingerprint != manifest.fingerprint:
            raise ModelError(
                f"{path} was built with the model {manifest.fingerprint[:12]}…, this one is "
                f"{classifier.fingerprint[:12]}…: its "
                f"features would not match; open it with the same model, or build the index again"
            )
        store = LanceStore(
            path / EXEMPLARS,
            image_shape=manifest.image_shape,
            feature_dim=manifest.feature_dim,
            version=manifest.lance_version,
        )
        return cls(
            classifier.to(choose_device(device)),
            store,
            class_names=manifest.class_names,
            neighbours=manifest.neighbours,
            manifest=manifest,
            path=path,
            cache_bytes=cache_bytes,
        )

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
            progress: Told of images done.

        Raises:
            InputError: shapes, lengths, labels or ids that do not fit.
        """
        source = ArraySource(images, labels, ids=ids, class_names=class_names, metadata=metadata)
        store = _memory_store(source, classifier, progress)
        return cls(classifier, store, class_names=class_names or classifier.class_names, neighbours=neighbours)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._neighbours.clear()

    def __len__(self) -> int:
        return len(self.store)

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
        progress: Progress = silent,
    ) -> SearchResult | list[SearchResult]:
        """The k exemplars that the model sees as most like the query.

        Args:
            query: A path, a PIL image, an array (uint8, or float in [0, 1]), a `Query`; or a list of them, for a list
                of results.
            k: How many, at least 1; all are returned (and a note says so) where there are fewer.
            mode: ``tmm``, ``l2`` or ``cosine``.
            candidates: For ``tmm``: score only so many exemplars, chosen by the prefilter. None scores all.
            prefilter: ``l2``, ``cosine`` or ``union``.
            config: A preset's name or a configuration.
            label: y_q; None takes the model's prediction.
            progress: Told of exemplars scored.

        Raises:
            InputError: an unreadable image, an unknown mode, or an option out of range; raised before any search
                begins.
        """
        request = _Request(
            k=_positive("k", k),
            mode=member(Mode, mode),
            candidates=None if candidates is None else _positive("candidates", candidates),
            prefilter=member(Prefilter, prefilter),
            config=preset(config) if isinstance(config, str) else config,
            label=self._checked_label(label),
        )
        items = query if isinstance(query, list) else [query]
        queries = [
            as_query(item, shape=self.store.image_shape, name=f"query {position}")
            for position, item in enumerate(items)
        ]
        results = [self._search(item, request, progress) for item in queries]
        return results if isinstance(query, list) else results[0]

    def _search(self, query: Query, request: "_Request", progress: Progress) -> SearchResult:
        timings: dict[str, float] = {}
        features = _timed(timings, "embedding", lambda: self._embed(query))
        predicted = int(predict(features, self.classifier)[0])
        notes: list[str] = []
        ranking: Ranking | None = None
        if request.mode is Mode.TMM:
            rows = None
            if request.candidates is not None and request.candidates < len(self):
                rows = self._candidates(features, request, timings)
            ranking = self._tmm.rank(
                torch.from_numpy(query.pixels).to(self.classifier.device),
                k=request.k,
                config=request.config,
                candidates=rows,
                label=request.label,
                progress=progress,
            )
            timings |= ranking.timings
            best, scores, scored = ranking.rows, ranking.scores, ranking.scored
        else:
            searcher = self._searcher(Metric(request.mode), timings)
            [(best, scores)] = _timed(timings, "neighbours", lambda: searcher.search(features, k=request.k))
            scored = len(self)
        if len(best) < request.k:
            notes.append(f"k = {request.k} is more than the {scored} exemplars scored: returned {len(best)}")
        return SearchResult(
            query=query.name,
            mode=str(request.mode),
            hits=self._hits(best, scores, None if ranking is None else ranking.confidences),
            predicted_label=predicted,
            predicted_class=self.class_names[predicted],
            true_label=query.label,
            true_class=None if query.label is None else self.class_names[query.label],
            scored=scored,
            exemplars=len(self),
            config=request.config.to_json() if ranking else None,
            timings=timings,
            notes=tuple(notes),
            query_image=np.rint(query.pixels * 255.0).astype(np.uint8),
            trigger=ranking.trigger if ranking else None,
            triggered_query=ranking.triggered_query if ranking else None,
        )

    def _embed(self, query: Query) -> Float32[np.ndarray, "1 d"]:
        with torch.inference_mode():
            pixels = torch.from_numpy(query.pixels[None]).to(self.classifier.device)
            return self.classifier.features(pixels).float().cpu().numpy()

    def _candidates(
        self, features: Float32[np.ndarray, "1 d"], request: "_Request", timings: dict[str, float]
    ) -> Int64[np.ndarray, "candidates"]:
        assert request.candidates is not None
        metrics = list(Metric) if request.prefilter is Prefilter.UNION else [Metric(request.prefilter)]
        found = []
        for metric in metrics:
            searcher = self._searcher(metric, timings)
            [(rows, _)] = _timed(timings, "prefilter", partial(searcher.search, features, k=request.candidates))
            found.append(rows)
        in_turn = np.stack(found, axis=1).reshape(-1)  # (m, metrics) -> first of each, second of each, …
        return np.array(list(dict.fromkeys(in_turn.tolist()))[: request.candidates])

    def _searcher(self, metric: Metric, timings: dict[str, float]) -> Neighbours:
        if metric not in self._neighbours:
            self._neighbours[metric] = _timed(
                timings, "loading features", lambda: Neighbours(self.store, metric, factory=self._factory)
            )
        return self._neighbours[metric]

    def _hits(
        self, rows: Int64[np.ndarray, "k"], scores: np.ndarray, confidences: np.ndarray | None
    ) -> tuple[Hit, ...]:
        images, metadata = self.store.images(rows), self.store.metadata(rows)
        return tuple(
            Hit(
                rank=rank,
                id=str(self.store.ids[row]),
                label=int(self.store.labels[row]),
                class_name=self.class_names[self.store.labels[row]],
                label_is_predicted=bool(self.store.label_is_predicted[row]),
                score=float(scores[rank]),
                confidence=None if confidences is None else float(confidences[rank]),
                metadata=metadata[rank],
                image=images[rank],
            )
            for rank, row in enumerate(rows)
        )

    def _checked_label(self, label: int | None) -> int | None:
        if label is not None and not 0 <= label < self.classifier.num_classes:
            raise InputError(f"label: expected 0 to {self.classifier.num_classes - 1}, got {label}")
        return label


@dataclass(frozen=True, slots=True)
class _Request:
    """Checked options of a search."""

    k: int
    mode: Mode
    candidates: int | None
    prefilter: Prefilter
    config: TmmConfig
    label: int | None


def choose_device(name: str) -> torch.device:
    """The device called ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; expected cpu, cuda, cuda:N or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    return device


def _memory_store(source: ArraySource, classifier: Classifier, progress: Progress) -> MemoryStore:
    check_fit(source, classifier)
    report, batches = BuildReport(), []
    for batch in embedded(source, classifier, report):
        batches.append(batch)
        progress("embedding", report.exemplars, len(source))
    records = [record for batch in batches for record in batch.records]
    return MemoryStore(
        np.concatenate([batch.images for batch in batches]),
        np.concatenate([batch.features for batch in batches]),
        np.concatenate([batch.labels for batch in batches]),
        ids=[record.id for record in records],
        label_is_predicted=np.full(len(records), not source.labelled),
        metadata=[record.metadata for record in records],
    )


def _timed(timings: dict[str, float], step: str, work: Callable[[], T]) -> T:
    start = time.perf_counter()
    value = work()
    timings[step] = timings.get(step, 0.0) + time.perf_counter() - start
    return value


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return int(value)
