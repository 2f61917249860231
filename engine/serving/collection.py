"""A collection: an index under a name, as long as the server runs."""

import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tmm_engine.engine import Engine
from tmm_engine.index.descriptors.columns import ROBUST_FEATURE
from tmm_engine.index.errors import TmmEngineError, nearest
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.store.changes import ChangeReport, add_exemplars, delete_exemplars
from tmm_engine.index.store.manifest import MANIFEST, MODEL
from tmm_engine.info import describe_index
from tmm_engine.options import Mode
from tmm_engine.serving.lane import Lane, in_own_thread
from tmm_engine.serving.likeness import Likeness
from tmm_engine.serving.settings import Limits
from tmm_engine.serving.thumbnails import Thumbnails

PATIENCE = 30.0
"""Seconds after which an index that could not be opened is tried again."""


class UnknownCollectionError(TmmEngineError):
    """No collection is called so; the message suggests the nearest."""


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """One version of an index, open.

    Attributes:
        engine: At that version, where it stays.
        version: As the index numbers it.
        content: Digest of it.
        facts: What `engine info` says of it, but for where it is.
        modes: Those that it can be searched in; where the default is missing, it is not among them.
        metadata: Names of the columns that a filter may use beside id, label and predicted.
        rows: Of its exemplars, by id.
        thumbnails: Of its exemplars.
        likeness: Of its exemplars.
    """

    engine: Engine
    version: int
    content: str
    facts: dict[str, Any]
    modes: tuple[str, ...]
    metadata: tuple[str, ...]
    rows: dict[str, int]
    thumbnails: Thumbnails
    likeness: Likeness

    @classmethod
    def of(cls, engine: Engine) -> "Shown":
        """What an engine on an index on disk stands at, ready to be searched: FAISS has read the features."""
        manifest, store, path = engine.manifest, engine.store, engine.path
        assert manifest is not None
        assert path is not None
        about = describe_index(path, version=manifest.version)
        robust = ROBUST_FEATURE in store.feature_columns
        modes = tuple(str(mode) for mode in Mode if robust or mode is not Mode.ROBUST)
        engine.search(engine.exemplar(str(store.ids[0])), k=1, mode=Mode.ROBUST if robust else Mode.COSINE)
        return cls(
            engine,
            manifest.version,
            manifest.content,
            {name: value for name, value in about.items() if name != "index"},
            modes,
            tuple(store.metadata(np.array([0]))[0]),
            engine._snapshot.rows,
            Thumbnails(store),
            Likeness(store),
        )


class Collection:
    """An index that is searched in two lanes, so that what is quick does not wait for what is not, and changed in one.

    Args:
        name: In addresses.
        path: The index's folder.
        model: For an index whose model is the user's own code.
        device: As of `Engine.open`.
        limits: Of requests.

    Raises:
        TmmEngineError: as `Engine.open`.
    """

    def __init__(
        self, name: str, path: Path, *, model: str | None = None, device: str = "auto", limits: Limits | None = None
    ) -> None:
        self.name, self.path = name, path
        self._model, self._device, self._limits = model, device, limits
        self._opening, self._writing = threading.Lock(), threading.Lock()
        self._stamp: tuple[int, ...] = ()
        self.trouble: str | None = None
        """Why the newest version could not be opened."""
        self._tried = 0.0
        limits = limits or Limits()
        self.quick = Lane(f"{name}: quick", limit=limits.waiting, together=limits.batch)
        self.thorough = Lane(f"{name}: thorough", limit=limits.waiting, together=limits.batch)
        self.changes = Lane(f"{name}: changes", limit=limits.waiting, together=1)
        self.shown = self._opened()

    def classifier(self) -> Classifier:
        """The index's, loaded once more, for work that is not to meet the searches."""
        loaded = Classifier.load(self.path / MODEL, model=self._model)
        return loaded.to(self.shown.engine.classifier.device)

    def beside(self, name: str, path: Path) -> "Collection":
        """Another index with the same classifier, opened as this one."""
        return Collection(name, path, model=self._model, device=self._device, limits=self._limits)

    def add(self, source: ImageSource, *, replace: bool, progress: Progress = silent) -> ChangeReport:
        """Add images and show them; see `Engine.add`."""
        with self._writing:
            report = add_exemplars(
                self.path, source, self.shown.engine.classifier, replace_same=replace, progress=progress
            )
        return self._shown_after(report)

    def delete(self, ids: Sequence[str]) -> ChangeReport:
        """Remove exemplars, and show the index without them; see `Engine.delete`."""
        with self._writing:
            report = delete_exemplars(self.path, ids=ids)
        return self._shown_after(report)

    def refresh(self, version: int | None = None) -> bool:
        """Show the newest version, which is opened and made ready first; requests under way end on the one before.

        Args:
            version: Enough, where it is shown already.

        Returns:
            Whether there was a newer one.

        Raises:
            TmmEngineError: the index is gone, or damaged; the collection stays where it was.
        """
        with self._opening:
            if version is None and not (self.changed or self.trouble):
                return False
            if version is not None and version <= self.shown.version:
                return False
            try:
                newest = self._opened()
            except Exception as error:
                self.trouble, self._tried = str(error) or type(error).__name__, time.monotonic()
                raise
            self.trouble = None
            if (newest.version, newest.content) == (self.shown.version, self.shown.content):
                newest.engine.close()
                return False
            self.shown = newest
            return True

    @property
    def changed(self) -> bool:
        """Whether the index on disk is to be looked at: it is another one, or could not be opened a while ago."""
        again = self.trouble is not None and time.monotonic() - self._tried > PATIENCE
        return again or self._stamp != _stamp_of(self.path)

    def close(self) -> None:
        """Finish what was begun, and let go of the index."""
        for lane in (self.quick, self.thorough, self.changes):
            lane.close()
        self.shown.engine.close()

    def _shown_after(self, report: ChangeReport) -> ChangeReport:
        """The change is on disk, whether or not it can be shown now."""
        try:
            self.refresh(report.version)
        except TmmEngineError as error:
            said = f"the change is on disk, and not searched yet: {error}"
            return dataclasses.replace(report, remarks=(*report.remarks, said))
        return report

    def _opened(self) -> Shown:
        self._stamp = _stamp_of(self.path)
        return in_own_thread(lambda: Shown.of(Engine.open(self.path, model=self._model, device=self._device)))


class Collections(Mapping[str, Collection]):
    """All of a server, by name; others may come, none goes while it runs."""

    def __init__(self, collections: Iterable[Collection]) -> None:
        self._named = {each.name: each for each in collections}

    def add(self, collection: Collection) -> None:
        """One more, under a name that is free."""
        assert collection.name not in self._named
        self._named = {**self._named, collection.name: collection}  # whoever goes through the others is not disturbed

    def __getitem__(self, name: str) -> Collection:
        try:
            return self._named[name]
        except KeyError:
            known = ", ".join(self._named)
            raise UnknownCollectionError(
                f"no collection is called {name!r}{nearest(name, self._named)}; there are: {known}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._named

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def close(self) -> None:
        """Finish what was begun, and let go of all."""
        for collection in self.values():
            collection.close()


def _stamp_of(path: Path) -> tuple[int, ...]:
    """What changes with every change of an index."""
    try:
        found = (path / MANIFEST).stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ino, found.st_size
