"""What a worker must have in common with who sends it work: the code, and the packages that decide about bits."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from tmm_engine.index.errors import IndexStateError

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pylance", "faiss-cpu")


@dataclass(frozen=True, slots=True)
class Identity:
    """Of a process.

    Attributes:
        versions: By name; of tmm-engine with a digest of its code, which tells apart what has one number.
    """

    versions: dict[str, str]

    @classmethod
    def own(cls) -> "Identity":
        """This process's."""
        return cls({"tmm-engine": _code()} | {name: version(name) for name in PACKAGES})

    def check(self, other: "Identity", where: str) -> None:
        """Refuse a worker that is another.

        Args:
            other: The worker's.
            where: Its machine.

        Raises:
            IndexStateError: naming what differs.
        """
        wrong = [
            f"{name} {other.versions.get(name, 'missing')} instead of {expected}"
            for name, expected in self.versions.items()
            if other.versions.get(name) != expected
        ]
        if wrong:
            raise IndexStateError(
                f"a Ray worker on {where} has {', '.join(wrong)}: what it computes would not match; install the same "
                f"versions on all machines. Nothing was changed"
            )


@cache
def _code() -> str:
    """Our version, with a digest of all of our files but the benchmarks."""
    digest, engine = hashlib.blake2b(digest_size=6), _folder("tmm_engine")
    for room in ("tmm_engine", "tmm_engine.index", "tmm_engine.rerank"):
        folder = _folder(room)
        others = {engine / name for name in ("index", "rerank", "bench")} - {folder}  # installed, they lie in engine
        for file in sorted(folder.rglob("*.py")):
            if others.isdisjoint(file.parents):
                digest.update(f"{room}/{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return f"{version('tmm-engine')} (code {digest.hexdigest()})"


def _folder(package: str) -> Path:
    return Path(str(import_module(package).__file__)).resolve().parent
