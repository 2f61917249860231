"""What an engine is made of: the parts of an index on disk, each checked."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tmm_engine.backends import Backend, choose_backbone, choose_device
from tmm_engine.cluster.connection import RayOptions
from tmm_engine.index.descriptors.columns import ROBUST_FEATURE, Describer, describer_of
from tmm_engine.index.errors import ModelError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.factories import SearchPrecision
from tmm_engine.index.store.lance_store import LanceStore
from tmm_engine.index.store.manifest import EXEMPLARS, MODEL, Manifest
from tmm_engine.index.store.target import recover
from tmm_engine.rerank.backbone import Backbone, Precision
from tmm_engine.rerank.columns import GLOBAL_FEATURE, trigger_of
from tmm_engine.rerank.exemplars import DEFAULT_CACHE_BYTES
from tmm_engine.rerank.global_trigger import GlobalTrigger


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """One version of an index on disk, opened.

    Attributes:
        manifest: Of that version.
        classifier: The index's, on the device that was asked for.
        store: The exemplars.
        backbone: In ONNX Runtime; None for PyTorch.
        global_trigger: The index's, if it has one.
        describer: Of its descriptors, if it has them.
    """

    manifest: Manifest
    classifier: Classifier
    store: LanceStore
    backbone: Backbone | None
    global_trigger: GlobalTrigger | None
    describer: Describer | None


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
    memory: int | None = None
    search_precision: SearchPrecision | None = None
    ray: RayOptions | None = None


def open_parts(path: Path, opening: Opening) -> Parts:
    """The parts of an index on disk that belong together; see `Engine.open` for errors."""
    recover(path)
    manifest = Manifest.read(path, version=opening.version)
    manifest.check_sizes(path)
    manifest.check_digests(path, exemplars=opening.verify)
    loaded = Classifier.load(path / MODEL, model=opening.model)
    classifier = loaded.known_as(manifest.fingerprint)
    if classifier is None:
        raise ModelError(
            f"{path} was built with the model {manifest.fingerprint[:12]}…, this one is {loaded.fingerprint[:12]}…: "
            f"its features would not match; open it with the same model, or build the index again"
        )
    classifier = classifier.to(choose_device(opening.device))
    store = LanceStore(
        path / EXEMPLARS,
        image_shape=manifest.image_shape,
        columns=manifest.columns,
        version=manifest.lance_version,
        classifier=classifier,
    )
    manifest.check_exemplars(path, len(store), store.files)
    backbone = choose_backbone(path, manifest, classifier, backend=opening.backend, precision=opening.precision)
    trigger = trigger_of(path, manifest.image_shape) if GLOBAL_FEATURE in manifest.columns else None
    describer = describer_of(path, classifier) if ROBUST_FEATURE in manifest.columns else None
    return Parts(manifest, classifier, store, backbone, trigger, describer)
