"""Is an index what was written, and do its features belong to its images? What is wrong, and what repairs it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from torch import nn

import tmm_engine.index.descriptors.columns
import tmm_engine.rerank.columns  # noqa: F401 - both make columns known
from tmm_engine.backends import damaged_graphs
from tmm_engine.classifying.kept import OwnCalibrations
from tmm_engine.index.arguments import checked
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.columns import is_registered, load_columns
from tmm_engine.index.errors import IndexStateError, InputError, ModelError, TmmEngineError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.graph import GraphCache
from tmm_engine.index.neighbours.matrix import MatrixCache
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.changes import rebuild_features
from tmm_engine.index.store.commit import leftovers, remove_leftovers
from tmm_engine.index.store.lance_store import LanceStore, lance_errors
from tmm_engine.index.store.manifest import (
    CACHE,
    DATA,
    EXEMPLARS,
    MODEL,
    VERSIONS,
    Manifest,
    older_versions,
    wrong_content,
)
from tmm_engine.index.store.target import locked, recover

SAMPLE = 256  # exemplars whose features are computed again
TOLERANCE = 1e-3  # of the largest feature; other batches and devices stay two orders of magnitude below
RESTORE = "restore it from a copy, or build the index again"
REPAIR = "engine repair"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with an index.

    Attributes:
        what: In words, with the file or the exemplars.
        remedy: What repairs it.
        harmless: True for what no answer can depend on: caches, older versions, what killed writers left.
    """

    what: str
    remedy: str
    harmless: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"what": self.what, "remedy": self.remedy, "harmless": self.harmless}


@dataclass(slots=True)
class Verification:
    """What was looked at, and what was found.

    Attributes:
        files: How many files were compared with their SHA-256.
        exemplars: How many were read, their ids, labels, images and metadata compared with their digests.
        recomputed: How many had their features computed again.
        findings: What is wrong.
        notes: What could not be looked at.
    """

    files: int = 0
    exemplars: int = 0
    recomputed: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every answer of the index is what it was when it was written."""
        return all(finding.harmless for finding in self.findings)

    def found(self, what: str, remedy: str, *, harmless: bool = False) -> None:
        """Note something."""
        self.findings.append(Finding(what, remedy, harmless))


@checked
def verify_index(
    index: str | Path, *, model: nn.Module | str | None = None, sample: int = SAMPLE, progress: Progress = silent
) -> Verification:
    """Compare every file with its SHA-256; then rows, ids and features with each other; then the caches.

    No library parses a file before its digest is known to be right.

    Args:
        index: Its folder.
        model: For an index whose model is code of yours, as for `Engine.open`.
        sample: How many exemplars' features are computed again.
        progress: Told of files, then of exemplars.

    Raises:
        IndexStateError: no index there.
        InputError: a sample below 0.
    """
    index = Path(index)
    if sample < 0:
        raise InputError(f"sample: expected 0 or more exemplars, got {sample}")
    recover(index)
    done = Verification()
    if not index.exists() or not any(index.glob("*.json")):
        Manifest.read(index)
    try:
        manifest = Manifest.read(index)
    except IndexStateError as error:
        done.found(str(error), RESTORE)
        return done
    damaged = _check_files(index, manifest, done, progress)
    if not damaged.intersection(manifest.files):
        store = _check_rows(index, manifest, done, progress)
        if store is not None:
            _check_features(index, manifest, store, done, model=model, sample=sample)
    for path in _damaged_caches(index, manifest, done):
        done.found(f"{path} is damaged; searches ignore it", REPAIR, harmless=True)
    return done


@checked
def repair_index(index: str | Path, *, model: nn.Module | str | None = None, progress: Progress = silent) -> list[str]:
    """Rebuild what can be rebuilt: caches, and features from images; remove what killed writers left.

    Images, labels, ids and metadata are never changed; what is wrong with them is an error that says so.

    Returns:
        What was done, in words.

    Raises:
        IndexStateError: damage that nothing here can rebuild.
        ModelError: the model is needed and not given.
    """
    index = Path(index)
    found = verify_index(index, model=model, progress=progress)
    manifest = Manifest.read(index)
    beyond = [finding for finding in found.findings if not finding.harmless and finding.remedy != REPAIR]
    if beyond:
        raise IndexStateError(f"{beyond[0].what}; {beyond[0].remedy}. Nothing was changed")
    done = []
    with locked(index):
        for number in older_versions(index):
            path = index / VERSIONS / f"{number}.json"
            if number < manifest.version and not _readable(index, number):
                path.unlink()
                done.append(f"forgot version {number}, of which nothing was known any more")
        before = set(index.rglob("*"))
        remove_leftovers(index, manifest)
        done += [f"removed {path}, left over" for path in sorted(before - set(index.rglob("*")))]
        for path in _damaged_caches(index, manifest, found):
            path.unlink(missing_ok=True)
            done.append(f"removed {path}; the next search that needs it builds it anew")
    if not found.sound:
        report = rebuild_features(index, _classifier(index, manifest, model), progress=progress)
        done.append(
            f"computed the features of {report.exemplars:,} exemplars from their images: version {report.version}"
        )
    return done


def _check_files(index: Path, newest: Manifest, done: Verification, progress: Progress) -> set[str]:
    """Every file of every version; returns those that are not what was written."""
    manifests, all_known = [newest], True
    for number in older_versions(index):
        if number < newest.version:
            try:
                manifests.append(Manifest.read(index, version=number))
            except IndexStateError as error:
                all_known = False
                done.found(f"version {number} cannot be opened: {error}", REPAIR, harmless=True)
    expected = {name: digest for manifest in reversed(manifests) for name, digest in manifest.files.items()}
    damaged: set[str] = set()
    for name, digest in expected.items():
        done.files += 1
        progress("comparing files", done.files, len(expected))
        if (wrong := wrong_content(index / name, digest)) is None:
            continue
        damaged.add(name)
        if name not in newest.files:
            remedy = f"engine compact --discard-versions, after which {index} has no older versions"
            done.found(f"{wrong} (only older versions need it)", remedy, harmless=True)
        else:
            done.found(wrong, REPAIR if name.startswith(DATA) and (index / name).exists() else RESTORE)
    if all_known:
        for path in leftovers(index, set(expected)):
            done.found(f"{path} belongs to no version: a writer was killed", REPAIR, harmless=True)
    return damaged


def _check_rows(index: Path, manifest: Manifest, done: Verification, progress: Progress) -> LanceStore | None:
    """How many rows, whose ids, which labels, and every row's digest."""
    path = index / EXEMPLARS
    try:
        store = LanceStore(
            path,
            image_shape=manifest.image_shape,
            columns=manifest.columns,
            version=manifest.lance_version,
        )
        manifest.check_exemplars(index, len(store), store.files)
        with lance_errors(f"{path}: cannot be read", RESTORE):
            for rows, wrong in store.check_digests(forward_batch_size(manifest.image_shape), manifest.vocabulary):
                done.exemplars += rows
                progress("comparing exemplars", done.exemplars, len(store))
                for id_ in wrong:
                    done.found(
                        f"exemplar {id_!r} is not what was written", f"engine delete --id {id_!r}, and add it again"
                    )
    except IndexStateError as error:
        done.found(str(error), RESTORE)
        return None
    if len(set(store.ids)) != len(store):
        done.found(f"{len(store) - len(set(store.ids))} ids are there more than once", RESTORE)
    names = len(manifest.vocabulary.names)
    if not (store.labels.min() >= 0 and store.labels.max() < names):
        done.found(f"labels are outside 0 to {names - 1}", RESTORE)
    return store


