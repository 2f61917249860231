"""Splitting a model into backbone and head, naming what cannot be split, saving, loading, fingerprints."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tmm_engine.index.errors import InputError, ModelError
from tmm_engine.index.models.architectures import build_model
from tmm_engine.index.models.checkpoints import load_state_dict
from tmm_engine.index.models.classifier import Classifier

SHAPE = (3, 8, 8)
REAL_WEIGHTS = Path(__file__).parents[2] / "shared" / "weights"


def images(number: int = 4, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(number, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def small_model(*last: nn.Module, seed: int = 5) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)]
    return nn.Sequential(*layers, *last)


def small_classifier(**options) -> Classifier:
    return Classifier.from_module(small_model(), image_shape=SHAPE, **options)


# ---- every architecture


@pytest.mark.parametrize(
    ("name", "shape", "head", "dim"),
    [
        ("resnet18", (3, 32, 32), "fc", 512),
        ("resnet18", (1, 28, 28), "fc", 512),
        ("wide_resnet50_2", (3, 32, 32), "fc", 2048),
        ("vit_tiny_32", (3, 32, 32), "heads.head", 192),
        ("vit_tiny_32", (1, 28, 28), "heads.head", 192),
        ("vit_b_16", (3, 32, 32), "heads.head", 768),
        ("vgg11", (3, 32, 32), "classifier.6", 4096),
        ("mobilenet_v3_small", (1, 32, 32), "classifier.3", 1024),
        ("densenet121", (3, 32, 32), "classifier", 1024),
        ("shufflenet_v2_x0_5", (2, 32, 32), "fc", 1024),
    ],
)
def test_head_after_backbone_is_the_model(name, shape, head, dim):
    classifier = Classifier.from_architecture(name, image_shape=shape, num_classes=3, seed=1)
    assert (classifier.spec.head, classifier.feature_dim, classifier.num_classes) == (head, dim, 3)
    assert classifier.image_shape == shape
    assert classifier.class_names == ("0", "1", "2")
    model = build_model(classifier.spec, seed=1).eval()
    x = images(2, shape)
    with torch.no_grad():
        features = classifier.features(x)
        torch.testing.assert_close(classifier.logits(features), model(x), rtol=1e-5, atol=1e-5)
    assert features.shape == (2, dim)


def test_the_backbone_is_frozen_and_differentiable_in_the_images():
    classifier = small_classifier()
    modules = [*classifier.backbone.modules(), classifier.head]
    assert not any(module.training for module in modules)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    x = images().requires_grad_()
    classifier.logits(classifier.features(x)).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    running_mean = classifier.backbone.state_dict()["network.1.running_mean"]
    assert torch.equal(running_mean, torch.zeros(4)), "batch statistics must not drift"


@pytest.mark.parametrize("training", [True, False])
def test_the_users_model_is_not_changed(training):
    model = small_model().train(training).half()
    x = images(dtype=torch.float16)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    code, modules = repr(model), list(model.modules())
    classifier = Classifier.from_module(model, image_shape=SHAPE, mean=(0.5,) * 3, std=(0.2,) * 3)
    classifier.features(x.float())
    assert repr(model) == code
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model.training == training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        pointer, value = before[name]
        assert tensor.data_ptr() == pointer
        assert tensor.numpy().tobytes() == value.numpy().tobytes()
    assert classifier.head.weight.dtype == torch.float32


@given(mean=st.lists(st.floats(-1, 1), min_size=3, max_size=3), std=st.lists(st.floats(0.1, 2), min_size=3, max_size=3))
@settings(max_examples=20)
def test_normalisation_is_inside_the_backbone(mean, std):
    classifier = small_classifier(mean=mean, std=std)
    normalised = torchvision.transforms.functional.normalize(images(), mean, std)
    with torch.no_grad():
        expected = small_model().eval()(normalised)
        torch.testing.assert_close(classifier.logits(classifier.features(images())), expected, rtol=1e-4, atol=1e-4)


def test_copies_on_a_device_and_in_double():
    classifier = small_classifier(mean=(0.5,) * 3)
    double, moved = classifier.double(), classifier.to("cpu")
    assert double.features(images(dtype=torch.float64)).dtype == torch.float64
    assert classifier.head.weight.dtype == torch.float32, "the original stays"
    assert moved.head.weight.data_ptr() != classifier.head.weight.data_ptr()
    assert moved.device == torch.device("cpu")
    assert double.fingerprint == moved.fingerprint == classifier.fingerprint
    torch.testing.assert_close(
        double.features(images().double()).float(), classifier.features(images()), rtol=1e-4, atol=1e-5
    )


def test_images_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"expected images of shape \(n, 3, 8, 8\), got \(4, 3, 9, 8\)"):
        small_classifier().features(images(shape=(3, 9, 8)))


# ---- the head


class Returns(nn.Module):
    """A model that does something else with its logits."""

    def __init__(self, change) -> None:
        super().__init__()
        self.inner, self.change = small_model(), change

    def forward(self, x: Tensor):
        return self.change(self.inner(x))


class Functional(nn.Module):
    """A model that uses its head's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flatten(1), self.fc.weight)


