"""ONNX graphs compute what PyTorch computes, are refused if not this classifier's, and are never half written."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.builders import ROOT, beside, snapshot, tiny_classifier
from tests.conftest import SHAPE, classifier_of
from tmm_engine.index.errors import IndexStateError, InputError, ModelError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.rerank import onnx_backbone
from tmm_engine.rerank.backbone import Backbone, TorchBackbone
from tmm_engine.rerank.blending import apply_trigger
from tmm_engine.rerank.onnx_backbone import ExportReport, OnnxBackbone, OnnxFallbackWarning, export_onnx
from tmm_engine.rerank.onnx_graphs import CLEAN, FINGERPRINT, TRIGGERED, seal
from tmm_engine.rerank.settings import Blend
from tmm_engine.rerank.speed import faster_backend

Export = tuple[Classifier, ExportReport]
CHOICES = {"blend": st.sampled_from(Blend), "clamp": st.booleans()}
MODELS = {"resnet18": (1, 28, 28), "vit_tiny_32": (3, 32, 32), "mobilenet_v3_small": (3, 32, 32)}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The small network of conftest."""
    classifier = tiny_classifier()
    return classifier, export_onnx(classifier, tmp_path_factory.mktemp("small") / "onnx")


@pytest.fixture(scope="module", params=[*MODELS, "small"])
def any_export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, export: Export) -> Export:
    if request.param == "small":
        return export
    shape = MODELS[request.param]
    classifier = Classifier.from_architecture(request.param, image_shape=shape, seed=1, num_classes=10)
    return classifier, export_onnx(classifier, tmp_path_factory.mktemp(request.param) / "onnx")


def load(export: Export, name: str = TRIGGERED) -> OnnxBackbone:
    classifier, report = export
    return OnnxBackbone.load(report.folder / name, classifier, device="cpu")