def _check_features(
    index: Path,
    manifest: Manifest,
    store: LanceStore,
    done: Verification,
    *,
    model: nn.Module | str | None,
    sample: int,
) -> None:
    """The features of a random sample against those computed from its images now."""
    known = [name for name in manifest.columns if is_registered(name)]
    try:
        columns = load_columns(index, known, _classifier(index, manifest, model))
    except IndexStateError as error:
        done.found(str(error), RESTORE)
        return
    except ModelError as error:
        if manifest.model.is_user_code and model is None:
            done.notes.append(f"features were not computed again: {error}")
        else:
            done.found(str(error), RESTORE)
        return
    if unknown := manifest.columns.keys() - known:
        done.notes.append(f"not computed again, because this program does not know how: {', '.join(sorted(unknown))}")
    rows = np.sort(np.random.default_rng(0).choice(len(store), min(sample, len(store)), replace=False))
    for part in _parts(rows, forward_batch_size(manifest.image_shape)):
        images = store.images(part).copy()
        for column in columns:
            for row in np.flatnonzero(_differ(store.features(part, column=column.name), column.compute(images))):
                what = f"the column {column.name!r} of exemplar {store.ids[part[row]]!r} is not what its image gives"
                done.found(what, REPAIR)
    done.recomputed = len(rows)


def _differ(stored: Float32[np.ndarray, "n d"], now: Float32[np.ndarray, "n d"]) -> np.ndarray:
    """Which rows are more than rounding apart."""
    scale = float(np.abs(now).max())
    return ~(np.abs(stored.astype(np.float64) - now).max(axis=1) <= TOLERANCE * scale)


def _parts(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _damaged_caches(index: Path, manifest: Manifest, done: Verification) -> list[Path]:
    """Caches that are not what was written; notes what could not be looked at."""
    kinds = (FaissCache, GraphCache, MatrixCache, OwnCalibrations)
    damaged = [path for kind in kinds for path in kind(index / CACHE, manifest.content).check(manifest.exemplars)]
    try:
        return damaged + damaged_graphs(index)
    except InputError as error:
        done.notes.append(f"the ONNX graphs in {index / CACHE} were not looked at: {error}")
        return damaged


def _classifier(index: Path, manifest: Manifest, model: nn.Module | str | None) -> Classifier:
    loaded = Classifier.load(index / MODEL, model=model)
    classifier = loaded.known_as(manifest.fingerprint)
    if classifier is None:
        raise ModelError(
            f"{index} was built with the model {manifest.fingerprint[:12]}…, this one is {loaded.fingerprint[:12]}…"
        )
    return classifier


def _readable(index: Path, version: int) -> bool:
    try:
        Manifest.read(index, version=version)
    except TmmEngineError:
        return False
    return True
