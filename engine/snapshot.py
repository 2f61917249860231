"""One version of an index, opened: everything that a search needs. It never changes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tmm_engine.index.descriptors.columns import ROBUST_FEATURE, Describer
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.names import spelled
from tmm_engine.index.neighbours.budget import Budget, held_memory
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.factories import EXACT, Effort, SearchPrecision
from tmm_engine.index.neighbours.matrices import Matrices
from tmm_engine.index.neighbours.matrix import MatrixCache
from tmm_engine.index.neighbours.tuned import Tuned
from tmm_engine.index.progress import Progress
from tmm_engine.index.store.exemplars import ExemplarStore, Subset
from tmm_engine.index.store.lance_store import LanceStore, matching_rows
from tmm_engine.index.store.manifest import CACHE, Manifest
from tmm_engine.index.store.where import shortened
from tmm_engine.nearest import NearestSearch
from tmm_engine.opening import Opening, Parts, open_parts
from tmm_engine.options import Mode, SearchOptions
from tmm_engine.query import Query
from tmm_engine.rerank.backbone import Backbone, Precision
from tmm_engine.rerank.exemplars import DEFAULT_CACHE_BYTES
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.timing import Timings
from tmm_engine.rerank.tmm import TmmNN
from tmm_engine.results import SearchResult
from tmm_engine.searching import Searcher
from tmm_engine.tuning import Sample, Tuner, check_wanted, sample_queries, usual_factories


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What `Engine` is a handle on.

    Attributes:
        classifier: Embeds queries as it embedded the exemplars.
        store: The exemplars.
        vocabulary: Of the store's labels.
        searcher: Answers searches over the store.
        rows: Of the exemplars, by id.
        global_trigger: The index's, if it has one.
        manifest: Of the version; None in memory.
        path: The index's folder; None in memory.
        where: The filter that has narrowed it, if one has.
        held: Bytes that the process held beside features when the index was first opened, for a bound on memory.
    """

    classifier: Classifier
    store: ExemplarStore
    vocabulary: Vocabulary
    searcher: Searcher
    rows: dict[str, int]
    global_trigger: GlobalTrigger | None = None
    manifest: Manifest | None = None
    path: Path | None = None
    where: str | None = None
    held: int = 0

    @classmethod
    def of(
        cls,
        classifier: Classifier,
        store: ExemplarStore,
        *,
        vocabulary: Vocabulary,
        neighbours: str = EXACT,
        effort: Effort | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        precision: Precision = Precision.FP32,
        backbone: Backbone | None = None,
        global_trigger: GlobalTrigger | None = None,
        describer: Describer | None = None,
        manifest: Manifest | None = None,
        path: Path | None = None,
        budget: Budget | None = None,
        search_precision: SearchPrecision | None = None,
    ) -> "Snapshot":
        """From its parts.

        Args:
            classifier: Computed the store's features.
            store: The exemplars.
            vocabulary: Of the store's labels.
            neighbours: FAISS factory string.
            effort: How thoroughly an approximate index is searched.
            cache_bytes: What may stay in memory on the device between searches, images first, then features.
            precision: Of the pass over the exemplars.
            backbone: What passes exemplars through φ instead of PyTorch.
            global_trigger: The index's, if it has one.
            describer: Of its descriptors, if it has them.
            manifest: Of an index on disk.
            path: Its folder.
            budget: Of memory for its features.
            search_precision: That `neighbours` stands for, where one was asked for.

        Raises:
            InputError: a precision that the device does not have, or a cache smaller than one chunk of images.
        """
        tmm = TmmNN(
            classifier,
            store,
            cache_bytes=cache_bytes,
            precision=precision,
            backbone=backbone,
            global_trigger=global_trigger,
        )
        cache = _cache(path, manifest, store) if path and manifest else None
        kept = MatrixCache(cache.folder, cache.content, budget or Budget()) if cache else None
        matrices = Matrices(store, kept)
        nearest = NearestSearch(
            store, factory=neighbours, effort=effort, cache=cache, matrices=matrices, precision=search_precision
        )
        searcher = Searcher(classifier, tmm, describer, vocabulary=vocabulary, nearest=nearest)
        return cls(classifier, store, vocabulary, searcher, _rows(store), global_trigger, manifest=manifest, path=path)

    @classmethod
    def open(cls, path: Path, opening: Opening, *, after: "Snapshot | None" = None) -> "Snapshot":
        """A version of an index on disk; see `Engine.open`.

        Args:
            path: Its folder.
            opening: How.
            after: In whose place it comes; what that one holds of features does not count against the bound.
        """
        parts = open_parts(path, opening)
        held = after.held if after else held_memory()
        opened = replace(cls._of_parts(path, parts, opening, held), held=held)
        if opening.ray is None:
            return opened
        from tmm_engine.cluster.searching import sharded_searcher

        return replace(opened, searcher=sharded_searcher(path, parts, opening, opening.ray, opened.searcher.tmm))

    @classmethod
    def _of_parts(cls, path: Path, parts: Parts, opening: Opening, held: int) -> "Snapshot":
        precision = opening.search_precision
        images, budget = opening.cache_bytes, Budget()
        if opening.memory is not None:
            images = min(images, opening.memory // 4)
            budget = Budget.beside(opening.memory, held=held, images=images)
        return cls.of(
            parts.classifier,
            parts.store,
            vocabulary=parts.manifest.vocabulary,
            neighbours=parts.manifest.neighbours if precision is None else precision.factory,
            effort=parts.manifest.effort if precision is None else Effort(),
            cache_bytes=images,
            budget=budget,
            search_precision=precision,
            precision=opening.precision,
            backbone=parts.backbone,
            global_trigger=parts.global_trigger,
            describer=parts.describer,
            manifest=parts.manifest,
            path=path,
        )

    def shares(self, other: "Snapshot") -> bool:
        """Whether some exemplars are in both because both are of one index, whatever filters have left of it."""
        if self.manifest is None or other.manifest is None:
            return self is other
        return self.manifest.content == other.manifest.content and not self.rows.keys().isdisjoint(other.rows)

    def matching(self, where: str) -> "Snapshot":
        """The exemplars alone for which a filter is true; its answers are those of an index of them.

        Raises:
            InputError: not a filter, or nothing matches it.
        """
        rows = matching_rows(self.store, where, self.vocabulary)
        if len(rows) == 0:
            raise InputError(f"no exemplar matches {shortened(where)}")
        store = Subset(self.store, rows)
        return replace(self, store=store, searcher=self.searcher.over(store), rows=_rows(store), where=where)

    def exemplar(self, id_: str) -> Query:
        """A stored exemplar as a query, by its id.

        Raises:
            InputError: no exemplar has it.
        """
        known = spelled([id_], self.rows).get(id_)
        if known is None:
            raise InputError(f"no exemplar has the id {id_!r}{nearest(id_, self.rows)}")
        row = self.rows[known]
        image = self.store.images(np.array([row]))[0]
        label = None if self.store.label_is_predicted[row] else int(self.store.labels[row])
        return Query(known, image.astype(np.float32) / 255.0, label)

    @property
    def cache(self) -> FaissCache:
        """Of an index on disk."""
        assert self.path is not None
        assert self.manifest is not None
        return _cache(self.path, self.manifest, self.store)

    def tuned(
        self, *, recall: float, k: int, factories: Sequence[str], sample: int, progress: Progress
    ) -> tuple[Tuned, NearestSearch]:
        """What `Engine.tune_neighbours` chooses, and the search that was measured."""
        check_wanted(recall=recall, k=k, sample=sample)
        mode = Mode.ROBUST if ROBUST_FEATURE in self.store.feature_columns else Mode.COSINE
        options = SearchOptions(mode=mode, k=k)
        clean, noisy = (
            self.searcher.compared(queries, options, Timings(len(queries)))
            for queries in sample_queries(self.store, sample)
        )
        exact = self.searcher.nearest.by(EXACT)
        tuner = Tuner(exact, Sample(clean, noisy), mode=str(mode), k=min(k, len(self.store)), progress=progress)
        return tuner.best(tuple(factories) or usual_factories(len(self.store)), recall=recall)

    def search(
        self, queries: list[Query], options: SearchOptions, progress: Progress, *, of: "Snapshot"
    ) -> list[SearchResult]:
        """An answer to every query; where a filter has narrowed this snapshot, each says so.

        Args:
            queries: Of the store's image shape.
            options: What is asked for.
            progress: Told of exemplars scored.
            of: The snapshot of all exemplars.
        """
        results = self.searcher.search(queries, options, progress)
        if options.where is None:
            return results
        found, everything = len(self.store), len(of.store)
        note = f"restricted to the {found:,} of {everything:,} exemplars that match {shortened(options.where)}"
        return [replace(result, exemplars=everything, notes=_noted(result, note)) for result in results]


def _noted(result: SearchResult, note: str) -> tuple[str, ...]:
    """Its notes with one more, before all but that of what was not seen."""
    first = 0 if result.complete else 1
    return (*result.notes[:first], note, *result.notes[first:])


def _cache(path: Path, manifest: Manifest, store: ExemplarStore) -> FaissCache:
    return FaissCache(path / CACHE, manifest.content, store.places if isinstance(store, LanceStore) else None)


def _rows(store: ExemplarStore) -> dict[str, int]:
    return {str(id_): row for row, id_ in enumerate(store.ids)}
