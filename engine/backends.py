"""Which software passes exemplars through the backbone: PyTorch or ONNX Runtime; and which is faster here."""

import shutil
import tempfile
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch

from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.errors import IndexStateError, InputError, ModelError, member
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.index.store.manifest import CACHE, Manifest
from tmm_engine.rerank.backbone import Backbone, Precision, TorchBackbone, specialised
from tmm_engine.rerank.onnx_backbone import OnnxBackbone, export_onnx
from tmm_engine.rerank.onnx_graphs import TRIGGERED, is_sealed
from tmm_engine.rerank.speed import SpeedComparison, faster_backend

GRAPHS = Path(CACHE) / "onnx"  # in an index


class Backend(StrEnum):
    """What passes exemplars through the backbone."""

    TORCH = "torch"
    ONNX = "onnx"
    AUTO = "auto"  # what a measurement when the index was built found faster; torch where there was none


def choose_device(name: str) -> torch.device:
    """The device called ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; expected cpu, cuda, cuda:N or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use the device 'cpu'"
        )
    return device


def choose_backbone(
    index: Path, manifest: Manifest, classifier: Classifier, *, backend: Backend, precision: Precision
) -> Backbone | None:
    """The index's backbone in ONNX Runtime where that is asked for, or measured to be faster; None for PyTorch.

    Raises:
        InputError: ONNX Runtime is asked for another precision than fp32, or not installed.
        ModelError: the backbone cannot be expressed in ONNX.
    """
    if backend is Backend.AUTO:
        speeds = manifest.backend_speeds
        fastest = max(speeds, key=speeds.__getitem__, default=Backend.TORCH)
        backend = member(Backend, fastest) if precision is Precision.FP32 else Backend.TORCH
    if backend is Backend.TORCH:
        return None
    if precision is not Precision.FP32:
        raise InputError(f"ONNX Runtime passes exemplars in fp32, not {precision}; use the backend 'torch'")
    return cached_onnx(index, classifier, classifier.device)


def cached_onnx(index: Path, classifier: Classifier, device: torch.device) -> OnnxBackbone:
    """The index's graph in ONNX Runtime; exported into the index's cache where it is missing or another model's.

    An index that cannot be written is searched all the same: its graph is exported anew each time it is opened.

    Raises:
        InputError: the 'onnx' extra is not installed.
        ModelError: the backbone cannot be expressed in ONNX.
    """
    require_onnx()
    folder = index / GRAPHS
    if (folder / TRIGGERED).is_file():
        try:
            return OnnxBackbone.load(folder / TRIGGERED, classifier, device=device)
        except ModelError:  # damaged, or another model's: a cache is made anew
            pass
    shutil.rmtree(folder, ignore_errors=True)  # `export_onnx` leaves alone what it does not know for an export
    try:
        folder.parent.mkdir(exist_ok=True)
        export_onnx(classifier, folder)
        return OnnxBackbone.load(folder / TRIGGERED, classifier, device=device)
    except (OSError, IndexStateError):  # no cache then, as for FAISS
        with tempfile.TemporaryDirectory() as temporary:
            export_onnx(classifier, Path(temporary) / "onnx")
            return OnnxBackbone.load(Path(temporary) / "onnx" / TRIGGERED, classifier, device=device)


def damaged_graphs(index: Path) -> list[Path]:
    """The graphs in the index's cache that are not what was exported; `cached_onnx` makes them anew.

    Raises:
        InputError: there are graphs, and the 'onnx' extra is not installed.
    """
    paths = sorted((index / GRAPHS).glob("*.onnx"))
    if paths:
        require_onnx()
    return [path for path in paths if not _is_whole(path)]


def _is_whole(path: Path) -> bool:
    try:
        return is_sealed(path)
    except OSError:
        return False


def compare_backends(index: Path, classifier: Classifier, store: ExemplarStore) -> SpeedComparison:
    """Images a second of PyTorch and of ONNX Runtime, in fp32, over one chunk of an index's images."""
    rows = np.arange(min(len(store), forward_batch_size(store.image_shape)))
    images = torch.from_numpy(store.images(rows).copy()).to(classifier.device)
    backbones: dict[str, Backbone] = {
        str(Backend.TORCH): TorchBackbone(specialised(classifier)),
        str(Backend.ONNX): cached_onnx(index, classifier, classifier.device),
    }
    trigger = torch.full(store.image_shape, 0.1, device=classifier.device)
    return faster_backend(backbones, images, trigger)


def require_onnx() -> None:
    """Say which extra is missing.

    Raises:
        InputError: the 'onnx' extra is not installed.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise InputError(f"ONNX needs the 'onnx' extra: pip install 'tmm-engine[onnx]' ({error})") from None
    assert onnx and onnxruntime and onnxscript
