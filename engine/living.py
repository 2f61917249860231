"""The life of an index, as `Engine` offers it: versions, additions, deletions, compaction."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmm_engine.index.errors import InputError
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.changes import ChangeReport, add_exemplars, compact, delete_exemplars
from tmm_engine.index.store.manifest import Manifest, older_versions
from tmm_engine.rerank.global_trigger import GlobalColumn, GlobalTrigger

if TYPE_CHECKING:
    from tmm_engine.index.models.classifier import Classifier
    from tmm_engine.index.sources.records import ImageSource


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an index.

    Attributes:
        version: Its number: 1 when built, one more with every change.
        created: When it was made, ISO 8601, UTC.
        exemplars: How many it holds.
        change: What made it, in words.
    """

    version: int
    created: str
    exemplars: int
    change: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def versions_of(index: Path) -> list[Version]:
    """Every version of an index that can be opened, oldest first.

    Raises:
        IndexStateError: no index there, or damaged.
    """
    newest = Manifest.read(index)
    older = [Manifest.read(index, version=number) for number in older_versions(index) if number < newest.version]
    return [Version(each.version, each.created, each.exemplars, each.change) for each in (*older, newest)]


class Living:
    """What `Engine` can do to an index on disk. After a change it stands at the version that it made."""

    path: Path | None
    manifest: Manifest | None
    classifier: "Classifier"
    _global_trigger: GlobalTrigger | None
    _options: dict[str, Any]

    def add(
        self,
        source: "ImageSource",
        *,
        replace: bool = False,
        strict: bool = False,
        id_prefix: str = "",
        progress: Progress = silent,
    ) -> ChangeReport:
        """Add a source's images, with their features; see `index.store.changes.add_exemplars`.

        Args:
            source: As `index.open_source` makes it.
            replace: Images whose id is there take the old one's place; without it they are refused.
            strict: Fail at the first image that cannot be read instead of skipping it.
            id_prefix: Put before the source's ids.
            progress: Told of images done.
        """
        column = None if self._global_trigger is None else GlobalColumn(self._global_trigger, self.classifier)
        report = add_exemplars(
            self._changeable(),
            source,
            self.classifier,
            replace_same=replace,
            strict=strict,
            id_prefix=id_prefix,
            global_column=column,
            progress=progress,
        )
        self.refresh()
        return report

    def delete(self, *, ids: Sequence[str] = (), where: str | None = None) -> ChangeReport:
        """Remove exemplars by id, or those that a filter matches; see `index.store.changes.delete_exemplars`."""
        report = delete_exemplars(self._changeable(), ids=ids, where=where)
        self.refresh()
        return report

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
        return versions_of(self._on_disk())

    def refresh(self) -> bool:
        """Move on to the newest version, all at once: a search that is under way in another thread ends on the old one.

        Returns:
            Whether there was a newer one.

        Raises:
            InputError: the index is in memory only.
            IndexStateError: it is gone, or damaged; the engine stays where it was.
        """
        path, newest = self._on_disk(), Manifest.read(self._on_disk())
        assert self.manifest is not None
        if (newest.version, newest.content) == (self.manifest.version, self.manifest.content):
            return False
        fresh = type(self).open(path, **self._options | {"version": None})  # type: ignore[attr-defined]
        self.__dict__.update(fresh.__dict__)  # one step under the interpreter's lock
        return True

    def _on_disk(self) -> Path:
        if self.path is None:
            raise InputError("an index in memory has one version and stays as it is; build one on disk")
        return self.path

    def _changeable(self) -> Path:
        path = self._on_disk()
        if self._options["version"] is not None:
            raise InputError(
                f"{path} was opened at version {self._options['version']}, which stays as it is; open it without one"
            )
        return path
