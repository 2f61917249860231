"""φ in ONNX Runtime: a clean and a triggered graph for any deployment, and a `Backbone` that runs the second."""

import contextlib
import io
import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tmm_engine.index.errors import IndexStateError, ModelError
from tmm_engine.index.files import replacing
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.rerank.blending import apply_trigger
from tmm_engine.rerank.onnx_graphs import (
    CLEAN,
    FINGERPRINT,
    GRAPHS,
    INPUTS,
    TRIGGERED,
    build_graphs,
    float_backbone,
    is_sealed,
)
from tmm_engine.rerank.settings import Blend

__all__ = ["TRIGGERED", "ExportReport", "OnnxBackbone", "OnnxFallbackWarning", "export_onnx"]

TOLERANCE = 1e-4  # of the largest feature; float32 rounding stays two orders of magnitude below
SILENT, WARNING = 4, 2  # ONNX Runtime's log severities; the second is the default
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class OnnxFallbackWarning(UserWarning):
    """ONNX Runtime was asked for a GPU and runs on the CPU."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What `export_onnx` wrote, and how well it agrees with PyTorch.

    Attributes:
        folder: Holds the files.
        sizes: Bytes, by file name: ``clean.onnx`` and ``triggered.onnx``.
        difference: Largest absolute difference of a feature from PyTorch's, as a share of the largest absolute feature
            of its batch.
        opset: ONNX operator set.
    """

    folder: Path
    sizes: dict[str, int]
    difference: float
    opset: int

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        return tuple(self.folder / name for name in self.sizes)


def export_onnx(classifier: Classifier, folder: Path) -> ExportReport:
    """Write φ as two ONNX graphs into ``folder``, all or nothing; an earlier export is replaced.

    ``clean.onnx``: images uint8 (n, c, h, w) -> features float32 (n, d).
    ``triggered.onnx``: images, trigger float32 (c, h, w), and the float32 scalars image_weight, trigger_weight, low,
    high -> features of clip(image_weight · images / 255 + trigger_weight · trigger, low, high).

    n is free. Both run in ONNX Runtime on the CPU before anything is put in place: on seeded images, for two n, every
    blend, clamped and not, each feature has to be within `TOLERANCE` of PyTorch's, relative to the largest.

    Args:
        classifier: f; a float32 copy of its backbone is exported, the classifier stays as it is.
        folder: To create. Its parent has to exist.

    Raises:
        ModelError: the backbone cannot be expressed in ONNX, or the graphs compute something else.
        IndexStateError: ``folder`` exists and is not an export, or cannot be written.
    """
    folder = folder.resolve()
    try:
        _check_target(folder)
        with replacing(folder) as staging:
            staging.mkdir()
            opset, graphs = build_graphs(classifier)
            for name, graph in graphs.items():
                (staging / name).write_bytes(graph)
            difference = _check_graphs(classifier, staging)
            _check_target(folder)  # again: time has passed
    except OSError as error:
        raise IndexStateError(
            f"{folder} cannot be written: {error.strerror or error}; create {folder.parent} first, change its "
            "permissions, or choose another path"
        ) from error
    return ExportReport(folder, {name: len(graph) for name, graph in graphs.items()}, difference, opset)


class OnnxBackbone:
    """A `Backbone` in ONNX Runtime, in float32; see `load`.

    Attributes:
        name: The execution provider actually in use: ``ONNX Runtime fp32, CPUExecutionProvider``.
        exact: True.
    """

    exact = True

    def __init__(self, graph: "_Graph") -> None:
        self._graph = graph
        self.name = f"ONNX Runtime fp32, {graph.provider}"

    @classmethod
    def load(cls, path: Path, classifier: Classifier, *, device: torch.device | str) -> "OnnxBackbone":
        """Open the ``triggered.onnx`` that `export_onnx` wrote for this very classifier.

        Args:
            path: The file.
            classifier: Whose features the graph has to compute; on any device.
            device: ``cpu`` (as many threads as PyTorch uses) or a ``cuda`` device. Without a working CUDA provider
                it runs on the CPU, with an `OnnxFallbackWarning`; images and results may stay on any device.

        Raises:
            ModelError: no such file, a damaged one, another graph, or one of another classifier.
        """
        return cls(_open(path, classifier, INPUTS[TRIGGERED], torch.device(device)))

    def __call__(
        self,
        images: UInt8[Tensor, "n c h w"],
        trigger: Float[Tensor, "c h w"],
        *,
        image_weight: float,
        trigger_weight: float,
        clamp: bool,
    ) -> Float[Tensor, "n d"]:
        """See `Backbone`; the features come back on the trigger's device and in its dtype."""
        low, high = (0.0, 1.0) if clamp else (-torch.inf, torch.inf)
        scalars = torch.tensor([image_weight, trigger_weight, low, high], dtype=torch.float32)
        return self._graph(images, trigger.float(), *scalars).to(trigger)


