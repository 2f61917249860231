"""Specifications and what is built from them: torchvision's names, the small ViT, the user's factories."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tmm_engine.index.errors import ModelError
from tmm_engine.index.models.architectures import ModelSpec, build_model, fit_spec, own_copy
from tmm_engine.index.models.checkpoints import load_state_dict
from tmm_engine.index.models.classifier import Classifier

SHAPE = (3, 8, 8)
FACTORY_CODE = """
import torch
from torch import nn

def small():
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

def broken():
    raise RuntimeError("no such file: weights.pt")

def number():
    return 3
"""


def small_model(*, seed: int = 5) -> nn.Sequential:
    """What the factory makes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def spec(architecture: str, *, shape: tuple[int, int, int] = (3, 32, 32), **options) -> ModelSpec:
    channels, *size = shape
    values = {"num_classes": 3, "small_stem": False, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    return ModelSpec(architecture, in_channels=channels, image_size=tuple(size), **values | options)


# ---- specifications


# The arguments only: beartype, which checks ModelSpec in tests, draws samples at random, and hypothesis forbids that.
specifications = st.builds(
    dict,
    architecture=st.sampled_from(["resnet18", "module", "a.b:c"]),
    num_classes=st.integers(2, 1000),
    in_channels=st.just(2),
    small_stem=st.booleans(),
    image_size=st.tuples(st.integers(1, 512), st.integers(1, 512)),
    mean=st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
    std=st.tuples(st.floats(1e-3, 9), st.floats(1e-3, 9)),
    head=st.text(max_size=5),
)


@given(specifications)
def test_a_specification_survives_json(arguments):
    spec = ModelSpec(**arguments)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert ModelSpec.from_json(spec.to_json()) == spec


@given(specifications, st.data())
@settings(max_examples=50)
def test_a_specification_with_a_wrong_attribute_is_refused(arguments, data):
    name = data.draw(st.sampled_from(list(arguments)))
    wrong = data.draw(st.sampled_from([None, {}, [], [[1]], -1.5, ["1", "2"], [float("nan"), 1.0]]))
    spec = ModelSpec(**arguments)
    for broken in (spec.to_json() | {name: wrong}, {**spec.to_json(), "extra": 1}, [spec.to_json()]):
        with pytest.raises(ModelError, match="expected"):
            ModelSpec.from_json(broken)


# ---- building


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "at least 2 classes, got 1"),
        ({"shape": (3, 0, 8)}, r"positive image shape \(c, h, w\), got \(3, 0, 8\)"),
        ({"std": (1.0, 0.0, 1.0)}, "std to be positive"),
        ({"mean": (1.0, 0.0)}, "mean to be 3 finite numbers, one per channel"),
        ({"mean": (1.0, 0.0, float("nan"))}, "mean to be 3 finite numbers"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ModelError, match=message):
        spec("resnet18", **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", {}, "did you mean 'resnet18'"),
        ("vit_tiny_32", {"small_stem": True}, "no small_stem for 'vit_tiny_32', got small_stem"),
        ("vit_tiny_32", {"shape": (3, 32, 28)}, "square images.*got 32×28"),
        ("vit_tiny_32", {"shape": (3, 30, 30)}, r"'vit_tiny_32' cannot be built for images of"),
        ("module", {}, "pass the nn.Module or its factory"),
    ],
)
def test_what_cannot_be_built(name, options, message):
    with pytest.raises(ModelError, match=message):
        build_model(spec(name, **options))


