"""Mode robust, the default: building with all defaults in passes of the network, searching beside FAISS."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import faiss
import numpy as np
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tmm_engine import Engine
from tmm_engine.building import build_index
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.records import ImageSource

if TYPE_CHECKING:
    from tmm_engine.bench.latency import Latency

SEARCHES = 15  # of each way, in turn
MODES = ("cosine", "robust")


def time_robust(
    latency: "Latency",
    source: ImageSource,
    classifier: Classifier,
    queries: Float32[np.ndarray, "q c h w"],
    features: Float32[np.ndarray, "n d"],
) -> None:
    """Passes over the images for each of them that building takes; a search of one query as a multiple of FAISS's.

    A pass is counted for an image in a view, whichever copy of the network it goes through; what choosing layers and
    weights takes is counted with it.

    Args:
        latency: Is told.
        source: Exemplars.
        classifier: f.
        queries: Asked one by one, in turn.
        features: Of the exemplars, for FAISS alone: flat, cosine, without the query's own pass.
    """
    n = len(features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    bare = faiss.IndexFlatIP(features.shape[1])
    bare.add(unit)
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "robust.idx"
        with counted_passes() as passed:
            latency.time("build, defaults", n, partial(build_index, source, index, classifier))
        spec = classifier.spec
        engine = Engine.open(index, device=latency.device, model=spec.architecture if spec.is_user_code else None)
        for search in range(SEARCHES + 1):  # the first is to warm up
            query = queries[search % len(queries)]
            latency.time("FAISS alone", n, partial(bare.search, unit[search % n, None], 10))
            for mode in MODES:
                latency.time(f"search, {mode}", n, partial(engine.search, query, mode=mode, k=10))
            if search == 0:
                latency.forget("FAISS alone", *(f"search, {mode}" for mode in MODES))
    alone, cosine, robust = (latency.median(path, n) for path in ("FAISS alone", "search, cosine", "search, robust"))
    latency.figures |= {
        "build_passes": sum(passed) / n,
        "robust_over_cosine": robust / cosine,
        "robust_over_faiss": robust / alone,
    }


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """The sizes of all batches that any copy of a `Classifier.backbone` passes."""
    passed: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if [name for name, _ in module.named_children()] == ["normalise", "network"]:
            passed.append(len(inputs[0]))

    hook = register_module_forward_pre_hook(count)
    try:
        yield passed
    finally:
        hook.remove()
