"""`Engine`: a handle on an index, which it opens, searches and changes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np
import torch
from torch import nn

from tmm_engine.auditing.auditing import audit_snapshot, find_known
from tmm_engine.auditing.findings import Audit, Kind, Known
from tmm_engine.auditing.options import NEIGHBOURS, RATE, AuditOptions
from tmm_engine.auditing.others import Others
from tmm_engine.backends import Backend, compare_backends
from tmm_engine.classifying.calibrating import calibrate
from tmm_engine.classifying.calibration import Calibration, check_name
from tmm_engine.classifying.classification import Classification, Classifications
from tmm_engine.classifying.classifying import Doubt, classified
from tmm_engine.classifying.kept import KeptCalibrations
from tmm_engine.cluster.connection import RayOptions
from tmm_engine.describing import DEFAULT_VIEWS, describe
from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import ImageError, IndexStateError, InputError, member, printable
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.factories import EXACT, SearchPrecision
from tmm_engine.index.neighbours.graph import DEFAULT_MEMORY
from tmm_engine.index.neighbours.tuned import Tuned
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sizes import parse_size
from tmm_engine.index.sources.adapted import AdaptedSource
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.opening import SourceLike, as_source
from tmm_engine.index.store.changes import ChangeReport, add_exemplars, compact, delete_exemplars
from tmm_engine.index.store.embedding import BuildReport
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.index.store.manifest import Manifest
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.index.store.syncing import SyncReport, sync_index
from tmm_engine.index.store.target import locked
from tmm_engine.index.store.where import shortened
from tmm_engine.index.types import ImageLike
from tmm_engine.opening import Opening, open_parts
from tmm_engine.options import SearchKeywords, SearchOptions
from tmm_engine.query import Query, answered, as_query
from tmm_engine.relabelling import relabelled
from tmm_engine.rerank.backbone import Precision
from tmm_engine.rerank.exemplars import DEFAULT_CACHE_BYTES
from tmm_engine.rerank.settings import GlobalRecipe, TmmConfig
from tmm_engine.results import FailedQuery, SearchResult, SearchResults
from tmm_engine.snapshot import Snapshot
from tmm_engine.tuning import RECALL, SAMPLE
from tmm_engine.versions import Version, versions_of

if TYPE_CHECKING:
    import pyarrow


class Engine:
    """Searches one version of an index, and changes the index. Made by `Engine.open` or `Engine.from_arrays`::

        with Engine.open("idx") as engine:
            result = engine.search("query.png", k=10)

    What it shows stays as it is while others change the index; `refresh` moves on. After a change of its own it stands
    at the version that it made.

    Args:
        snapshot: What it shows.
        opening: How an index on disk was opened.

    Attributes:
        report: What `from_arrays` guessed and found; None for an index on disk.
    """

    def __init__(self, snapshot: Snapshot, *, opening: Opening | None = None) -> None:
        self._held: Snapshot | None = snapshot
        self._opening = opening
        self._last_filter: tuple[Snapshot, str, Snapshot] | None = None
        self._calibrations = KeptCalibrations()
        self.report: BuildReport | None = None

    @classmethod
    @checked
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
        memory: str | int | None = None,
        search_precision: str | None = None,
        ray: RayOptions | str | bool | None = None,
    ) -> "Engine":
        """Open an index made by `build_index` or `engine build-index`.

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
            memory: What the process may hold between searches, as in ``"2GiB"``: features beyond it are read from the
                disk, or the system's cache of it, with each search; images have at most a quarter of it. None: all
                stays that fits `cache_bytes`, and all features that were searched.
            search_precision: Of what is looked at for every exemplar: ``fp32`` is exact, ``fp16`` and ``int8`` read a
                half and a quarter, with the best scored again in fp32; each answer notes how far both agree.
                None: as the index was tuned or built to be searched.
            ray: Search with the machines of a Ray cluster, as `build_index` builds with them: exemplars in shards, one
                worker each, which hold the CPUs and GPUs until the engine is closed. Answers are those of one machine.

        Raises:
            InputError: a bound on memory with no room for one block of features, or beside Ray; a device or precision
                that this machine does not have, a cache smaller than one chunk of images, or no Ray at the address.
            IndexStateError: no index there, of another format version, or damaged.
            ModelError: the model cannot be rebuilt, or is not the one that the features were computed with.
        """
        if ray and memory is not None:
            raise InputError(
                "memory has no effect with ray, whose workers hold the features of their exemplars: leave it out, or "
                "use more workers"
            )
        opening = Opening(
            model=model,
            device=device,
            cache_bytes=cache_bytes,
            precision=member(Precision, precision),
            backend=member(Backend, backend),
            version=version,
            verify=verify,
            memory=None if memory is None else parse_size(memory),
            search_precision=None if search_precision is None else member(SearchPrecision, search_precision),
            ray=RayOptions.of(ray),
        )
        return cls(Snapshot.open(Path(path), opening), opening=opening)

    @classmethod
    @checked
    def from_arrays(
        cls,
        images: np.ndarray | torch.Tensor | Sequence[np.ndarray | torch.Tensor],
        labels: Sequence[int | str | None] | np.ndarray | torch.Tensor | None,
        classifier: Classifier,
        *,
        ids: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        metadata: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
        neighbours: str = EXACT,
        views: int = DEFAULT_VIEWS,
        recogniser: str | None = None,
        global_trigger: GlobalRecipe | TmmConfig | str | None = None,
        progress: Progress = silent,
    ) -> "Engine":
        """An index in memory, with the same methods.

        Args:
            images: (n, c, h, w), (n, h, w, c) or (n, h, w), or a list of n alike; uint8, or float in [0, 1].
            labels: Names, or numbers of the classes; None, or None among them: the model's predictions are used and
                marked.
            classifier: Computes the features.
            ids: Unique; default: positions.
            class_names: Of the labels that are numbers, in their order; default: the classifier's.
            metadata: Columns of n values.
            neighbours: FAISS factory string.
            views: As `build_index`, and so is the recogniser.
            recogniser: Of copies.
            global_trigger: As `build_index`.
            progress: Told of images done.

        Raises:
            InputError: shapes, lengths, labels or ids that do not fit.
        """
        source = ArraySource(images, labels, ids=ids, class_names=class_names, metadata=metadata)
        adapted = AdaptedSource.of_new_index(source, classifier.class_names, named=classifier.names_given)
        described = describe(
            source, classifier, views=views, recogniser=recogniser, global_trigger=global_trigger, progress=progress
        )
        report = BuildReport()
        store = MemoryStore.of(adapted, classifier, columns=described.columns, report=report, progress=progress)
        snapshot = Snapshot.of(
            classifier,
            store,
            vocabulary=adapted.labels.vocabulary,
            neighbours=neighbours,
            global_trigger=described.global_trigger,
            describer=described.describer,
        )
        engine = cls(snapshot)
        engine.report = report
        return engine

    def close(self) -> None:
        """Let go of exemplars and caches; nothing can be asked of a closed engine."""
        if self._held is not None:
            self._held.searcher.close()
        self._held, self._last_filter = None, None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.store)

    @property
    def classifier(self) -> Classifier:
        """The index's."""
        return self._snapshot.classifier

    @property
    def store(self) -> ExemplarStore:
        """The exemplars."""
        return self._snapshot.store

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the model's classes, in their order."""
        return self._snapshot.vocabulary.class_names

    @property
    def label_names(self) -> tuple[str, ...]:
        """Of all labels, by their number: the model's classes, and behind them labels that are none."""
        return self._snapshot.vocabulary.names

    @property
    def manifest(self) -> Manifest | None:
        """Of the version that is shown; None in memory."""
        return self._snapshot.manifest

    @property
    def path(self) -> Path | None:
        """The index's folder; None in memory."""
        return self._snapshot.path

    @property
    def backend(self) -> str:
        """What passes exemplars through the backbone: software, precision, device."""
        return self._snapshot.searcher.backend

    # -------------------------------------------------------------------------------------------- searching

    @overload
    def search(
        self,
        query: list[ImageLike | Query],
        options: SearchOptions | None = None,
        *,
        progress: Progress = silent,
        **keywords: Unpack[SearchKeywords],
    ) -> SearchResults[SearchResult]: ...
    @overload
    def search(
        self,
        query: ImageLike | Query,
        options: SearchOptions | None = None,
        *,
        progress: Progress = silent,
        **keywords: Unpack[SearchKeywords],
    ) -> SearchResult: ...
    def search(
        self,
        query: ImageLike | Query | list[ImageLike | Query],
        options: SearchOptions | None = None,
        *,
        progress: Progress = silent,
        **keywords: Unpack[SearchKeywords],
    ) -> SearchResult | SearchResults[SearchResult]:
        """The k exemplars that the model sees as most like the query::

            engine.search("query.png", k=5, mode="tmm", candidates=2000)

        Args:
            query: A path, a PIL image, an array (uint8, or float in [0, 1]), a `Query`; or a list of them, for a list
                of results.
            options: What is asked for; None: the defaults.
            progress: Told of exemplars scored.
            keywords: Instead of `options` or beside them, one by one: ``k``, ``mode``, ``candidates``, ``prefilter``,
                ``config``, ``label``, ``together``, ``stretch``, ``recognition``, ``where``, ``explain``, ``alone``, as
                `SearchOptions` describes them.

        Raises:
            InputError: an unreadable image, an unknown mode, or an option out of range or without effect; raised before
                any search begins.
        """
        asked = _asked(options, keywords)
        everything = self._snapshot  # `refresh` in another thread does not reach it
        current = everything if asked.where is None else self._filtered(everything, asked.where)
        items = query if isinstance(query, list) else [query]
        if not items:
            return SearchResults()
        queries = [_query(item, everything, position) for position, item in enumerate(items)]
        results = current.search(queries, asked, progress, of=everything)
        return SearchResults(results) if isinstance(query, list) else results[0]

    def search_each(
        self,
        queries: Sequence[ImageLike | Query],
        options: SearchOptions | None = None,
        *,
        progress: Progress = silent,
        **keywords: Unpack[SearchKeywords],
    ) -> SearchResults[SearchResult | FailedQuery]:
        """As `search` for a list, but for an image that cannot be searched with, what is wrong stands in its place.

        Raises:
            InputError: an unknown mode, or an option out of range or without effect.
        """
        if isinstance(queries, str | bytes) or not isinstance(queries, Sequence):
            raise InputError(f"expected a list of queries, got {type(queries).__name__}; put a query alone into a list")
        asked, snapshot = _asked(options, keywords), self._snapshot
        found: list[SearchResult | FailedQuery | Query] = []
        for position, item in enumerate(queries):
            try:
                found.append(_query(item, snapshot, position))
            except ImageError as error:
                found.append(
                    FailedQuery(printable(item) if isinstance(item, str | Path) else f"query {position}", str(error))
                )
        good = [item for item in found if isinstance(item, Query)]
        answers = iter(answered(good, lambda some: self.search([*some], asked, progress=progress)))
        return SearchResults(next(answers) if isinstance(item, Query) else item for item in found)

    @checked
    def matching(self, where: str) -> "Engine":
        """An engine over those exemplars alone for which a filter is true; its answers are those of an index of them.

        L2 and cosine are exact there, whatever the index's FAISS factory string. The last filter's is kept.

        Args:
            where: SQL over id, label, predicted class and metadata, as in ``label = 'cat' AND page > 10``.

        Raises:
            InputError: not such a filter, or nothing matches it.
        """
        return Engine(self._filtered(self._snapshot, where), opening=self._opening)

    @checked
    def exemplar(self, id_: str) -> Query:
        """A stored exemplar as a query, by its id.

        Raises:
            InputError: no exemplar has it.
        """
        return self._snapshot.exemplar(id_)

    @checked
    def to_arrow(self, *, columns: Sequence[str] = ()) -> "pyarrow.Table":
        """A table with a row per exemplar: id, label, predicted class, metadata, and what else is asked for.

        Args:
            columns: ``image``, ``feature``, and what other features the index has (`ExemplarStore.feature_columns`):
                lists of numbers, as they are stored.

        Raises:
            InputError: the index has no such column.
        """
        from tmm_engine.views.table import exemplars_table

        return exemplars_table(self.store, self.label_names, columns=columns)

    # -------------------------------------------------------------------------------------------- auditing

    @checked
    def audit(
        self,
        *,
        kinds: Sequence[str] | str = tuple(Kind),
        k: int = NEIGHBOURS,
        rate: float = RATE,
        against: "Engine | None" = None,
        sources: str | None = None,
        where: str | None = None,
        memory: int = DEFAULT_MEMORY,
        progress: Progress = silent,
    ) -> Audit:
        """What is wrong with the exemplars: copies, leaks, wrong labels, foreign images, images the model is unsure of.

        What cannot be looked for, as labels where there are none, is left out, and the answer's notes say why.

        Args:
            kinds: What to look for: ``duplicates``, ``leaks``, ``labels``, ``foreign``, ``unsure``.
            k: Neighbours that have a vote.
            rate: The share of false findings that is accepted among all findings, above 0, below 1.
            against: Another index of which no image should be in this one.
            sources: A column of metadata whose values tell sources apart, of which no image should be in two.
            where: Only exemplars that match, as `SearchOptions.where`.
            memory: Bytes that comparing may take.
            progress: Told of what is done.

        Raises:
            InputError: an option out of range, a column that is not there, or too little memory.
        """
        options = AuditOptions(kinds=kinds, k=k, rate=rate, sources=sources, memory=memory)
        snapshot = self._snapshot if where is None else self._filtered(self._snapshot, where)
        if against is not None and against._snapshot.shares(snapshot):
            raise InputError(
                "against: expected another index, got this one, whose images are in both; copies within an index are "
                "duplicates"
            )
        others = None if against is None else Others.of_index(against._snapshot, snapshot)
        return audit_snapshot(snapshot, options, others=others, progress=progress)

    @checked
    def copies_of(
        self, images: Sequence[ImageLike | Query], *, memory: int = DEFAULT_MEMORY, progress: Progress = silent
    ) -> list[Known]:
        """Whether images are among the exemplars, also resized, recompressed, slightly cropped, turned or darkened.

        Args:
            images: A list of what `search` takes.
            memory: Bytes that comparing may take.
            progress: Told of what is done.

        Raises:
            InputError: an image that cannot be read, or fewer than 3 exemplars.
        """
        if isinstance(images, str | bytes):
            raise InputError("images: expected a list of images, got one; put it into a list")
        snapshot = self._snapshot
        queries = [_query(item, snapshot, position) for position, item in enumerate(images)]
        return find_known(snapshot, Others.of_queries(queries, snapshot), memory=memory, progress=progress)

    # -------------------------------------------------------------------------------------------- classifying

    @overload
    def classify(
        self,
        query: list[ImageLike | Query],
        options: SearchOptions | None = None,
        *,
        alpha: float = 0.05,
        outliers: float = 0.01,
        calibration: Calibration | str | None = None,
        progress: Progress = silent,
        **keywords: Unpack[SearchKeywords],
    ) -> Classifications: ...
    @overload
    def classify(
        self,
        query: ImageLike | Query,
        options: SearchOptions | None = None,
        *,
        alpha: float = 0.05,
        outliers: float = 0.01,
        calibration: Calibration | str | None = None,
        progress: Progress = silent,
        **keywords: Unpack[SearchKeywords],
    ) -> Classification: ...
    def classify(
        self,
        query: ImageLike | Query | list[ImageLike | Query],
        options: SearchOptions | None = None,
        *,
        alpha: float = 0.05,
        outliers: float = 0.01,
        calibration: Calibration | str | None = None,
        progress: Progress = silent,
        **keywords: Unpack[SearchKeywords],
    ) -> Classification | Classifications:
        """The class that the neighbours say, how far to trust it, and when not to::

            engine.calibrate("held-out/")
            answer = engine.classify("query.png", alpha=0.05)
            print(answer.class_name, answer.credibility, answer.prediction_set, answer.abstains)

        Args:
            query: As for `search`; a list of them for a list of answers.
            options: As for `search`; ``k`` is also how many exemplars of each class are looked at.
            alpha: How often the set of classes may miss the right one, in (0, 1).
            outliers: What share of calibration images may be as far from everything as what is called an outlier, in
                [0, 1).
            calibration: What `calibrate` returned, or the name of one that is kept; ``leave-one-out``: the index's own
                exemplars. None: the one named as the mode where there is one, else ``leave-one-out``.
            progress: Told of exemplars scored.
            keywords: As for `search`.

        Raises:
            InputError: as `search`; alpha or outliers out of range; no such calibration, or one of other options or of
                an index that has changed; mode ``tmm`` without a calibration.
            IndexStateError: the calibration is damaged.
        """
        doubt, asked = Doubt(alpha=alpha, outliers=outliers), _asked(options, keywords)
        everything = self._snapshot
        current = everything if asked.where is None else self._filtered(everything, asked.where)
        items = query if isinstance(query, list) else [query]
        queries = [_query(item, everything, position) for position, item in enumerate(items)]
        if not queries:
            return Classifications()
        known = self._calibrations.asked_for(calibration, asked, everything)
        answers = current.searcher.search_ranked(queries, asked, progress, whole=True)
        known = known or self._calibrations.of_itself(current, asked, everything)
        found = classified(current, answers, known, doubt, k=asked.k)
        return found if isinstance(query, list) else found[0]

    @checked
    def calibrate(
        self,
        source: SourceLike,
        options: SearchOptions | None = None,
        *,
        name: str | None = None,
        progress: Progress = silent,
        **keywords: Unpack[SearchKeywords],
    ) -> Calibration:
        """Learn from labelled images what `classify` may promise, and keep it in the index under a name.

        It serves searches with the same options over the same exemplars; after a change of the index it is to be made
        again.

        Args:
            source: Images that neither the index nor the training of the model has seen, as `add` takes them.
            options: How `classify` will be asked.
            name: Default: the mode's.
            progress: Told of images done.
            keywords: Instead of the options or beside them.

        Raises:
            InputError: no labels, or none that the index has; an image is in the index; a name that no file can have.
            IndexStateError: the index's folder cannot be written to.
        """
        asked = _asked(options, keywords)
        name = check_name(str(asked.mode) if name is None else name)
        snapshot = self._snapshot
        current = snapshot if asked.where is None else self._filtered(snapshot, asked.where)
        made = calibrate(current, as_source(source), asked, name=name, progress=progress)
        self._calibrations.keep(made, snapshot)
        return made

    # -------------------------------------------------------------------------------------------- changing

    @checked
    def add(
        self,
        source: SourceLike,
        *,
        replace: bool = False,
        strict: bool = False,
        id_prefix: str = "",
        progress: Progress = silent,
    ) -> ChangeReport:
        """Add a source's images, with their features; see `index.store.changes.add_exemplars`.

        Args:
            source: As `index.open_source` makes it, or what that takes: a folder, a file, a data set's name.
            replace: Images whose id is there take the old one's place; without it they are refused.
            strict: Fail at the first image that cannot be read instead of skipping it.
            id_prefix: Put before the source's ids.
            progress: Told of images done.
        """
        report = add_exemplars(
            self._changeable(),
            as_source(source),
            self.classifier,
            replace_same=replace,
            strict=strict,
            id_prefix=id_prefix,
            progress=progress,
        )
        self.refresh()
        return report

    @checked
    def sync(
        self,
        source: SourceLike,
        *,
        delete: bool = False,
        dry_run: bool = False,
        strict: bool = False,
        id_prefix: str = "",
        progress: Progress = silent,
    ) -> SyncReport:
        """Bring the index to what a source is now: only what is new or changed passes the model; see
        `index.store.syncing.sync_index`.

        Args:
            source: As for `add`.
            delete: Remove exemplars that the source has no image of.
            dry_run: Say what would happen, and change nothing.
            strict: Fail at the first image that cannot be read instead of leaving it as it was.
            id_prefix: Put before the source's ids; exemplars of other ids are left alone.
            progress: Told of images looked at.
        """
        report = sync_index(
            self._changeable(),
            as_source(source),
            self.classifier,
            delete=delete,
            dry_run=dry_run,
            strict=strict,
            id_prefix=id_prefix,
            progress=progress,
        )
        if not dry_run:
            self.refresh()
        return report

    @checked
    def delete(self, *, ids: Sequence[str] = (), where: str | None = None) -> ChangeReport:
        """Remove exemplars by id, or those that a filter matches; see `index.store.changes.delete_exemplars`."""
        report = delete_exemplars(self._changeable(), ids=ids, where=where)
        self.refresh()
        return report

    @checked
    def relabel(self, labels: Mapping[str, str], *, progress: Progress = silent) -> ChangeReport:
        """Give exemplars other labels, as the next version; names that are new become labels of the index.

        Nothing passes the network: features stay as they are stored.

        Args:
            labels: Names by id.
            progress: Told of exemplars looked at.

        Raises:
            InputError: no exemplar has one of the ids, or as `sync`.
        """
        done = self.sync(relabelled(self.store, self._snapshot.rows, labels), progress=progress)
        return ChangeReport(
            done.version, done.exemplars, replaced=done.replaced, remarks=done.remarks, agreement=done.agreement
        )

    @checked
    def compact(self, *, discard_versions: bool = False) -> ChangeReport:
        """Write the exemplars anew, without deleted ones and in few files; see `index.store.changes.compact`."""
        report = compact(self._changeable(), discard_versions=discard_versions)
        self.refresh()
        return report

    def versions(self) -> list[Version]:
        """Every version that can be opened, oldest first.

        Raises:
            InputError: the index is in memory only.
        """
        return versions_of(self._on_disk()[0])

    def refresh(self) -> bool:
        """Move on to the newest version, all at once: a search that is under way in another thread ends on the old one.

        With Ray it does not: its workers make place for those of the newest version.

        Returns:
            Whether there was a newer one.

        Raises:
            InputError: the index is in memory only.
            IndexStateError: it is gone, or damaged; the engine stays where it was. Or Ray has no workers for it: then
                the engine answers nothing any more.
        """
        path, opening = self._on_disk()
        newest, shown = Manifest.read(path), self.manifest
        assert shown is not None
        if (newest.version, newest.content) == (shown.version, shown.content):
            return False
        newest_opening, before = replace(opening, version=None), self._snapshot
        if opening.ray is not None:
            open_parts(path, newest_opening)  # what is damaged is refused while there are workers
            before.searcher.close()  # they hold what the next ones need
        self._held, self._opening = Snapshot.open(path, newest_opening, after=before), newest_opening
        self._last_filter = None
        return True

    def compare_backends(self) -> dict[str, float]:
        """Time PyTorch and ONNX Runtime on this index, and note the images a second for ``backend="auto"``.

        Raises:
            InputError: the index is in memory only, or the 'onnx' extra is not installed.
        """
        path, _ = self._on_disk("has no place for ONNX graphs")
        speeds = compare_backends(path, self.classifier, self.store).images_per_second
        with locked(path):
            replace(Manifest.read(path), backend_speeds=speeds).write(path)
        return speeds

    @checked
    def tune_neighbours(
        self,
        *,
        recall: float = RECALL,
        k: int = 10,
        factories: Sequence[str] = (),
        sample: int = SAMPLE,
        progress: Progress = silent,
    ) -> Tuned:
        """Choose FAISS's factory string and parameters by measurement on this index, and store them in it.

        Exemplars are searched for, as they are and changed (`tuning`), in the mode ``robust`` where the index has
        descriptors, else ``cosine``; what was chosen then serves every mode. Exact search is chosen where nothing
        faster finds as much.

        Args:
            recall: The share of the exact answer that is to be found, above 0 and up to 1.
            k: Of how many neighbours.
            factories: FAISS factory strings to try; default: those that suit so many exemplars.
            sample: How many exemplars are searched for.
            progress: Told of what has been tried.

        Raises:
            InputError: the index is in memory only, or in workers of Ray's; a recall, k or sample out of range; or a
                factory string that FAISS does not know or cannot train with so few exemplars.
            IndexStateError: it was changed meanwhile, or cannot be written.
        """
        path = self._changeable()
        if self._opening is not None and self._opening.ray is not None:
            raise InputError("expected an engine without Ray to tune; those with Ray then search as it was tuned")
        snapshot, shown = self._snapshot, self.manifest
        assert shown is not None
        tuned, search = snapshot.tuned(recall=recall, k=k, factories=factories, sample=sample, progress=progress)
        try:
            with locked(path):
                newest = Manifest.read(path)
                if newest.content != shown.content:
                    raise IndexStateError(f"{path} was changed meanwhile: open it again and tune it then")
                replace(newest, neighbours=tuned.factory, tuned=tuned).write(path)
        except OSError as error:
            raise IndexStateError(f"{path} cannot be written: {error.strerror or error}; nothing was changed") from None
        search.keep(snapshot.cache)
        self._held = Snapshot.open(path, self._opening or Opening(), after=snapshot)
        self._last_filter = None
        return tuned

    # -------------------------------------------------------------------------------------------- inside

    @property
    def _snapshot(self) -> Snapshot:
        if self._held is None:
            raise InputError("this engine is closed; open the index again")
        return self._held

    def _filtered(self, snapshot: Snapshot, where: str) -> Snapshot:
        """What a filter leaves of a snapshot; the last one's is kept."""
        kept = self._last_filter
        if kept is None or kept[0] is not snapshot or kept[1] != where:
            self._last_filter = kept = (snapshot, where, snapshot.matching(where))
        return kept[2]

    def _on_disk(self, why: str = "has one version and stays as it is") -> tuple[Path, Opening]:
        snapshot = self._snapshot
        if snapshot.where is not None:
            raise InputError(
                f"this engine shows what {shortened(snapshot.where)} leaves of an index: change or refresh the one "
                f"that it came from"
            )
        if self.path is None or self._opening is None:
            raise InputError(f"an index in memory {why}; build one on disk")
        return self.path, self._opening

    def _changeable(self) -> Path:
        path, opening = self._on_disk()
        if opening.version is not None:
            raise InputError(
                f"{path} was opened at version {opening.version}, which stays as it is; open it without one"
            )
        return path


def _asked(options: SearchOptions | None, keywords: SearchKeywords) -> SearchOptions:
    if options is None:
        return SearchOptions(**keywords)
    if not isinstance(options, SearchOptions):
        raise InputError(
            f"options: expected SearchOptions, got {type(options).__name__}; name an option, as in mode=…, k=…"
        )
    return replace(options, **keywords)


def _query(item: ImageLike | Query, snapshot: Snapshot, position: int) -> Query:
    return as_query(item, shape=snapshot.classifier.target, name=f"query {position}")
