"""What an index holds, and what a machine offers."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tmm_engine import __version__
from tmm_engine.classifying.calibration import Calibration, names_of
from tmm_engine.index.arguments import checked
from tmm_engine.index.descriptors.columns import DESCRIPTORS, ROBUST_FEATURE, Descriptors
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.models.architectures import ModelSpec
from tmm_engine.index.models.preprocessing import Preprocessing, Resize
from tmm_engine.index.neighbours.factories import usable
from tmm_engine.index.store.manifest import Manifest
from tmm_engine.index.store.where import shortened

LIBRARIES = ("torch", "torchvision", "faiss-cpu", "pylance", "pyarrow", "numpy", "pillow", "safetensors")


@checked
def describe_index(path: str | Path, *, version: int | None = None) -> dict[str, Any]:
    """Facts about an index, or an older version of it, in an order to read them in.

    Raises:
        IndexStateError: no index there, of another format version, or damaged.
    """
    path = Path(path)
    manifest = Manifest.read(path, version=version)
    manifest.check_sizes(path)
    return {
        "index": str(path),
        "source": manifest.source,
        "version": manifest.version,
        "created": manifest.created,
        "change": manifest.change,
        "exemplars": manifest.exemplars,
        "skipped": manifest.skipped,
        "image_shape": list(manifest.image_shape),
        "feature_dim": manifest.feature_dim,
        "columns": manifest.columns,
        "num_classes": len(manifest.class_names),
        "classes": list(manifest.class_names),
        "num_other_labels": len(manifest.other_labels),
        "other_labels": list(manifest.other_labels),
        "labels": "predicted by the model, all or some" if manifest.labels_predicted else "given",
        "agreement": _agreement(manifest),
        "model": manifest.model.architecture,
        "preprocessing": _preprocessing(manifest.model),
        "fingerprint": manifest.fingerprint,
        "descriptors": _descriptors(path, manifest),
        "calibrations": _calibrations(path, manifest),
        "neighbours": _neighbours(manifest),
        "tuned": _tuned(manifest),
        "backend": _backend(manifest.backend_speeds),
        "megabytes": round(sum(digest.bytes for digest in manifest.files.values()) / 1e6, 1),
    }


def _preprocessing(model: ModelSpec) -> str:
    """What is done to a picture before the network, in words."""
    how = model.preprocessing or Preprocessing(model.image_shape)
    height, width = how.size
    size = {
        Resize.COVER: f"resized to cover {height} × {width} where it has another size",
        Resize.SHORTEST: f"shorter side resized to {height}",
        Resize.EXACT: f"resized to {height} × {width}",
        Resize.NONE: "not resized",
    }[how.resize]
    scaled = "" if how.resize is Resize.NONE else f" ({how.interpolation}, {how.resampler})"
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (model.mean, model.std))
    channels = f"{model.in_channels} channel{'s' if model.in_channels > 1 else ''}{' in BGR' if model.bgr else ''}"
    crop = f"centre crop of {model.image_size[0]} × {model.image_size[1]}"
    return f"{size}{scaled}; {crop}; {channels}, mean {mean}, std {std}"


def _agreement(manifest: Manifest) -> str:
    """Of the model's predictions with labels, in words."""
    if manifest.agreement is None:
        return "not known: built before predictions were stored; build it again"
    return "; ".join(manifest.agreement.sentences())


def _neighbours(manifest: Manifest) -> str:
    """The factory string, and whether it is in use."""
    if usable(manifest.neighbours, manifest.exemplars) == manifest.neighbours:
        return manifest.neighbours
    return f"{manifest.neighbours}, which {manifest.exemplars:,} exemplars cannot train: search is exact"


def _tuned(manifest: Manifest) -> str:
    """What tuning measured, in words."""
    tuned = manifest.tuned
    if tuned is None:
        return "no: engine tune-neighbours measures what suits"
    later = "" if tuned.exemplars == manifest.exemplars else f"; {manifest.exemplars:,} exemplars now"
    return tuned.sentence() + later


def _descriptors(path: Path, manifest: Manifest) -> dict[str, Any] | None:
    """What mode robust looks at, and how it was chosen; None where the index has no descriptors."""
    if ROBUST_FEATURE not in manifest.columns:
        return None
    found = Descriptors.load(path / DESCRIPTORS, device=torch.device("cpu"))
    return {"views": found.views, **found.report}


def _calibrations(path: Path, manifest: Manifest) -> list[str]:
    """Those that `Engine.classify` can go by, each in words."""
    told = []
    for name in names_of(path):
        try:
            found = Calibration.load(path, name)
        except IndexStateError:
            told.append(f"{name}: damaged; delete it, and calibrate anew")
            continue
        asked, where = found.options, found.options.get("where")
        of = f"{len(found):,} images of {found.source}, mode {asked.get('mode')}, k {asked.get('k')}"
        narrowed = "" if where is None else f", where {shortened(str(where))}"
        current = found.content == manifest.content
        told.append(f"{name}: {of}{narrowed}{'' if current else '; made of other exemplars: make it anew'}")
    return told


def _backend(speeds: dict[str, float]) -> str:
    if not speeds:
        return "torch (not compared: build-index --compare-backends)"
    measured = ", ".join(f"{name} {speed:,.0f} images/s" for name, speed in speeds.items())
    return f"{max(speeds, key=speeds.__getitem__)} (when built: {measured})"


def describe_system() -> dict[str, Any]:
    """Versions of Python and of the libraries that matter, threads and devices."""
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "tmm-engine": __version__,
        **{name: version(name) for name in LIBRARIES},
        "threads": torch.get_num_threads(),
        "onnx_runtime": _onnx_runtime(),
        "cuda_devices": devices or "none that torch can use",
    }


def _onnx_runtime() -> str:
    try:
        import onnxruntime
    except ImportError:
        return "not installed (pip install 'tmm-engine[onnx]')"
    return f"{onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}"
