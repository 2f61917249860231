"""What an engine is made of: the parts of an index on disk, each checked, or those of an index in memory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from tmm_engine.backends import Backend, choose_backbone, choose_device
from tmm_engine.index.errors import IndexStateError, ModelError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.store.building import BuildReport, check_fit, embedded
from tmm_engine.index.store.exemplars import FEATURE
from tmm_engine.index.store.lance_store import LanceStore
from tmm_engine.index.store.manifest import EXEMPLARS, GLOBAL_TRIGGER, MODEL, Manifest
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.index.store.target import recover
from tmm_engine.rerank.backbone import Backbone, Precision
from tmm_engine.rerank.exemplars import DEFAULT_CACHE_BYTES
from tmm_engine.rerank.global_trigger import GlobalColumn, GlobalTrigger, make_global_trigger
from tmm_engine.rerank.settings import GlobalRecipe, TmmConfig


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """One version of an index on disk, opened.

    Attributes:
        manifest: Of that version.
        classifier: The index's, on the device that was asked for.
        store: The exemplars.
        backbone: In ONNX Runtime; None for PyTorch.
        global_trigger: The index's, if it has one.
    """

    manifest: Manifest
    classifier: Classifier
    store: LanceStore
    backbone: Backbone | None
    global_trigger: GlobalTrigger | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opening:
    """How an index on disk is opened; see `Engine.open`."""

    model: nn.Module | str | None = None
    device: str = "auto"
    cache_bytes: int = DEFAULT_CACHE_BYTES
    precision: Precision = Precision.FP32
    backend: Backend = Backend.AUTO
    version: int | None = None
    verify: bool = False


def open_parts(path: Path, opening: Opening) -> Parts:
    """The parts of an index on disk that belong together; see `Engine.open` for errors."""
    recover(path)
    manifest = Manifest.read(path, version=opening.version)
    manifest.check_sizes(path)
    manifest.check_digests(path, exemplars=opening.verify)
    classifier = Classifier.load(path / MODEL, model=opening.model)
    if classifier.fingerprint != manifest.fingerprint:
        raise ModelError(
            f"{path} was built with the model {manifest.fingerprint[:12]}…, this one is "
            f"{classifier.fingerprint[:12]}…: its "
            f"features would not match; open it with the same model, or build the index again"
        )
    classifier = classifier.to(choose_device(opening.device))
    store = LanceStore(
        path / EXEMPLARS,
        image_shape=manifest.image_shape,
        columns=manifest.columns,
        version=manifest.lance_version,
    )
    manifest.check_exemplars(path, len(store), store.files)
    backbone = choose_backbone(path, manifest, classifier, backend=opening.backend, precision=opening.precision)
    return Parts(manifest, classifier, store, backbone, _global_trigger(path, manifest))


def _global_trigger(path: Path, manifest: Manifest) -> GlobalTrigger | None:
    if not manifest.global_trigger:
        return None
    found = GlobalTrigger.load(path / GLOBAL_TRIGGER)
    if tuple(found.trigger.shape) != manifest.image_shape:
        raise IndexStateError(
            f"{path / GLOBAL_TRIGGER}: expected a trigger of shape {manifest.image_shape}, got "
            f"{tuple(found.trigger.shape)}; build the index again"
        )
    return found


def index_in_memory(
    source: ArraySource, classifier: Classifier, *, global_trigger: GlobalRecipe | TmmConfig | None, progress: Progress
) -> tuple[MemoryStore, GlobalTrigger | None]:
    """The exemplars of a source with their features, and a global trigger with theirs.

    Args:
        source: Images and what is known of them.
        classifier: Computes the features.
        global_trigger: What the trigger is made with; None: without.
        progress: Told of images done.

    Raises:
        InputError: a source that does not fit the classifier; or as `make_global_trigger`.
    """
    check_fit(source, classifier)
    shared = None
    if global_trigger is not None:
        shared = make_global_trigger(source, classifier, global_trigger, progress=progress)
    return memory_store(source, classifier, shared, progress=progress), shared


def memory_store(
    source: ImageSource, classifier: Classifier, shared: GlobalTrigger | None, *, progress: Progress = silent
) -> MemoryStore:
    """A source's images, their features, and those under a global trigger if there is one, as arrays.

    Args:
        source: The exemplars.
        classifier: Computes the features.
        shared: The global trigger.
        progress: Told of images done.
    """
    report, batches = BuildReport(), []
    for batch in embedded(source, classifier, report):
        batches.append(batch)
        progress("embedding", report.exemplars, len(source))
    records = [record for batch in batches for record in batch.records]
    features = {FEATURE: np.concatenate([batch.features for batch in batches])}
    if shared is not None:
        column = GlobalColumn(shared, classifier)
        parts = [column.columns(batch.images) for batch in batches]
        features |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return MemoryStore(
        np.concatenate([batch.images for batch in batches]),
        features,
        np.concatenate([batch.labels for batch in batches]),
        ids=[record.id for record in records],
        label_is_predicted=np.full(len(records), not source.labelled),
        metadata=[record.metadata for record in records],
    )