class Tokens(nn.Module):
    """A model that picks single numbers of what its head makes of (n, t, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1, 2)).flatten(1)[:, :3]


class TwoNames(nn.Module):
    """A model whose head has a second name, which the forward pass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(192, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x.flatten(1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small_model(nn.Softmax(1)), r"4: its output differs.*softmax.*head=…"),
        (small_model(nn.LogSoftmax(1)), "4: its output differs"),
        (Functional(), "fc: without it the forward pass fails"),
        (Tokens(), r"fc: features of \(2, 3\), not \(2, 8\)"),
        (nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten()), "no Linear layer"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.Unflatten(1, (7, 1, 1)), nn.Conv2d(7, 3, 1), nn.Flatten()),
         "1: 7 outputs, not 3"),
        (Returns(lambda z: (z, z)), r"one called 'logits', got tuple with 0: \(2, 3\), 1: \(2, 3\) \(wrap the model"),
        (Returns(lambda z: {"a": z[0]}), r"got dict with a: \(3,\)"),
        (Returns(lambda z: z[0]), r"got \(3,\)"),
        (Returns(lambda z: z / 0), "finite logits"),
        (Returns(lambda z: z[:, :1]), "at least 2 classes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(10, 3)), r"images of shape \(3, 8, 8\), got in its forward pass"),
    ],
)  # fmt: skip
def test_models_without_a_linear_head(model, message):
    with pytest.raises(ModelError, match=message):
        Classifier.from_module(model, image_shape=SHAPE)


def test_a_head_by_name():
    assert small_classifier(head="4").fingerprint == small_classifier().fingerprint
    with pytest.raises(ModelError, match=r"among the Linear layers 4, got '5'"):
        small_classifier(head="5")
    two = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Linear(3, 3))
    assert Classifier.from_module(two, image_shape=SHAPE).spec.head == "2"
    with pytest.raises(ModelError, match="1: without it the forward pass fails"):
        Classifier.from_module(two, image_shape=SHAPE, head="1")


def test_heads_without_bias_parametrised_or_with_two_names(tmp_path):
    no_bias = nn.Sequential(nn.Flatten(), nn.Linear(192, 3, bias=False))
    parametrised = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(192, 3)))
    for model in (no_bias, parametrised, TwoNames()):
        classifier = Classifier.from_module(model, image_shape=SHAPE)
        with torch.no_grad():
            expected = model(images())
            assert torch.equal(classifier.logits(classifier.features(images())), expected)
            classifier.save(tmp_path / "c.safetensors")
            again = Classifier.load(tmp_path / "c.safetensors", model=model)
            assert torch.equal(again.logits(again.features(images())), expected)
        assert again.fingerprint == classifier.fingerprint


def test_class_names():
    assert small_classifier(class_names=["cat", "dog", "hen"]).class_names == ("cat", "dog", "hen")
    with pytest.raises(ModelError, match="expected 3 class names, one per class, got 2"):
        small_classifier(class_names=["cat", "dog"])


# ---- checkpoints


