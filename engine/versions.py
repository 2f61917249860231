"""The versions of an index on disk."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tmm_engine.index.arguments import checked
from tmm_engine.index.store.manifest import Manifest, older_versions


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


@checked
def versions_of(index: str | Path) -> list[Version]:
    """Every version of an index that can be opened, oldest first.

    Raises:
        IndexStateError: no index there, or damaged.
    """
    index = Path(index)
    newest = Manifest.read(index)
    older = [Manifest.read(index, version=number) for number in older_versions(index) if number < newest.version]
    return [Version(each.version, each.created, each.exemplars, each.change) for each in (*older, newest)]