def test_only_the_first_convolution_changes():
    usual = build_model(spec("resnet18"))
    small = build_model(spec("resnet18", shape=(1, 28, 28), small_stem=True))
    assert repr(small.conv1) == "Conv2d(1, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)"
    grey = build_model(spec("resnet18", shape=(1, 28, 28)))
    assert repr(grey.conv1) == repr(usual.conv1).replace("Conv2d(3", "Conv2d(1")
    for model in (small, grey):
        assert repr(list(model.children())[1:]) == repr(list(usual.children())[1:])


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, same, other = (build_model(spec("mobilenet_v3_small"), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("name", "shape", "small_stem"),
    [
        ("resnet18", (1, 28, 28), False),
        ("resnet18", (3, 32, 32), True),
        ("densenet121", (3, 32, 32), True),
        ("vit_tiny_32", (1, 28, 28), False),
        ("mobilenet_v3_small", (3, 32, 32), False),
        ("mnasnet0_5", (3, 32, 32), False),
        ("googlenet", (3, 32, 32), False),
    ],
)
def test_classes_and_stem_are_told_by_the_weights(tmp_path, name, shape, small_stem):
    made = Classifier.from_architecture(name, image_shape=shape, num_classes=7, small_stem=small_stem, seed=0)
    made.save(tmp_path / "saved.safetensors")
    bare = tmp_path / "bare.pt"
    torch.save(
        {"state_dict": {f"module.{n}": t for n, t in load_state_dict(tmp_path / "saved.safetensors").items()}}, bare
    )
    for path in (bare, tmp_path / "saved.safetensors"):
        read = Classifier.from_architecture(name, image_shape=shape, weights=path)
        assert read.spec == made.spec
        assert read.fingerprint == made.fingerprint


def test_weights_for_another_number_of_channels():
    weights = build_model(spec("resnet18")).state_dict()
    with pytest.raises(ModelError, match=r"images of 3 channels, as the weights do, got image shape \(1, 28, 28\)"):
        fit_spec(spec("resnet18", shape=(1, 28, 28)), weights)


def test_what_is_given_wins_over_the_weights_and_stays_where_they_do_not_tell():
    known = spec("resnet18")
    weights = build_model(spec("resnet18", num_classes=7, small_stem=True)).state_dict()
    assert fit_spec(known, weights) == spec("resnet18", num_classes=7, small_stem=True)
    assert fit_spec(known, weights, num_classes=5, small_stem=False) == spec("resnet18", num_classes=5)
    assert fit_spec(known, {}) == known


# ---- the user's code


@pytest.fixture
def factory(tmp_path, monkeypatch) -> str:
    """The name of a factory in the current folder, which is not importable yet."""
    (tmp_path / "their_models.py").write_text(FACTORY_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    monkeypatch.delitem(sys.modules, "their_models", raising=False)
    return "their_models:small"


def test_a_factory_in_the_current_folder(factory):
    classifier = Classifier.from_architecture(factory, image_shape=SHAPE)
    assert classifier.spec.architecture == factory
    assert classifier.fingerprint == Classifier.from_module(small_model(), image_shape=SHAPE).fingerprint, (
        "a ready module and its factory agree"
    )


def test_a_factory_with_weights(factory, tmp_path):
    other = small_model(seed=6)
    torch.save(other.state_dict(), tmp_path / "c.pt")
    classifier = Classifier.from_architecture(factory, image_shape=SHAPE, weights=tmp_path / "c.pt", num_classes=3)
    assert classifier.fingerprint == Classifier.from_module(other, image_shape=SHAPE).fingerprint


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("their_models:broken", {}, "RuntimeError: no such file: weights.pt"),
        ("their_models:number", {}, "an nn.Module, got int"),
        ("their_models:absent", {}, "AttributeError"),
        ("no_such_package:model", {}, "ModuleNotFoundError: No module named 'no_such_package'"),
        (":small", {}, "ValueError: Empty module name"),
        ("their_models:small", {"seed": 0}, "neither seed nor small_stem"),
        ("their_models:small", {"small_stem": True}, "neither seed nor small_stem"),
        ("their_models:small", {"small_stem": False}, "neither seed nor small_stem"),
        ("their_models:small", {"num_classes": 4}, "expected 4 classes, got a model of 3"),
    ],
)
def test_factories_that_fail(factory, name, options, message):
    assert factory
    with pytest.raises(ModelError, match=message):
        Classifier.from_architecture(name, image_shape=SHAPE, **options)


def test_code_of_the_users_has_to_be_named_again(tmp_path, factory):
    path = tmp_path / "c.safetensors"
    saved = Classifier.from_architecture(factory, image_shape=SHAPE)
    saved.save(path)
    del sys.modules["their_models"]
    with pytest.raises(ModelError, match=r"'their_models:small'.*model="):
        Classifier.load(path)
    assert "their_models" not in sys.modules, "a name in a file must never be imported"
    for model in (factory, small_model(seed=9)):
        read = Classifier.load(path, model=model)
        assert (read.spec, read.fingerprint) == (saved.spec, saved.fingerprint)
    wider = nn.Sequential(*list(small_model())[:4], nn.Linear(144, 4))
    with pytest.raises(ModelError, match=r"4.bias \(expected \(4,\), got \(3,\)\)"):
        Classifier.load(path, model=wider)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch says it of itself
def test_wrappers_are_taken_off():
    plain = small_model()
    compiled = torch.compile(plain)
    for wrapped in (plain, nn.DataParallel(plain), compiled, nn.DataParallel(compiled)):
        copied = own_copy(wrapped)
        assert repr(copied) == repr(plain)
        assert copied is not plain
        assert copied[0].weight.data_ptr() != plain[0].weight.data_ptr()


def test_a_model_that_cannot_be_copied():
    model = small_model()
    model.cache = model[4].weight * 2  # not a leaf of the graph
    with pytest.raises(ModelError, match=r"copy\.deepcopy"):
        own_copy(model)