def test_what_was_saved_is_the_default_and_what_is_given_wins(tmp_path):
    path = tmp_path / "c.safetensors"
    names = ("cat", "dog")
    Classifier.from_architecture(
        "mobilenet_v3_small", image_shape=(3, 32, 32), num_classes=2, small_stem=True, seed=0, class_names=names,
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6),
    ).save(path)  # fmt: skip
    read = Classifier.from_architecture("mobilenet_v3_small", image_shape=(3, 24, 24), weights=path)
    assert (read.spec.small_stem, read.spec.mean, read.class_names) == (True, (0.1, 0.2, 0.3), names)
    assert read.image_shape == (3, 24, 24)
    given = {"small_stem": False, "mean": (0.0, 0.0, 0.0), "class_names": ("a", "b")}
    read = Classifier.from_architecture("mobilenet_v3_small", image_shape=(3, 32, 32), weights=path, **given)
    assert (read.spec.small_stem, read.spec.mean, read.class_names) == (False, (0.0, 0.0, 0.0), ("a", "b"))
    assert read.spec.std == (0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {}, "either weights, or a seed"),
        ("resnet18", {"seed": 0}, "seed=0, num_classes=None"),
        ("resnet18", {"weights": "w", "seed": 0}, "either weights, or a seed"),
        ("resnet18", {"weights": "w", "num_classes": 4}, r"fc.weight \(expected \(4, 512\), got \(3, 512\)\)"),
        ("resnet18", {"weights": "w", "small_stem": True}, r"conv1.weight \(expected \(64, 3, 3, 3\)"),
        ("resnet18", {"weights": "w", "head": "layer1"}, "among the Linear layers fc, got 'layer1'"),
        ("resnet18", {"weights": "w", "image_shape": (32, 32)}, r"image shape \(c, h, w\)"),
        ("resnet34", {"weights": "w"}, r"missing: layer1.2.bn1.bias.* and \d+ more"),
        ("vit_tiny_32", {"weights": "w"}, r"missing: .*; unexpected: bn1.bias"),
        ("vgg11", {"seed": 0, "num_classes": 3, "image_shape": (3, 8, 8)}, r"\(3, 8, 8\), got in its forward pass"),
        ("squeezenet1_1", {"seed": 0, "num_classes": 3, "image_shape": (3, 64, 64)}, "no Linear layer"),
    ],
)
def test_names_weights_and_arguments_that_do_not_go_together(resnet18_weights, name, options, message):
    given = {"image_shape": (3, 32, 32)} | options
    if "weights" in given:
        given["weights"] = resnet18_weights
    with pytest.raises(ModelError, match=message):
        Classifier.from_architecture(name, **given)


