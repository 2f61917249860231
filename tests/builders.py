"""Tiny builds for the tests of the index on disk, in this process and in processes that are killed or confined."""

import itertools
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.conftest import CLASSES, SHAPE, classifier_of, network
from tmm_engine.index import batches
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.records import ImageRecord
from tmm_engine.index.store import lance_store
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.embedding import BuildReport
from tmm_engine.index.store.lance_store import LanceStore
from tmm_engine.index.store.manifest import EXEMPLARS, Manifest, digest_files
from tmm_engine.index.types import ImageShape

ROOT = Path(__file__).parents[1]
COUNT = 96


def tiny_classifier(seed: int = 0) -> Classifier:
    """The network of conftest, 4 classes, (3, 8, 8) images, d = 12."""
    return classifier_of(network(seed=seed))


def tiny_arrays(seed: int, n: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, 3, 8, 8) and n labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *SHAPE), dtype=np.uint8), rng.integers(0, CLASSES, n)


def tiny_build(target: Path, seed: int = 0, **options: Any) -> BuildReport:
    """Build an index that tells its seed."""
    images, labels = tiny_arrays(seed)
    source = ArraySource(images, labels, name=f"seed {seed}", metadata={"seed": [seed] * len(images)})
    return write_index(source, target, tiny_classifier(seed), **options)


def reference_features(classifier: Classifier, images: np.ndarray) -> np.ndarray:
    """φ, image by image."""
    with torch.inference_mode():
        return np.concatenate([classifier.features(torch.tensor(image[None]) / 255.0).numpy() for image in images])


def opened(target: Path) -> tuple[Manifest, LanceStore]:
    """Manifest and exemplars of an index, as `Engine.open` reads them."""
    manifest = Manifest.read(target)
    manifest.check_sizes(target)
    store = LanceStore(
        target / EXEMPLARS,
        image_shape=manifest.image_shape,
        columns=manifest.columns,
        version=manifest.lance_version,
    )
    return manifest, store


def seed_of(target: Path) -> int:
    """The seed of the `tiny_build` that made an index, after checking all of its content."""
    manifest, store = opened(target)
    seed = int(manifest.source.removeprefix("seed "))
    assert manifest.files == digest_files(target)
    images, labels = tiny_arrays(seed)
    rows = np.arange(len(images))
    classifier = Classifier.load(target / "model.safetensors", model=network())
    assert classifier.fingerprint == manifest.fingerprint == tiny_classifier(seed).fingerprint
    np.testing.assert_array_equal(store.images(rows), images)
    np.testing.assert_array_equal(store.labels, labels)
    np.testing.assert_allclose(store.features(rows), reference_features(classifier, images), rtol=1e-4, atol=1e-5)
    assert store.metadata(rows) == [{"seed": seed}] * len(images)
    return seed


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def beside(target: Path) -> set[str]:
    """What lies in the target's folder, without the target and its lock."""
    return {path.name for path in target.parent.iterdir()} - {target.name, f".{target.name}.lock"}


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Run Python code that finds this module's names and its arguments in `sys.argv`; it has said "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from tests.builders import *\nready()\n{code}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finished(process: subprocess.Popen[str]) -> str:
    """What a process still says, and how it ends: it must end well."""
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.close()
        said = process.stdout.read()  # not communicate(), which does not know what readline() has read ahead
    assert process.returncode == 0
    return said


def ready() -> None:
    """Tell `start` that all is imported; small batches and fragments make a build a matter of many steps."""
    batches.MAX_IMAGES, lance_store.FRAGMENT_BYTES = 16, 4096
    print("ready", flush=True)  # noqa: T201


def say(text: object) -> None:
    """Answer the process that started this one."""
    print(text, flush=True)  # noqa: T201


def build_until_killed(target: Path) -> None:
    """Build with seeds 1, 2, 3, … over and over."""
    for seed in itertools.count(1):
        tiny_build(target, seed, overwrite=True)


def die_before(target: Path, event: str, number: int) -> None:
    """From now on: die by SIGKILL just before the file system operation of that number (an audit event) in an index."""
    events = itertools.count(1)
    inside = (str(target), str(target.parent / f".{target.name}"))

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if name == event else "/"
        # A name without a folder comes from rmtree, which works from within the folder.
        if (path.startswith(inside) or "/" not in path) and next(events) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def build_and_die(target: Path, event: str, number: int) -> None:
    """Build with seed 1 and die just before the file system operation of that number."""
    die_before(target, event, number)
    tiny_build(target, 1, overwrite=True)
    say(f"survived {event}")


def build_confined(target: Path, *limits: int) -> None:
    """Build with seed 1 where no file can grow beyond so many bytes, and say how each attempt ends."""
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            tiny_build(target, 1, overwrite=True)
            say(f"fits into {limit}")
        except IndexStateError as error:
            say(error)


class EndlessSource:
    """As many (3, 32, 32) images as wanted, made when they are read."""

    name = "endless"
    class_names = None
    labelled = False
    metadata_types: dict[str, type] = {"number": int}  # noqa: RUF012

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def natural_shape(self) -> ImageShape:
        """(3, 32, 32)."""
        return (3, 32, 32)

    def read(self, shape: ImageShape) -> Iterator[ImageRecord]:
        """Images of one colour each."""
        for number in range(self._n):
            yield ImageRecord(f"{number:08d}", np.full(shape, number % 251, np.uint8), None, {"number": number})