class _Graph:
    """An open session; tensors go in and out of it without copies where they are on its device already."""

    def __init__(self, session: Any, feature_dim: int, device: torch.device) -> None:
        self.provider: str = session.get_providers()[0]
        self._session = session
        self._feature_dim = feature_dim
        self._device = torch.device("cuda", device.index or 0) if self.provider == CUDA else torch.device("cpu")

    def __call__(self, *inputs: Tensor) -> Float[Tensor, "n d"]:
        """Features on the session's device; the first input is the images."""
        place = (self._device.type, self._device.index or 0)
        held = [tensor.to(self._device).contiguous() for tensor in inputs]
        features = torch.empty(len(held[0]), self._feature_dim, dtype=torch.float32, device=self._device)
        binding = self._session.io_binding()
        for each, tensor in zip(self._session.get_inputs(), held, strict=True):
            dtype = np.uint8 if tensor.dtype == torch.uint8 else np.float32
            binding.bind_input(each.name, *place, dtype, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output("features", *place, np.float32, tuple(features.shape), features.data_ptr())
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # ONNX Runtime works in a stream of its own
        self._session.run_with_iobinding(binding)
        return features


def _open(path: Path, classifier: Classifier, inputs: list[str], device: torch.device) -> _Graph:
    """The undamaged graph of this very classifier that has these inputs."""
    again = "(export it again with `export_onnx`)"
    try:
        sealed = is_sealed(path)
    except OSError as error:
        raise ModelError(f"expected the graph {path}, got: {error.strerror} {again}") from error
    if not sealed:
        raise ModelError(f"expected in {path} what export_onnx wrote, got something else or a damaged copy {again}")
    try:
        session, said = _session(path, device)
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        raise ModelError(
            f"expected a graph that the installed ONNX Runtime can run, got {path}: {error} (upgrade onnxruntime, or "
            "use the PyTorch backend)"
        ) from error
    found = session.get_modelmeta().custom_metadata_map[FINGERPRINT]
    if found != classifier.fingerprint:
        raise ModelError(
            f"expected in {path} the graph of the classifier with fingerprint {classifier.fingerprint[:12]}…, got "
            f"{found[:12]}… {again}"
        )
    names = [each.name for each in session.get_inputs()]
    if names != inputs:
        raise ModelError(f"expected in {path} a graph with the inputs {inputs}, got {names} (use {TRIGGERED})")
    if device.type == "cuda" and CUDA not in session.get_providers():
        sees = "sees a GPU" if torch.cuda.is_available() else "sees no GPU either"
        warnings.warn(
            f"ONNX Runtime runs on the CPU, not on {device}: {said}; PyTorch (CUDA {torch.version.cuda}) {sees}. "
            "Install 'onnxruntime-gpu[cuda,cudnn]' for that version of CUDA and uninstall plain onnxruntime, or use "
            "the CPU or the PyTorch backend",
            OnnxFallbackWarning,
            stacklevel=3,  # the caller of OnnxBackbone.load
        )
    return _Graph(session, classifier.feature_dim, device)


def _session(path: Path, device: torch.device) -> tuple[Any, str]:
    """An onnxruntime.InferenceSession, on the CPU where CUDA does not start, and what ONNX Runtime says about that."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = SILENT
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # PyTorch works on the same cores
    if device.type != "cuda" or CUDA not in onnxruntime.get_available_providers():
        return onnxruntime.InferenceSession(path, options, providers=[CPU]), "the installed package is without CUDA"
    # TF32 would cost three digits, and an exhaustive search may choose another algorithm in every run.
    settings = {"device_id": device.index or 0, "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    said = io.StringIO()  # ONNX Runtime prints what fails to stdout, which is for answers
    onnxruntime.set_default_logger_severity(SILENT)
    try:
        with contextlib.redirect_stdout(said):
            onnxruntime.preload_dlls()
            session = onnxruntime.InferenceSession(path, options, providers=[(CUDA, settings), CPU])
    finally:
        onnxruntime.set_default_logger_severity(WARNING)
    return session, " ".join(said.getvalue().split()) or "its CUDA provider did not start"


def _check_target(folder: Path) -> None:
    """Refuse what exists and is neither empty nor an earlier export."""
    ours = folder.is_dir() and all(
        path.name in GRAPHS and path.is_file() and FINGERPRINT.encode() in path.read_bytes()
        for path in folder.iterdir()
    )
    if folder.exists() and not ours:
        raise IndexStateError(f"{folder} exists and is not an ONNX export: it is left alone; choose another path")


@torch.inference_mode()
def _check_graphs(classifier: Classifier, folder: Path) -> float:
    """The largest relative difference of both graphs from PyTorch; an error if it is above `TOLERANCE`."""
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    clean, triggered = (_open(folder / name, classifier, INPUTS[name], cpu) for name in (CLEAN, TRIGGERED))
    backbone, reference = OnnxBackbone(triggered), float_backbone(classifier)
    trigger = torch.randn(classifier.image_shape, generator=generator, dtype=torch.float32)
    differences = []
    for n in (1, 3):
        images = torch.randint(0, 256, (n, *classifier.image_shape), generator=generator, dtype=torch.uint8)
        differences.append(_difference(clean(images), reference(images / 255.0)))
        for blend, clamp in itertools.product(Blend, (False, True)):
            image_weight, trigger_weight = blend.weights(0.4)
            got = backbone(images, trigger, image_weight=image_weight, trigger_weight=trigger_weight, clamp=clamp)
            pixels = apply_trigger(images / 255.0, trigger, intensity=0.4, blend=blend, clamp=clamp)
            differences.append(_difference(got, reference(pixels)))
    largest = float(torch.stack(differences).max())  # unlike Python's, this max keeps a NaN
    if not largest <= TOLERANCE:
        raise ModelError(
            f"expected the ONNX graphs to agree with PyTorch within {TOLERANCE:g} of the largest feature, got "
            f"{largest:.2g} (search with the PyTorch backend)"
        )
    return largest


def _difference(got: Float[Tensor, "n d"], expected: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The largest absolute difference, as a share of the largest absolute value expected."""
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return (got - expected).abs().max() / scale