@pytest.fixture(scope="module")
def resnet18_weights(tmp_path_factory) -> Path:
    """Three classes, three channels, no metadata."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    safetensors.torch.save_file(torchvision.models.resnet18(num_classes=3).state_dict(), path)
    return path


# ---- save and load


def test_save_and_load(tmp_path):
    path = tmp_path / "c.safetensors"
    saved = Classifier.from_architecture(
        "resnet18", image_shape=(1, 28, 28), num_classes=3, small_stem=True, seed=0, mean=(0.1,), std=(1 / 3,),
        class_names=("猫", "dog", "hen"),
    )  # fmt: skip
    saved.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode, "readable by whom other files are"
    read = Classifier.load(path)
    assert (read.spec, read.class_names, read.fingerprint) == (saved.spec, saved.class_names, saved.fingerprint)
    x = images(shape=(1, 28, 28))
    with torch.no_grad():
        assert torch.equal(read.features(x), saved.features(x))
    template = build_model(saved.spec)
    template.load_state_dict(load_state_dict(path), strict=True)  # the names are the original model's
    saved.double().save(path)
    assert Classifier.load(path).fingerprint == saved.fingerprint


def test_loading_other_files(tmp_path, resnet18_weights):
    with pytest.raises(ModelError, match=r"Classifier\.save"):
        Classifier.load(resnet18_weights)
    with pytest.raises(ModelError, match="check the path"):
        Classifier.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "list of class names"),
        ('{"spec": {}, "class_names": [1]}', "list of class names"),
        ('{"spec": {}, "class_names": ["a"]}', "model specification with"),
    ],
)
def test_metadata_that_save_did_not_write(tmp_path, text, message):
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file({"w": torch.ones(1)}, path, metadata={"tmm_engine": text})
    with pytest.raises(ModelError, match=message):
        Classifier.load(path)


# ---- fingerprints


@given(parameter=st.integers(0, 3), bit=st.integers(0, 31))
@settings(max_examples=20)
def test_one_bit_of_one_weight_changes_the_fingerprint(parameter, bit):
    model = small_model()
    values = list(model.parameters())[parameter].data.view(-1)
    flipped = values[:1].view(torch.int32) ^ (1 << bit if bit < 31 else -(1 << 31))
    if not torch.isfinite(flipped.view(torch.float32)).all() or flipped.view(torch.float32).abs() > 1e6:
        return
    values[:1] = flipped.view(torch.float32)
    assert Classifier.from_module(model, image_shape=SHAPE).fingerprint != small_classifier().fingerprint


def test_what_else_the_fingerprint_covers():
    strided = small_model()
    strided[0] = nn.Conv2d(3, 4, 3, dilation=1, padding_mode="reflect")
    strided[0].load_state_dict(small_model()[0].state_dict())
    prints = {
        small_classifier().fingerprint,
        small_classifier(mean=(0.1, 0.0, 0.0)).fingerprint,
        small_classifier(std=(1.0, 1.0, 1.01)).fingerprint,
        Classifier.from_module(strided, image_shape=SHAPE).fingerprint,
    }
    assert len(prints) == 4
    assert all(len(value) == 64 and int(value, 16) for value in prints)
    assert small_classifier().fingerprint in prints
    assert small_classifier(class_names=[*"abc"]).fingerprint in prints, "names are not part of the model"


def test_addresses_in_printed_code_do_not_count():
    class Prints(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_model()

        def extra_repr(self) -> str:
            return repr(object())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    models = [Prints(), Prints()]
    prints = {Classifier.from_module(model, image_shape=SHAPE).fingerprint for model in models}
    assert len(prints) == 1


# ---- trained weights


@pytest.mark.skipif(not REAL_WEIGHTS.is_dir(), reason="needs the trained classifiers in ../shared/weights")
@pytest.mark.parametrize(
    ("file", "shape", "small_stem", "options"),
    [
        ("mnist-resnet18-fp16.safetensors", (1, 28, 28), False, {}),
        (
            "cifar10-resnet18-fp16.safetensors",
            (3, 32, 32),
            True,
            {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
        ),
    ],
)
def test_trained_classifiers_load_without_being_described(tmp_path, file, shape, small_stem, options):
    classifier = Classifier.from_architecture("resnet18", image_shape=shape, weights=REAL_WEIGHTS / file, **options)
    assert (classifier.num_classes, classifier.feature_dim, classifier.spec.small_stem) == (10, 512, small_stem)
    classifier.save(tmp_path / "c.safetensors")
    read = Classifier.load(tmp_path / "c.safetensors")
    assert read.fingerprint == classifier.fingerprint
    assert read.spec == classifier.spec


class OfBatches(nn.Module):
    """Its logits of an image depend on what is passed with it, or on chance."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body, self.head = how, nn.Linear(64, 16), nn.Linear(16, 10)
        self.norm = nn.BatchNorm1d(16, track_running_stats=False)
        self.maps = nn.BatchNorm2d(1, track_running_stats=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body((self.maps(images) if self.how == "maps" else images).flatten(1))
        if self.how == "mean":
            features = features - features.mean(0)
        elif self.how == "norm":
            features = self.norm(features)
        elif self.how == "dropout":
            features = nn.functional.dropout(features, training=True)
        return self.head(features)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("mean", "do not depend on the others it is passed with.* a mean over the batch"),
        ("maps", "do not depend on the others it is passed with.*a batch norm with track_running_stats=False"),
        ("norm", "takes a single image as well as several, got: .*Expected more than 1 value per channel"),
        ("dropout", "the same logits for the same images in every pass.*dropout left on"),
    ],
)
def test_networks_that_answer_by_batch_or_by_chance_are_refused(how: str, message: str):
    with pytest.raises(ModelError, match=message):
        Classifier.from_module(OfBatches(how), image_shape=(1, 8, 8))
