"""`Engine`: open an index, search it."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack, overload

import numpy as np
from torch import nn

from tmm_engine.backends import Backend, compare_backends
from tmm_engine.index.errors import ImageError, InputError, member, nearest
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.search import EXACT
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.exemplars import ExemplarStore, Subset
from tmm_engine.index.store.lance_store import matching_rows
from tmm_engine.index.store.manifest import CACHE, Manifest
from tmm_engine.index.store.target import locked
from tmm_engine.index.store.where import shortened
from tmm_engine.living import Living
from tmm_engine.opening import index_in_memory, open_parts
from tmm_engine.query import ImageLike, Query, as_query
from tmm_engine.request import Mode, Prefilter, Request, SearchOptions
from tmm_engine.rerank.backbone import Backbone, Precision
from tmm_engine.rerank.exemplars import DEFAULT_CACHE_BYTES
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.settings import DEFAULT_PRESET, TmmConfig, preset
from tmm_engine.rerank.tmm import TmmNN
from tmm_engine.results import FailedQuery, SearchResult
from tmm_engine.searching import Searcher

__all__ = ["Engine", "Mode", "Prefilter", "SearchOptions"]


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
        tmm = TmmNN(
            classifier,
            store,
            cache_bytes=cache_bytes,
            precision=member(Precision, precision),
            backbone=backbone,
            global_trigger=global_trigger,
        )
        cache = FaissCache(path / CACHE, manifest.content) if path and manifest else None
        self._searcher = Searcher(classifier, tmm, class_names=self.class_names, neighbours=neighbours, cache=cache)
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
        parts = open_parts(
            path,
            model=model,
            device=device,
            precision=member(Precision, precision),
            backend=member(Backend, backend),
            version=version,
            verify=verify,
        )
        engine = cls(
            parts.classifier,
            parts.store,
            class_names=parts.manifest.class_names,
            neighbours=parts.manifest.neighbours,
            manifest=parts.manifest,
            path=path,
            cache_bytes=cache_bytes,
            precision=precision,
            backbone=parts.backbone,
            global_trigger=parts.global_trigger,
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
        config = preset(global_trigger) if isinstance(global_trigger, str) else global_trigger
        store, shared = index_in_memory(source, classifier, global_trigger=config, progress=progress)
        return cls(
            classifier,
            store,
            class_names=class_names or classifier.class_names,
            neighbours=neighbours,
            global_trigger=shared,
        )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._searcher.forget_neighbours()

    def __len__(self) -> int:
        return len(self.store)

    @property
    def backend(self) -> str:
        """What passes exemplars through the backbone: software, precision, device."""
        return self._searcher.backend

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
            narrowed._narrowed = {}
            narrowed._searcher = self._searcher.over(narrowed.store)
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
        recognition: float | Literal[False] | None = None,
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
            recognition: Answer for a query as for the exemplar nearest to it, where that one's distance is a smaller
                part of the second nearest's than this, in (0, 1] (`rerank.recognise`). Among candidates, if there are
                any. False: never. None: as the configuration says for ``tmm``, never for ``l2`` and ``cosine``.
            where: A filter in SQL over id, label and metadata: exemplars outside are neither candidates nor scored nor
                tuned on, as if the index did not have them (`matching`).
            progress: Told of exemplars scored.

        Raises:
            InputError: an unreadable image, an unknown mode, or an option out of range; raised before any search
                begins.
        """
        request = Request.checked(
            k=k,
            mode=mode,
            candidates=candidates,
            prefilter=prefilter,
            config=config,
            label=label,
            together=together,
            stretch=stretch,
            recognition=recognition,
        )
        everything = copy.copy(self)  # `refresh` in another thread does not reach it
        current = everything if where is None else everything.matching(where)
        items = query if isinstance(query, list) else [query]
        queries = [current._query(item, position) for position, item in enumerate(items)]
        results = current._searcher.search(queries, request, progress)
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
