"""Indexes of any size whose features are drawn: clusters, and a spectrum, as a trained network's have.

An exemplar's image *is* its feature: pixels of a little picture, which the network only flattens and centres. So the
whole engine works on it as on any index, while its network takes no time, and what is measured is the search.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import nn

from tmm_engine.bench.machine import memory_mib, peak_memory_mib
from tmm_engine.engine import Engine
from tmm_engine.index.descriptors.columns import Describer, Descriptors, descriptor_columns
from tmm_engine.index.descriptors.descriptor import FEATURES, PROBABILITIES, Descriptor, Part
from tmm_engine.index.descriptors.projection import Projection
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.sources.records import ImageRecord
from tmm_engine.index.store.building import write_index
from tmm_engine.index.types import ImageShape

CLASSES = 10
CLUSTERS = 20  # of each class
# How much of the variance is between classes, and how that within falls: the i-th component's is as i to this power.
# Between what was measured of φ of two ResNet-18, over 5,000 images of MNIST and 4,000 of CIFAR-10: 0.91 and 0.62 of
# the variance between predicted classes, and powers of -1.85 and -1.48 from the 4th to the 100th component within.
BETWEEN, DECAY = 0.8, -1.5
AMONG_CLUSTERS = 0.5  # of the variance within classes; that there are clusters, and so many, is assumed
STEP = 0.09  # standard deviation of a pixel, in [0, 1]: few are cut off
CHUNK = 8192
SAMPLE = 2000  # exemplars that the recogniser is fitted on


class Drawn:
    """A source of so many exemplars, the same in every run; it holds none of them.

    Args:
        count: How many.
        dimension: Of φ, a multiple of 16.
    """

    class_names: tuple[str, ...] | None = tuple(f"class {number}" for number in range(CLASSES))
    labelled = True
    metadata_types: Mapping[str, type] = {}
    remarks: tuple[str, ...] = ()

    def __init__(self, count: int, dimension: int) -> None:
        self.count, self.shape = count, shape_of(dimension)
        self.name = f"{count:,} drawn exemplars"
        generator = np.random.default_rng(0)
        spectrum = np.arange(1, dimension + 1) ** DECAY
        turned, _ = np.linalg.qr(generator.standard_normal((dimension, dimension)))
        basis = (turned * np.sqrt(spectrum / spectrum.mean())).T.astype(np.float32)  # (d of components, d of pixels)

        def drawn(size: int, share: float) -> Float32[np.ndarray, "size d"]:
            return np.float32(np.sqrt(share)) * generator.standard_normal((size, dimension), np.float32) @ basis

        within = 1.0 - BETWEEN
        centres = np.repeat(drawn(CLASSES, BETWEEN), CLUSTERS, axis=0)
        self._centres = centres + drawn(CLASSES * CLUSTERS, within * AMONG_CLUSTERS)
        self._basis = np.float32(np.sqrt(within * (1.0 - AMONG_CLUSTERS))) * basis

    def __len__(self) -> int:
        return self.count

    def natural_shape(self) -> ImageShape:
        """One channel."""
        return self.shape

    def chunk(self, number: int) -> tuple[UInt8[np.ndarray, "n 1 h w"], np.ndarray]:
        """The images with numbers from ``number · CHUNK`` on, and their labels."""
        size = min(CHUNK, self.count - number * CHUNK)
        generator = np.random.default_rng([1, number])
        cluster = generator.integers(0, len(self._centres), size)
        values = self._centres[cluster] + generator.standard_normal((size, len(self._basis)), np.float32) @ self._basis
        pixels = np.clip(np.rint(255.0 * (0.5 + STEP * values)), 0, 255).astype(np.uint8)
        pixels[:, 0], pixels[:, 1] = 0, 255  # so that stretching contrast changes nothing
        return pixels.reshape(size, *self.shape), cluster // CLUSTERS

    def read(self, shape: Target) -> Iterator[ImageRecord]:
        """All, one by one."""
        for number in range(-(-self.count // CHUNK)):
            for place, (image, label) in enumerate(zip(*self.chunk(number), strict=True)):
                yield ImageRecord(f"{number * CHUNK + place:09d}", image, int(label), {})


def shape_of(dimension: int) -> ImageShape:
    """Of the pictures."""
    return (1, 16, dimension // 16)


def network(dimension: int) -> nn.Module:
    """φ is the picture; the head knows the classes by chance only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(dimension, CLASSES))


def build_drawn(path: Path, *, exemplars: int, dimension: int) -> None:
    """An index of drawn exemplars with descriptors, by the store's own writer."""
    source = Drawn(exemplars, dimension)
    classifier = Classifier.from_module(network(dimension), image_shape=source.shape, mean=(0.5,), std=(2 * STEP,))
    sample = torch.from_numpy(Drawn(SAMPLE, dimension).chunk(0)[0][:SAMPLE]).float() / 255.0
    with torch.inference_mode():
        features = classifier.features(sample)
    mean = features.mean(0)
    rows = nn.functional.normalize(features - mean)
    projection = Projection.fit(rows, power=0.5, dimensions=min(256, dimension // 2))
    recogniser = Descriptor((Part(FEATURES, 1.0, mean, projection),))
    robust = Descriptor((Part(FEATURES, 2.0, mean.clone()), Part(PROBABILITIES, 4.0, None)))
    report = {"sample": SAMPLE, "changed": 0, "changes": [], "recogniser": FEATURES, "robust": {}}
    describer = Describer(Descriptors(recogniser, robust, 1, report), classifier)
    write_index(source, path, classifier, columns=descriptor_columns(describer, classifier))


def opened_alone(path: Path, dimension: int, memory: str | None) -> dict[str, Any]:
    """In a process of its own: seconds to open and to search first, MiB then and at most, by the kernel's count."""
    done = subprocess.run(
        [sys.executable, "-m", "tmm_engine.bench.drawn", str(path), str(dimension), memory or ""],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _opened(path: Path, dimension: int, memory: str | None) -> dict[str, float]:
    before, start = memory_mib(), time.perf_counter()
    engine = Engine.open(path, model=network(dimension), device="cpu", memory=memory)
    opened = time.perf_counter()
    with engine:
        query = engine.exemplar(str(engine.store.ids[0]))
        engine.search(query, k=10)
        first = time.perf_counter()
        engine.search([query] * 8, k=10)
        return {
            "open_s": opened - start,
            "first_s": first - opened,
            "idle_mib": before,
            "memory_mib": memory_mib(),
            "peak_mib": peak_memory_mib(),
        }


if __name__ == "__main__":
    index, given, bound = sys.argv[1:]
    print(json.dumps(_opened(Path(index), int(given), bound or None)))
