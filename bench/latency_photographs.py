"""Building from photographs, where decoding matters: beside decoding alone and the network's passes alone, in turn.

The network is a ResNet-18 of random weights, which takes as long as a trained one.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tmm_engine.bench.peak import PHOTOGRAPH_SHAPE, peak_of_photographs
from tmm_engine.bench.photographs import write_photographs
from tmm_engine.building import build_index
from tmm_engine.describing import DEFAULT_VIEWS
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.folders import FolderSource

if TYPE_CHECKING:
    from tmm_engine.bench.latency import Latency

SHAPE = PHOTOGRAPH_SHAPE
PHOTOGRAPHS = 400  # from some 350 on, choosing descriptors takes its share of the passes and no more
PEAK_PHOTOGRAPHS = (3500, 5500)  # of both the sample that descriptors are chosen on has its full 1,000


def time_photographs(latency: "Latency", repeats: int) -> None:
    """Building with the defaults as a share of the slower of its two parts; peak memory at two sizes."""
    classifier = Classifier.from_architecture("resnet18", image_shape=SHAPE, seed=0, num_classes=10).to(latency.device)
    n = PHOTOGRAPHS
    with tempfile.TemporaryDirectory() as folder:
        source = FolderSource(write_photographs(Path(folder) / "photographs", n))
        build = partial(build_index, source, Path(folder) / "a.idx", classifier, overwrite=True)
        for _ in range(repeats):
            latency.time("photographs decoded", n, partial(_decode, source))
            latency.time("photographs, passes", n, partial(_pass, classifier, n * (1 + DEFAULT_VIEWS)))
            latency.time("photographs, build", n, build)
    parts = [latency.median(path, n) for path in ("photographs decoded", "photographs, passes")]
    small, large = (peak_of_photographs(count) for count in PEAK_PHOTOGRAPHS)
    latency.figures |= {
        "photographs_build_over_slower_part": max(parts) / latency.median("photographs, build", n),
        "photographs_decoded_per_second": n / parts[0],
        "photographs_peak_mib_small": small,
        "photographs_peak_mib_large": large,
    }


def _decode(source: FolderSource) -> None:
    for _ in source.read(SHAPE):
        pass


def _pass(classifier: Classifier, count: int) -> None:
    """So many images through the bare network, at the engine's own batch size."""
    images = torch.zeros(forward_batch_size(SHAPE), *SHAPE, dtype=torch.uint8)
    with torch.inference_mode():
        for start in range(0, count, len(images)):
            batch = images[: count - start].to(classifier.device).float() / 255.0
            features = classifier.backbone(batch)
        features.cpu()  # waits for the device
