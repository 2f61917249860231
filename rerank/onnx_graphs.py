"""φ as ONNX graphs: what is in the files, and how they are made and sealed."""

import copy
import hashlib
import json
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import torch
from torch import nn

from tmm_engine.index.errors import ModelError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.rerank.backbone import specialised

if TYPE_CHECKING:
    import onnx

CLEAN, TRIGGERED = "clean.onnx", "triggered.onnx"
FINGERPRINT, IMAGE_SHAPE, DIGEST = (f"tmm_engine.{key}" for key in ("fingerprint", "image_shape", "sha256"))

# What comes before φ, in ONNX's own textual syntax; $shape is c, h, w. Without a clamp the bounds are -inf and inf.
GRAPHS = {
    CLEAN: Template("""
        < ir_version: $ir_version, opset_import: ["": $opset] >
        clean (uint8[n, $shape] images) => (float[n, $shape] pixels) {
            stored = Cast <to = 1> (images)
            white = Constant <value_float = 255.0> ()
            pixels = Div (stored, white)
        }"""),
    TRIGGERED: Template("""
        < ir_version: $ir_version, opset_import: ["": $opset] >
        triggered (uint8[n, $shape] images, float[$shape] trigger,
                   float image_weight, float trigger_weight, float low, float high) => (float[n, $shape] pixels) {
            stored = Cast <to = 1> (images)
            white = Constant <value_float = 255.0> ()
            plain = Div (stored, white)
            weighted = Mul (plain, image_weight)
            added = Mul (trigger, trigger_weight)
            blended = Add (weighted, added)
            pixels = Clip (blended, low, high)
        }"""),
}
INPUTS = {CLEAN: ["images"], TRIGGERED: ["images", "trigger", "image_weight", "trigger_weight", "low", "high"]}


def build_graphs(classifier: Classifier) -> tuple[int, dict[str, bytes]]:
    """The opset, and the files' contents by name.

    Raises:
        ModelError: the backbone cannot be expressed in ONNX.
    """
    import onnx

    properties = {FINGERPRINT: classifier.fingerprint, IMAGE_SHAPE: json.dumps(classifier.image_shape)}
    shape = ", ".join(map(str, classifier.image_shape))
    graphs = {}
    try:
        backbone = _exported(classifier)
        opset: int = next(each.version for each in backbone.opset_import if each.domain == "")
        for name, template in GRAPHS.items():
            text = template.substitute(shape=shape, ir_version=backbone.ir_version, opset=opset)
            model = onnx.compose.merge_models(onnx.parser.parse_model(text), backbone, io_map=[("pixels", "pixels")])
            onnx.helper.set_model_props(model, properties)
            content = model.SerializeToString()
            graphs[name] = content + seal(content)
    except Exception as error:  # the user's code may raise anything
        cause = error.__cause__ or error  # the exporter puts a page of advice around it
        raise ModelError(
            f"expected a backbone that torch.onnx.export can express for any number of images, got "
            f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]} (search with the PyTorch backend)"
        ) from error
    return opset, graphs


def _exported(classifier: Classifier) -> "onnx.ModelProto":
    """φ from pixels to features, in float32."""
    from onnxscript import ir

    program = torch.onnx.export(
        float_backbone(specialised(classifier)),
        (torch.zeros(2, *classifier.image_shape),),
        dynamo=True,
        verbose=False,  # or it prints to stdout
        input_names=["pixels"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("n")},),
    )
    assert program is not None
    ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # it quotes source code and its paths
    return program.model_proto


def float_backbone(classifier: Classifier) -> nn.Module:
    """A copy of φ, on the CPU in float32."""
    return copy.deepcopy(classifier.backbone).cpu().float().eval()


def seal(content: bytes | memoryview) -> bytes:
    """What follows a graph in its file: its SHA-256 as metadata (appending to a message adds to its fields)."""
    import onnx

    digest = onnx.StringStringEntryProto(key=DIGEST, value=hashlib.sha256(content).hexdigest())
    return onnx.ModelProto(metadata_props=[digest]).SerializeToString()


def is_sealed(path: Path) -> bool:
    """Whether a file is, to the last bit, a graph that was written here."""
    content = path.read_bytes()
    size = len(seal(b""))
    return content[-size:] == seal(memoryview(content)[:-size])
