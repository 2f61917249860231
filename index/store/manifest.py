"""`index.json`: what an index is, which version of its exemplars counts, and the digest of every file.

Replacing it is the commit. Before that a copy of it is kept in `versions/`, so that older versions can be opened.
Both hold a SHA-256 of their own content.
"""

import hashlib
import json
import os
import re
from collections.abc import Set
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from beartype.door import is_bearable

from tmm_engine.index.agreement import Agreement
from tmm_engine.index.columns import FEATURE, is_column_name
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.files import TEMPORARY, replacing
from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.limits import MAX_MANIFEST_BYTES
from tmm_engine.index.models.architectures import ModelSpec
from tmm_engine.index.neighbours.factories import EXACT, Effort
from tmm_engine.index.neighbours.tuned import Tuned
from tmm_engine.index.store.format_2 import FORMAT_2, from_format_2
from tmm_engine.index.types import ImageShape

FORMAT = "tmm-engine index"
FORMAT_VERSION = 4
FORMATS_READ = (FORMAT_2, 3, FORMAT_VERSION)
MANIFEST = "index.json"
MODEL = "model.safetensors"
EXEMPLARS = "exemplars.lance"
VERSIONS = "versions"  # what `index.json` was before: `1.json`, `2.json`, …
CACHE = "cache"  # deletable at any time, so not in the digests
SEAL = ("format", "format_version", "sha256")
DATA = f"{EXEMPLARS}/data/"
VERSIONS_OF_LANCE = "_versions"
LATEST_HINT = "latest_version_hint.json"  # Lance rewrites it with every commit; no version needs it


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file's size in bytes and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `index.json`.

    Attributes:
        version: 1 when built, one more with every change.
        change: What made this version, in words.
        created: When this version was made, ISO 8601, UTC.
        source: What the index was built from.
        exemplars: How many there are.
        skipped: How many images could not be read, in all.
        image_shape: (c, h, w) of every stored image.
        columns: The dimension of every column of features, by name.
        class_names: Of the model's classes, in their order.
        other_labels: Names of labels that are no class of the model's, in the order of their numbers; before format 4
            there are none.
        labels_predicted: True if a source had no labels, and the model's predictions stand in.
        agreement: Of predictions and labels; None where predictions were not stored, as before format 4.
        model: How to rebuild the classifier's architecture.
        fingerprint: SHA-256 of the classifier: weights, architecture, preprocessing, head.
        neighbours: FAISS factory string.
        tuned: How thoroughly it is searched, where that was measured.
        backend_speeds: Images a second of each backend, where they were compared when the index was built.
        lance_version: The version of the exemplars that counts, as Lance numbers them.
        files: Digest of every file that this version needs but this one, by path relative to the index.
    """

    version: int
    change: str
    created: str
    source: str
    exemplars: int
    skipped: int
    image_shape: ImageShape
    columns: dict[str, int]
    class_names: tuple[str, ...]
    labels_predicted: bool
    model: ModelSpec
    fingerprint: str
    neighbours: str
    backend_speeds: dict[str, float]
    lance_version: int
    files: dict[str, FileDigest]
    other_labels: tuple[str, ...] = ()
    agreement: Agreement | None = None
    tuned: Tuned | None = None

    @property
    def effort(self) -> Effort:
        """How thoroughly an approximate index is searched."""
        return Effort() if self.tuned is None or self.neighbours == EXACT else self.tuned.effort

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the labels."""
        return Vocabulary(self.class_names, self.other_labels)

    @property
    def feature_dim(self) -> int:
        """d of φ(x)."""
        return self.columns[FEATURE]

    @property
    def content(self) -> str:
        """SHA-256 over the digests of all files: the same for the same exemplars and model."""
        listed = sorted((name, digest.sha256) for name, digest in self.files.items())
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def write(self, index: Path) -> None:
        """Replace `index.json` atomically; for good when this returns."""
        self._write(index / MANIFEST)

    def keep(self, index: Path) -> None:
        """Put a copy among the older versions, so that `index.json` can be replaced."""
        (index / VERSIONS).mkdir(exist_ok=True)
        self._write(index / VERSIONS / f"{self.version}.json")

    def _write(self, path: Path) -> None:
        with replacing(path, durable=True) as written:
            written.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """JSON, with the SHA-256 of its content."""
        content = asdict(self) | {"model": self.model.to_json()}
        if self.tuned is None:  # as programs write it that know nothing of tuning
            del content["tuned"]
        return json.dumps(sealed(content), indent=1, ensure_ascii=False)

    @classmethod
    def read(cls, index: Path, *, version: int | None = None) -> "Manifest":
        """The manifest of an index.

        Args:
            index: Its folder.
            version: An older one; None is the newest.

        Raises:
            IndexStateError: no index there, no such version, another format, or a file that is damaged.
        """
        newest = cls._read(index / MANIFEST)
        if version in (None, newest.version):
            return newest
        assert version is not None
        older = index / VERSIONS / f"{version}.json"
        if not older.is_file() or not 0 < version < newest.version:
            first = min(older_versions(index), default=newest.version)
            raise IndexStateError(
                f"{index} has the versions {first} to {newest.version}, not {version}; open one of these"
            )
        manifest = cls._read(older)
        if manifest.version != version:
            raise IndexStateError(f"{older}: damaged: it says version {manifest.version}; `repair_index` forgets it")
        return manifest

    @classmethod
    def _read(cls, path: Path) -> "Manifest":
        index = path.parent
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise IndexStateError(
                    f"{path}: larger than {MAX_MANIFEST_BYTES >> 20} MiB; not an index of this program"
                )
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            if re.match("https?:/", str(index)):
                raise IndexStateError(
                    f"{index} is the address of a server, which `Client` and a search over HTTP take; give the "
                    f"folder of an index"
                ) from None
            what = "is not an index: it has no index.json" if index.exists() else "does not exist"
            raise IndexStateError(f"{index} {what}; make one with `build_index`") from None
        except OSError as error:
            raise IndexStateError(
                f"{path}: cannot be read: {error.strerror}; check the path and its permissions"
            ) from error
        except (ValueError, RecursionError) as error:
            raise IndexStateError(f"{path}: damaged: not JSON ({error}); restore it or build the index again") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise IndexStateError(f"{path}: not an index of this program (expected 'format': {FORMAT!r})")
        version = content.get("format_version")
        if version not in FORMATS_READ:
            raise IndexStateError(
                f"{index}: index format version {version!r}, this program reads {FORMAT_2} to {FORMAT_VERSION}; "
                f"build the index again with this version of tmm-engine"
            )
        if content != sealed(content, version=version):
            raise IndexStateError(
                f"{path}: damaged: its content is not what its 'sha256' says; restore it or build the index again"
            )
        return cls._parse(content, path)

    @classmethod
    def _parse(cls, content: dict[str, Any], path: Path) -> "Manifest":
        given = {key: value for key, value in content.items() if key not in SEAL}
        try:
            if content["format_version"] == FORMAT_2:
                given = from_format_2(given)
            if content["format_version"] < FORMAT_VERSION:
                given = {"other_labels": [], "agreement": None} | given
            tuned = given.get("tuned")
            channels, height, width = (int(side) for side in given["image_shape"])
            manifest = cls(
                **given
                | {
                    "image_shape": (channels, height, width),
                    "class_names": _names(given["class_names"]),
                    "other_labels": _names(given["other_labels"]),
                    "agreement": None if given["agreement"] is None else Agreement.from_json(given["agreement"]),
                    "tuned": None if tuned is None else Tuned.from_json(tuned),
                    "model": ModelSpec.from_json(given["model"]),
                    "files": {
                        name: FileDigest(int(d["bytes"]), str(d["sha256"])) for name, d in given["files"].items()
                    },
                }
            )
            for field in fields(cls):
                if not is_bearable(getattr(manifest, field.name), field.type):  # type: ignore[arg-type]
                    raise ValueError(f"{field.name!r} must be {field.type}")
            counts = (
                manifest.version,
                manifest.exemplars,
                manifest.lance_version,
                *manifest.columns.values(),
                channels,
                height,
                width,
            )
            if FEATURE not in manifest.columns or not all(map(is_column_name, manifest.columns)):
                raise ValueError(f"expected columns of features, {FEATURE!r} among them, got {[*manifest.columns]}")
            if not all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts):
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
            if found := wrong_size(index / name, digest):
                raise IndexStateError(f"{found}: the index is damaged; restore it or build it again")

    def check_digests(self, index: Path, *, exemplars: bool = False) -> None:
        """Compare the content of files with what was written.

        Args:
            index: Its folder.
            exemplars: Of the exemplars' data too, which takes as long as reading all of it.

        Raises:
            IndexStateError: naming the first file that differs.
        """
        for name, digest in self.files.items():
            if (exemplars or not name.startswith(DATA)) and (found := wrong_content(index / name, digest)):
                raise IndexStateError(f"{found}: the index is damaged; `verify_index` says more")

    def check_exemplars(self, index: Path, exemplars: int, files: Set[str]) -> None:
        """Compare the exemplars that were opened with what is said of them here: they may have been replaced between.

        Args:
            index: Its folder.
            exemplars: How many there are.
            files: That hold them, relative to their folder.

        Raises:
            IndexStateError: they are others.
        """
        if exemplars != self.exemplars or not self.files.keys() >= {f"{EXEMPLARS}/{name}" for name in files}:
            raise IndexStateError(
                f"{index}: expected {self.exemplars:,} exemplars, got {exemplars:,}, or in other files: it was "
                f"replaced meanwhile, or is damaged; open it again"
            )


