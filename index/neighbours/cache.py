"""What is dear to compute over an index's exemplars, kept as files that can always be rebuilt.

A file that is not exactly what was written is ignored, and so is one of other content; but a FAISS index that was made
of another version serves those of its rows that are still there (`index.neighbours.places`): the caller searches the
others beside it.
"""

import contextlib
import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import faiss
import numpy as np
from jaxtyping import Int64

from tmm_engine.index.files import replacing
from tmm_engine.index.neighbours.places import Places

_untyped: Any = faiss  # whose stubs know nothing of callbacks


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
    def count(self, file: BinaryIO) -> int:
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
            name = json.loads(_about(path).read_text(encoding="utf-8"))["name"]
            with self.opened(name) as found:
                if self._path(name) != path or found is None:
                    return False
                about, file = found
                return about["content"] != self.content or self.count(file) == exemplars
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            return False

    def read(self, name: str) -> bytes | None:
        """What was written under this name; None if nothing was, or it is of other content, or damaged."""
        with self.opened(name) as found, contextlib.suppress(OSError):
            return found[1].read() if found is not None and found[0]["content"] == self.content else None
        return None

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[dict[str, Any], BinaryIO] | None]:
        """What is said of a file, of whatever content, and the file; None if nothing was written, or it is damaged.

        Another process may replace the file: what is read then is the one that was checked.
        """
        path = self._path(name)
        with contextlib.ExitStack() as stack:
            found = None
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                about = json.loads(_about(path).read_text(encoding="utf-8"))
                file = stack.enter_context(path.open("rb"))
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                if about["name"] == name and about["sha256"] == digest and about["content"]:
                    found = about, file
            yield found

    def write(self, name: str, writer: Callable[[Path], None], **more: Any) -> None:
        """Keep what the writer writes; where it cannot be written, the next process computes it anew.

        Args:
            name: Under which it is read.
            writer: Writes the file.
            more: What else is said of it.
        """
        path = self._path(name)
        with contextlib.suppress(OSError, RuntimeError):
            self.folder.mkdir(exist_ok=True)
            with replacing(_about(path)) as about, replacing(path) as written:
                writer(written)
                with written.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                described = {"name": name, "content": self.content, "sha256": digest}
                about.write_text(json.dumps(described | more), encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.folder / (re.sub(r"\W+", "-", name) + self.suffix)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A FAISS index out of the cache.

    Attributes:
        index: As it was saved.
        rows: For each of its vectors the row of the store, −1 where that is gone; None: they are the store's rows.
    """

    index: faiss.Index
    rows: Int64[np.ndarray, "n"] | None = None


@dataclass(frozen=True, slots=True)
class FaissCache(KeptFiles):
    """FAISS indexes that are dear to build.

    Attributes:
        folder: As of all kept files.
        content: The same.
        places: Of the version's rows; without it, nothing of another version is used.
    """

    places: Callable[[], Places] | None = None

    suffix = ".faiss"

    def load(self, name: str) -> Kept | None:
        """The index saved under this name; None if there is none, it is damaged, or has no row of this version."""
        with self.opened(name) as found:
            if found is None:
                return None
            about, file = found
            try:
                index = _index(file)
                if about["content"] == self.content:
                    return Kept(index)
                if self.places is None or "runs" not in about:
                    return None
                runs = [(str(each), int(start), int(stop)) for each, start, stop in about["runs"]]
            except (OSError, RuntimeError, TypeError, ValueError):
                return None
        if sum(max(0, stop - start) for _, start, stop in runs) != index.ntotal:
            return None
        rows = self.places().rows_of(runs)
        return Kept(index, rows) if (rows >= 0).any() else None

    def save(self, name: str, index: faiss.Index) -> None:
        """Keep an index of all rows."""
        runs = {} if self.places is None else {"runs": self.places().runs()}
        self.write(name, lambda path: faiss.write_index(index, str(path)), **runs)

    def count(self, file: BinaryIO) -> int:
        """Of how many exemplars a file is."""
        return int(_index(file).ntotal)


def _index(file: BinaryIO) -> faiss.Index:
    """Read in parts, so that nothing is held twice."""
    return _untyped.read_index(_untyped.PyCallbackIOReader(file.read))


def _about(path: Path) -> Path:
    return path.with_name(path.name + ".json")
