"""`index.json`: what an index is, which version of its exemplars counts, and the digest of every file.

Writing it is the commit.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from beartype.door import is_bearable

from index.architectures import ModelSpec
from index.errors import IndexStateError
from index.images import Shape

FORMAT = "tmm-engine index"
FORMAT_VERSION = 1
MANIFEST = "index.json"
MODEL = "model.safetensors"
EXEMPLARS = "exemplars.lance"
GLOBAL_TRIGGER = "global_trigger.safetensors"
CACHE = "cache"  # deletable at any time, so not in the digests
MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file's size in bytes and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `index.json`.

    Attributes:
        created: When it was built, ISO 8601, UTC.
        source: What the exemplars were read from.
        exemplars: How many there are.
        skipped: How many images of the source could not be read.
        image_shape: (c, h, w) of every stored image.
        feature_dim: d.
        class_names: In label order.
        labels_predicted: True if the source had no labels and the model's predictions stand in.
        model: How to rebuild the classifier's architecture.
        fingerprint: SHA-256 of the classifier: weights, architecture, preprocessing, head.
        neighbours: FAISS factory string.
        global_trigger: Whether there are a global trigger and its column of features.
        backend_speeds: Images a second of each backend, where they were compared when the index was built.
        lance_version: The version of the exemplars that counts.
        files: Digest of every file but this one and the caches, by path relative to the index.
    """

    created: str
    source: str
    exemplars: int
    skipped: int
    image_shape: Shape
    feature_dim: int
    class_names: tuple[str, ...]
    labels_predicted: bool
    model: ModelSpec
    fingerprint: str
    neighbours: str
    global_trigger: bool
    backend_speeds: dict[str, float]
    lance_version: int
    files: dict[str, FileDigest]

    @property
    def content(self) -> str:
        """SHA-256 over the digests of all files: the same for the same exemplars and model."""
        listed = sorted((name, digest.sha256) for name, digest in self.files.items())
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def write(self, index: Path) -> None:
        """Replace `index.json` atomically."""
        content = asdict(self) | {"model": self.model.to_json()}
        text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION} | content, indent=1, ensure_ascii=False)
        with tempfile.NamedTemporaryFile("w", dir=index, prefix=".index-", delete=False, encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        Path(file.name).replace(index / MANIFEST)

    @classmethod
    def read(cls, index: Path) -> "Manifest":
        """The manifest of an index.

        Raises:
            IndexStateError: no index there, another format or version, or an `index.json` that is damaged.
        """
        path = index / MANIFEST
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise IndexStateError(
                    f"{path}: larger than {MAX_MANIFEST_BYTES >> 20} MiB; not an index of this program"
                )
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            what = "is not an index: it has no index.json" if index.exists() else "does not exist"
            raise IndexStateError(f"{index} {what}; make one with `engine build-index SOURCE {index}`") from None
        except OSError as error:
            raise IndexStateError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise IndexStateError(f"{path}: damaged: not JSON ({error}); restore it or build the index again") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise IndexStateError(f"{path}: not an index of this program (expected 'format': {FORMAT!r})")
        if content.get("format_version") != FORMAT_VERSION:
            raise IndexStateError(
                f"{index}: index format version {content.get('format_version')!r}, this program reads "
                f"{FORMAT_VERSION}; "
                f"build the index again with this version of tmm-engine"
            )
        return cls._parse(content, path)

    @classmethod
    def _parse(cls, content: dict[str, Any], path: Path) -> "Manifest":
        given = {key: value for key, value in content.items() if key not in ("format", "format_version")}
        try:
            channels, height, width = (int(side) for side in given["image_shape"])
            manifest = cls(
                **given
                | {
                    "image_shape": (channels, height, width),
                    "class_names": tuple(str(name) for name in given["class_names"]),
                    "model": ModelSpec.from_json(given["model"]),
                    "files": {
                        name: FileDigest(int(d["bytes"]), str(d["sha256"])) for name, d in given["files"].items()
                    },
                }
            )
            for field in fields(cls):
                if not is_bearable(getattr(manifest, field.name), field.type):  # type: ignore[arg-type]
                    raise ValueError(f"{field.name!r} must be {field.type}")
            counts = (manifest.exemplars, manifest.feature_dim, manifest.lance_version, channels, height, width)
            if not all(isinstance(count, int) and count > 0 for count in counts):
                raise ValueError("counts must be positive whole numbers")
            if min([manifest.skipped, *(digest.bytes for digest in manifest.files.values())]) < 0:
                raise ValueError("counts and sizes must not be negative")
            if len(manifest.class_names) != manifest.model.num_classes:
                raise ValueError(f"{len(manifest.class_names)} class names for {manifest.model.num_classes} classes")
            for name in manifest.files:
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise ValueError(f"{name!r} is not a path inside the index")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise IndexStateError(
                f"{path}: damaged: {type(error).__name__}: {error}; restore it or build the index again"
            ) from None
        return manifest

    def check_sizes(self, index: Path) -> None:
        """Compare the size of every file with what was written: cheap, and finds what is missing or cut short.

        Raises:
            IndexStateError: naming the first file that differs.
        """
        for name, digest in self.files.items():
            path = index / name
            try:
                found = path.stat().st_size if path.is_file() else None
            except OSError:  # as of a name that is too long
                found = None
            if found != digest.bytes:
                state = "is missing" if found is None else f"has {found:,} bytes"
                raise IndexStateError(
                    f"{path} {state}, expected {digest.bytes:,} bytes: the index is damaged; restore it or "
                    f"build it again"
                )


def digest_files(index: Path) -> dict[str, FileDigest]:
    """Size and SHA-256 of every file of an index but `index.json`, its temporaries and the caches."""
    return {path.relative_to(index).as_posix(): _digest(path) for path in _data_files(index)}


def _data_files(index: Path) -> Iterator[Path]:
    yield from filter(Path.is_file, (index / MODEL, index / GLOBAL_TRIGGER))
    yield from sorted(path for path in (index / EXEMPLARS).rglob("*") if path.is_file())


def _digest(path: Path) -> FileDigest:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return FileDigest(path.stat().st_size, sha256)
