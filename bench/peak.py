"""Peak memory of one job in a process of its own, beyond what the process held before it: ``python -m bench.peak``."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import nn

from tmm_engine.bench.machine import memory_mib, peak_memory_mib, reset_peak_memory
from tmm_engine.bench.photographs import write_photographs
from tmm_engine.building import build_index
from tmm_engine.engine import Engine
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.models.preprocessing import Target, shape_of
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.index.sources.records import ImageRecord
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.manifest import Manifest
from tmm_engine.index.types import ImageShape

SHAPE: ImageShape = (1, 28, 28)
PHOTOGRAPH_SHAPE: ImageShape = (3, 224, 224)


def peak_of_search(index: Path) -> float:
    """MiB that an exact search of an index takes beyond the idle process with the model loaded; images are cached."""
    return _in_child("search", str(index))


def peak_of_build(exemplars: int) -> float:
    """MiB that building an index of so many random images takes, with a ResNet-18 of random weights."""
    return _in_child("build", str(exemplars))


def peak_of_photographs(count: int) -> float:
    """MiB that building an index of so many JPEG photographs takes, with a small network, so that decoding leads."""
    return _in_child("photographs", str(count))


class RandomImages:
    """A source that holds nothing: so many random images, made one by one."""

    name = "random images"
    class_names: tuple[str, ...] | None = None
    labelled = True
    metadata_types: Mapping[str, type] = {}

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def natural_shape(self) -> ImageShape:
        """As MNIST's."""
        return SHAPE

    def read(self, shape: Target) -> Iterator[ImageRecord]:
        """All images, the same in every run."""
        generator = np.random.default_rng(0)
        for number in range(self.count):
            yield ImageRecord(
                f"{number:08d}", generator.integers(0, 256, shape_of(shape), dtype=np.uint8), number % 10, {}
            )


def _in_child(*arguments: str) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "tmm_engine.bench.peak", *arguments], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout))


def _search(index: Path) -> float:
    spec = Manifest.read(index).model  # of an index that this run has built: its code may be imported
    engine = Engine.open(index, device="cpu", model=spec.architecture if spec.is_user_code else None)
    query = engine.exemplar(str(engine.store.ids[0]))
    before = _idle()
    engine.search(query, k=10, config="paper")
    return peak_memory_mib() - before


def _build(exemplars: int) -> float:
    classifier = Classifier.from_architecture("resnet18", image_shape=SHAPE, seed=0, num_classes=10)
    with tempfile.TemporaryDirectory() as folder:
        before = _idle()
        write_index(RandomImages(exemplars), Path(folder) / "random.idx", classifier)
        return peak_memory_mib() - before


def _photographs(count: int) -> float:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10)
    )
    classifier = Classifier.from_module(network, image_shape=PHOTOGRAPH_SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        source = FolderSource(write_photographs(Path(folder) / "photographs", count))
        before = _idle()
        build_index(source, Path(folder) / "photographs.idx", classifier)
        return peak_memory_mib() - before


def _idle() -> float:
    reset_peak_memory()
    return memory_mib()


if __name__ == "__main__":
    job, argument = sys.argv[1:]
    jobs = {"search": lambda: _search(Path(argument)), "build": lambda: _build(int(argument))}
    jobs["photographs"] = lambda: _photographs(int(argument))
    print(json.dumps(jobs[job]()))
