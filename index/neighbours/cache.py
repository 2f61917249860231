"""FAISS indexes that are dear to build, kept as files that can always be rebuilt.

A file that is not exactly what was written, for exactly this content, is ignored.
"""

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from tmm_engine.index.files import replacing


@dataclass(frozen=True, slots=True)
class FaissCache:
    """Files of one version of an index.

    Attributes:
        folder: Where they are; made when it is needed.
        content: A digest of the exemplars that they are made of.
    """

    folder: Path
    content: str

    def load(self, name: str) -> faiss.Index | None:
        """The index saved under this name; None if there is none, or it is of other content, or damaged."""
        return self._read(self._path(name), name)

    def check(self, exemplars: int) -> list[Path]:
        """The files that are damaged, or not of so many exemplars; those of other versions are whole if they say so."""
        return [path for path in sorted(self.folder.glob("*.faiss")) if not self._is_whole(path, exemplars)]

    def _is_whole(self, path: Path, exemplars: int) -> bool:
        try:
            about = json.loads(_about(path).read_text(encoding="utf-8"))
            if about["content"] != self.content:
                return bool(about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest())
            index = self._read(path, about["name"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return index is not None and index.ntotal == exemplars

    def _read(self, path: Path, name: str) -> faiss.Index | None:
        try:
            about = json.loads(_about(path).read_text(encoding="utf-8"))
            content = path.read_bytes()  # once: another process may replace the file
            if about == self._describe(name, content):
                return faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
        except (OSError, ValueError, RuntimeError):
            pass
        return None

    def save(self, name: str, index: faiss.Index) -> None:
        """Keep an index; where it cannot be written, the next process builds it anew."""
        path = self._path(name)
        with contextlib.suppress(OSError, RuntimeError):
            self.folder.mkdir(exist_ok=True)
            with replacing(_about(path)) as about, replacing(path) as written:
                faiss.write_index(index, str(written))
                about.write_text(json.dumps(self._describe(name, written.read_bytes())), encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.folder / (re.sub(r"\W+", "-", name) + ".faiss")

    def _describe(self, name: str, content: bytes) -> dict[str, str]:
        return {"name": name, "content": self.content, "sha256": hashlib.sha256(content).hexdigest()}


def _about(path: Path) -> Path:
    return path.with_name(path.name + ".json")