def draw(n: int, shape: tuple[int, ...] = SHAPE, *, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    return images, 0.4 * torch.randn(shape, generator=generator, dtype=torch.float32)


def features(export: Export, images: Tensor, trigger: Tensor, *, intensity: float, blend: Blend, clamp: bool) -> Tensor:
    with torch.inference_mode():
        pixels = apply_trigger(images / 255.0, trigger, intensity=intensity, blend=blend, clamp=clamp)
        return export[0].features(pixels)


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def clean_features(path: Path, images: Tensor) -> Tensor:
    """As any user of ONNX Runtime would ask for them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["images"]
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def test_graphs_agree_with_pytorch(any_export: Export) -> None:
    classifier, report = any_export
    backbone = load(any_export)
    for n in (1, 3, 17):
        images, trigger = draw(n, classifier.image_shape)
        with torch.inference_mode():
            assert_equal(clean_features(report.folder / CLEAN, images), classifier.features(images / 255.0))
        for blend in Blend:
            for clamp in (False, True):
                image_weight, trigger_weight = blend.weights(0.3)
                got = backbone(images, trigger, image_weight=image_weight, trigger_weight=trigger_weight, clamp=clamp)
                assert_equal(got, features(any_export, images, trigger, intensity=0.3, blend=blend, clamp=clamp))


@settings(max_examples=40)
@given(drawn=st.builds(draw, st.integers(1, 40), seed=st.integers(0, 2**32)), intensity=st.floats(0, 1), **CHOICES)
def test_every_intensity(
    export: Export, drawn: tuple[Tensor, Tensor], intensity: float, blend: Blend, clamp: bool
) -> None:
    images, trigger = drawn
    before = images.clone(), trigger.clone()
    image_weight, trigger_weight = blend.weights(intensity)
    got = load(export)(images, trigger, image_weight=image_weight, trigger_weight=trigger_weight, clamp=clamp)
    assert_equal(got, features(export, images, trigger, intensity=intensity, blend=blend, clamp=clamp))
    torch.testing.assert_close((images, trigger), before, rtol=0, atol=0)


def test_agrees_with_the_torch_backbone_on_views_and_in_float64(export: Export) -> None:
    classifier, _ = export
    backbone = load(export)
    assert isinstance(backbone, Backbone)
    assert backbone.exact
    assert backbone.name == "ONNX Runtime fp32, CPUExecutionProvider"
    images, trigger = draw(20)
    weights: dict[str, Any] = {"image_weight": 0.7, "trigger_weight": 0.3, "clamp": True}
    strided, transposed = images[::3], trigger.transpose(1, 2)
    assert not strided.is_contiguous()
    assert_equal(backbone(strided, transposed, **weights), TorchBackbone(classifier)(strided, transposed, **weights))
    precise = OnnxBackbone.load(export[1].folder / TRIGGERED, classifier.double(), device="cpu")
    assert_equal(
        precise(images, trigger.double(), **weights),
        TorchBackbone(classifier.double())(images, trigger.double(), **weights),
    )


def test_same_result_every_time(export: Export) -> None:
    images, trigger = draw(33)
    weights: dict[str, Any] = {"image_weight": 0.7, "trigger_weight": 0.3, "clamp": True}
    first, second = (load(export)(images, trigger, **weights) for _ in range(2))
    assert torch.equal(first, second)


def test_report_and_metadata(any_export: Export) -> None:
    classifier, report = any_export
    assert report.paths == (report.folder / CLEAN, report.folder / TRIGGERED)
    assert {path.name: path.stat().st_size for path in report.folder.iterdir()} == report.sizes
    assert 0.0 < report.difference < 1e-5
    for path in report.paths:
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert model.opset_import[0].version == report.opset
        properties = {item.key: item.value for item in model.metadata_props}
        assert properties[FINGERPRINT] == classifier.fingerprint
        assert properties["tmm_engine.image_shape"] == str(list(classifier.image_shape))
        first = model.graph.input[0].type.tensor_type
        assert first.elem_type == onnx.TensorProto.UINT8
        assert first.shape.dim[0].dim_param == "n"
        assert tuple(dim.dim_value for dim in first.shape.dim[1:]) == classifier.image_shape
        assert model.graph.output[0].type.tensor_type.shape.dim[1].dim_value == classifier.feature_dim
        for private in (b"stack_trace", str(ROOT).encode()):  # the exporter quotes source code with its paths
            assert private not in path.read_bytes()


def test_export_leaves_the_classifier_and_stdout_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    classifier = tiny_classifier(3).double()
    state = {name: tensor.clone() for name, tensor in classifier.backbone.state_dict().items()}
    modes = [module.training for module in classifier.backbone.modules()]
    report = export_onnx(classifier, tmp_path / "onnx")
    OnnxBackbone.load(report.folder / TRIGGERED, classifier, device="cpu")
    assert {name: tensor.dtype for name, tensor in classifier.backbone.state_dict().items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }
    torch.testing.assert_close(dict(classifier.backbone.state_dict()), state, rtol=0, atol=0)
    assert [module.training for module in classifier.backbone.modules()] == modes
    assert capfd.readouterr() == ("", "")


def test_another_classifiers_graph_is_refused(export: Export) -> None:
    other = tiny_classifier(1)
    with pytest.raises(ModelError, match=rf"{other.fingerprint[:12]}.*{export[0].fingerprint[:12]}.*export_onnx"):
        OnnxBackbone.load(export[1].folder / TRIGGERED, other, device="cpu")


def test_a_graph_of_someone_else_is_refused(export: Export, tmp_path: Path) -> None:
    model = onnx.load(export[1].folder / TRIGGERED)
    onnx.helper.set_model_props(model, {FINGERPRINT: export[0].fingerprint})
    onnx.save(model, tmp_path / TRIGGERED)
    with pytest.raises(ModelError, match="got something else or a damaged copy"):
        OnnxBackbone.load(tmp_path / TRIGGERED, export[0], device="cpu")


def test_the_clean_graph_is_no_backbone(export: Export) -> None:
    with pytest.raises(ModelError, match=r"got \['images'\] \(use triggered.onnx\)"):
        load(export, CLEAN)


def test_an_operator_the_runtime_does_not_know(export: Export, tmp_path: Path) -> None:
    model = onnx.load(export[1].folder / TRIGGERED)
    onnx.helper.set_model_props(model, {FINGERPRINT: export[0].fingerprint})
    model.graph.node[0].op_type = "Unheard"
    content = model.SerializeToString()
    (tmp_path / TRIGGERED).write_bytes(content + seal(content))
    with pytest.raises(ModelError, match=r"installed ONNX Runtime can run.*Unheard.*PyTorch backend"):
        OnnxBackbone.load(tmp_path / TRIGGERED, export[0], device="cpu")


def test_a_missing_file(export: Export, tmp_path: Path) -> None:
    for path in (tmp_path / "graph.onnx", tmp_path):
        with pytest.raises(ModelError, match=rf"expected the graph {path}, got.*export_onnx"):
            OnnxBackbone.load(path, export[0], device="cpu")


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"no graph", lambda b: b[: len(b) // 2], lambda b: b[:-1]])
def test_a_cut_file(
    export: Export, tmp_path: Path, damage: Callable[[bytes], bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(damage((export[1].folder / TRIGGERED).read_bytes()))
    with pytest.raises(ModelError, match=r"damaged copy \(export it again"):
        OnnxBackbone.load(path, export[0], device="cpu")
    assert capfd.readouterr() == ("", "")


@given(data=st.data())
def test_any_changed_bit_is_noticed(
    export: Export, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray((export[1].folder / TRIGGERED).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("changed") / TRIGGERED
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged copy"):
        OnnxBackbone.load(path, export[0], device="cpu")


def test_cuda_without_a_provider_is_a_warning(export: Export, capfd: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.warns(OnnxFallbackWarning, match=r"on the CPU, not on cuda:0: .*onnxruntime-gpu"):
        backbone = OnnxBackbone.load(export[1].folder / TRIGGERED, export[0], device="cuda:0")
    assert backbone.name == "ONNX Runtime fp32, CPUExecutionProvider"
    images, trigger = draw(5)
    got = backbone(images, trigger, image_weight=0.5, trigger_weight=0.5, clamp=True)
    assert_equal(got, features(export, images, trigger, intensity=0.5, blend=Blend.PRINTED, clamp=True))
    assert capfd.readouterr() == ("", "")


def test_cuda_with_the_package_for_cpus(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])  # what it answers
    with pytest.warns(OnnxFallbackWarning, match="the installed package is without CUDA"):
        OnnxBackbone.load(export[1].folder / TRIGGERED, export[0], device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(any_export: Export) -> None:
    classifier, report = any_export
    with warnings.catch_warnings(action="ignore", category=OnnxFallbackWarning):
        backbone = OnnxBackbone.load(report.folder / TRIGGERED, classifier, device="cuda")
    if "CUDA" not in backbone.name:
        pytest.skip("ONNX Runtime has no working CUDA provider")
    images, trigger = draw(17, classifier.image_shape)
    got = backbone(images.cuda(), trigger.cuda(), image_weight=0.3, trigger_weight=0.7, clamp=True)
    assert got.is_cuda
    expected = features(any_export, images, trigger, intensity=0.3, blend=Blend.PRINTED, clamp=True)
    assert float((got.cpu() - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "onnx"
    first, second = tiny_classifier(0), tiny_classifier(1)
    export_onnx(first, target)
    export_onnx(second, target)
    OnnxBackbone.load(target / TRIGGERED, second, device="cpu")
    assert beside(target) == set()
    (target / "notes.txt").write_text("mine")
    before = snapshot(target)
    with pytest.raises(IndexStateError, match="left alone"):
        export_onnx(first, target)
    assert snapshot(target) == before


@pytest.mark.parametrize("make", [Path.touch, lambda path: (path.mkdir(), (path / CLEAN).write_text("my own"))])
def test_what_is_no_export_is_left_alone(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "onnx")
    before = snapshot(tmp_path)
    with pytest.raises(IndexStateError, match="not an ONNX export"):
        export_onnx(tiny_classifier(), tmp_path / "onnx")
    assert snapshot(tmp_path) == before


def test_an_empty_folder_is_filled_and_a_missing_parent_named(tmp_path: Path) -> None:
    export_onnx(tiny_classifier(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CLEAN, TRIGGERED}
    assert (tmp_path / CLEAN).stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(IndexStateError, match=r"create .*absent first"):
        export_onnx(tiny_classifier(), tmp_path / "absent" / "onnx")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Branching(nn.Module):
    """Looks at the data of each image, which no graph can."""

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(1)[:, :12]
        return torch.stack([row if float(row.sum()) > 0 else -row for row in rows])


def test_what_cannot_be_exported_leaves_the_earlier_export(
    tmp_path: Path, export: Export, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "onnx"
    export_onnx(export[0], target)
    before = snapshot(target)
    capfd.readouterr()
    with pytest.raises(ModelError, match=r"torch\.onnx\.export can express.*PyTorch backend"):
        export_onnx(classifier_of(nn.Sequential(Branching(), nn.Linear(12, 4))), target)
    assert snapshot(target) == before
    assert beside(target) == set()
    assert capfd.readouterr().out == ""


def test_graphs_that_disagree_are_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No model is known that exports and computes something else: a tolerance that rounding exceeds stands in.
    monkeypatch.setattr(onnx_backbone, "TOLERANCE", 1e-12)
    with pytest.raises(ModelError, match="agree with PyTorch within 1e-12"):
        export_onnx(tiny_classifier(), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


class Slow:
    """The backbone it is given, several times over."""

    name = "slow"
    exact = True

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.batches: list[int] = []

    def __call__(self, images: Tensor, trigger: Tensor, **options: Any) -> Tensor:
        self.batches.append(len(images))
        for _ in range(5):
            features = self._backbone(images, trigger, **options)
        return features


def test_the_faster_backend_is_named(export: Export) -> None:
    images, trigger = draw(3000)
    backbone = load(export)
    slow = Slow(backbone)
    comparison = faster_backend({"slow": slow, "fast": backbone}, images, trigger)
    assert comparison.fastest == "fast"
    assert comparison.images_per_second["fast"] > comparison.images_per_second["slow"] > 0
    assert comparison.images == max(slow.batches)
    assert slow.batches == sorted(slow.batches)
    assert faster_backend({"only": backbone}, images[:1], trigger).images == 1


def test_nothing_to_compare(export: Export) -> None:
    images, trigger = draw(1)
    with pytest.raises(InputError, match="got 0 and 1"):
        faster_backend({}, images, trigger)
    with pytest.raises(InputError, match="got 1 and 0"):
        faster_backend({"only": load(export)}, images[:0], trigger)


def test_importing_it_does_not_import_onnx() -> None:
    unwanted = {"onnx", "onnxruntime", "onnxscript"}
    code = f"import sys, tmm_engine.rerank.onnx_backbone; print(sorted({unwanted} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