def _names(content: Any) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"expected a list of names, got {content!r}")
    return tuple(content)


def older_versions(index: Path) -> list[int]:
    """The numbers of the older versions that are kept, ascending."""
    return sorted(int(path.stem) for path in (index / VERSIONS).glob("*.json") if path.stem.isdecimal())


def wrong_size(path: Path, expected: FileDigest) -> str | None:
    """What is wrong with a file's size; None if nothing is."""
    try:
        found = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):  # as of a name that is too long, or has a NUL in it
        found = None
    if found == expected.bytes:
        return None
    state = "is missing" if found is None else f"has {found:,} bytes"
    return f"{path} {state}, expected {expected.bytes:,} bytes"


def wrong_content(path: Path, expected: FileDigest) -> str | None:
    """What is wrong with a file; None if nothing is."""
    if found := wrong_size(path, expected):
        return found
    try:
        same = sha256_of(path) == expected.sha256
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if same else f"{path} is not what was written: its SHA-256 is another"


def sealed(content: dict[str, Any], *, version: int = FORMAT_VERSION) -> dict[str, Any]:
    """The content as it stands in a file: with what identifies the format, and the SHA-256 of all the rest."""
    content = {key: value for key, value in content.items() if key not in SEAL}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return dict(zip(SEAL, (FORMAT, version, hashlib.sha256(canonical).hexdigest()), strict=True)) | content


def digest_files(index: Path) -> dict[str, FileDigest]:
    """Size and SHA-256 of every file of an index but `index.json`, older versions of it, temporaries and caches."""
    return {name: digest_of(index / name) for name in data_files(index)}


def data_files(index: Path) -> list[str]:
    """The files that `digest_files` digests, as paths relative to the index."""
    whole = (path for path in index.glob("*") if path.name != MANIFEST and not path.name.startswith(TEMPORARY))
    exemplars = (path for path in (index / EXEMPLARS).rglob("*") if path.name != LATEST_HINT)
    files = (path for path in (*sorted(whole), *sorted(exemplars)) if path.is_file())
    return [path.relative_to(index).as_posix() for path in files]


def digest_of(path: Path) -> FileDigest:
    """A file's size and digest, after seeing to it that it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileDigest(path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
