"""FAISS indexes that are dear to build, kept as files that can always be rebuilt.

A file that is not exactly what was written, for exactly this content, is ignored.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import faiss


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
        path = self._path(name)
        try:
            about = json.loads(_about(path).read_text(encoding="utf-8"))
            if about == self._describe(name, path):
                return faiss.read_index(str(path))
        except (OSError, ValueError, RuntimeError):
            pass
        return None

    def save(self, name: str, index: faiss.Index) -> None:
        """Keep an index; where it cannot be written, the next process builds it anew."""
        path = self._path(name)
        with contextlib.suppress(OSError, RuntimeError):
            self.folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".faiss-") as temporary:
                written = Path(temporary) / path.name
                faiss.write_index(index, str(written))
                _about(written).write_text(json.dumps(self._describe(name, written)), encoding="utf-8")
                written.replace(path)
                _about(written).replace(_about(path))

    def _path(self, name: str) -> Path:
        return self.folder / (re.sub(r"\W+", "-", name) + ".faiss")

    def _describe(self, name: str, path: Path) -> dict[str, str]:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": name, "content": self.content, "sha256": sha256}


def _about(path: Path) -> Path:
    return path.with_name(path.name + ".json")
