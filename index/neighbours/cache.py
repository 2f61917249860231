"""What is dear to compute over an index's exemplars, kept as files that can always be rebuilt.

A file that is not exactly what was written, for exactly this content, is ignored.
"""

import contextlib
import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import faiss
import numpy as np

from tmm_engine.index.files import replacing


@dataclass(frozen=True, slots=True)
class KeptFiles:
    """Files of one kind and of one version of an index; beside each lies what says of which.

    Attributes:
        folder: Where they are; made when it is needed.
        content: A digest of the exemplars that they are made of.
    """

    folder: Path
    content: str

    suffix: ClassVar[str]
    """Of their names."""

    @abstractmethod
    def count(self, content: bytes) -> int:
        """Of how many exemplars a file is.

        Raises:
            ValueError: it is damaged.
            RuntimeError: the same.
        """

    def check(self, exemplars: int) -> list[Path]:
        """The files that are damaged, or not of so many exemplars; those of other versions are whole if they say so."""
        files = sorted(self.folder.glob(f"*{self.suffix}"))
        return [path for path in files if not self._is_whole(path, exemplars)]

    def _is_whole(self, path: Path, exemplars: int) -> bool:
        try:
            about = json.loads(_about(path).read_text(encoding="utf-8"))
            content = path.read_bytes()
            if about["content"] != self.content:
                return bool(about["sha256"] == hashlib.sha256(content).hexdigest())
            return about == self._describe(about["name"], content) and self.count(content) == exemplars
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            return False

    def read(self, name: str) -> bytes | None:
        """What was written under this name; None if nothing was, or it is of other content, or damaged."""
        path = self._path(name)
        try:
            about = json.loads(_about(path).read_text(encoding="utf-8"))
            content = path.read_bytes()  # once: another process may replace the file
            return content if about == self._describe(name, content) else None
        except (OSError, ValueError):
            return None

    def write(self, name: str, writer: Callable[[Path], None]) -> None:
        """Keep what the writer writes; where it cannot be written, the next process computes it anew."""
        path = self._path(name)
        with contextlib.suppress(OSError, RuntimeError):
            self.folder.mkdir(exist_ok=True)
            with replacing(_about(path)) as about, replacing(path) as written:
                writer(written)
                about.write_text(json.dumps(self._describe(name, written.read_bytes())), encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.folder / (re.sub(r"\W+", "-", name) + self.suffix)

    def _describe(self, name: str, content: bytes) -> dict[str, str]:
        return {"name": name, "content": self.content, "sha256": hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True, slots=True)
class FaissCache(KeptFiles):
    """FAISS indexes that are dear to build."""

    suffix = ".faiss"

    def load(self, name: str) -> faiss.Index | None:
        """The index saved under this name; None if there is none, or it is of other content, or damaged."""
        content = self.read(name)
        with contextlib.suppress(RuntimeError):
            return None if content is None else faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
        return None

    def save(self, name: str, index: faiss.Index) -> None:
        """Keep an index."""
        self.write(name, lambda path: faiss.write_index(index, str(path)))

    def count(self, content: bytes) -> int:
        """Of how many exemplars a file is."""
        return int(faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8)).ntotal)


def _about(path: Path) -> Path:
    return path.with_name(path.name + ".json")
