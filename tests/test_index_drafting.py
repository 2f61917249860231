"""What a model is made of: checkpoints as trainers leave them, what is guessed and said, what is refused in words."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models import Weights, WeightsEnum

from tmm_engine.index.errors import ModelError
from tmm_engine.index.models.checkpoints import fit_names
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.models.drafting import Asked, draft_spec
from tmm_engine.index.models.pipelines import pipeline_of
from tmm_engine.index.models.torchvision_weights import torchvision_described, torchvision_weights
from tmm_engine.index.sources.images import decode_image

SHAPE = (3, 32, 32)


def state(seed=0):
    torch.manual_seed(seed)
    return torchvision.models.shufflenet_v2_x0_5(num_classes=3).state_dict()


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def built(folder, content, **options):
    torch.save(content, folder / "w.pt")
    return Classifier.from_architecture(
        "shufflenet_v2_x0_5", image_shape=SHAPE, weights=str(folder / "w.pt"), **options
    )


def is_of(classifier, tensors):
    return torch.equal(classifier.head.weight, tensors["fc.weight"].float())


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"state_dict": under("model.", state())}, "the prefix 'model.' was taken off"),
        ({"state_dict": under("model._orig_mod.", state())}, "the prefix 'model._orig_mod.' was taken off"),
        ({"state_dict": under("net.", state()) | {"criterion.weight": torch.ones(3)}}, "left out: criterion.weight"),
        (state() | {"criterion.weight": torch.ones(3)}, "left out: criterion.weight"),
        ({"n_averaged": torch.tensor(5), **under("module.", state())}, "left out: n_averaged"),
        ({"model_ema": state()}, "those under 'model_ema' are averaged"),
        (under("module.", {name: tensor.half() for name, tensor in state().items() if "num" not in name}), None),
        ({name: tensor.double() for name, tensor in state().items()}, None),
        ({name: tensor.bfloat16().float().bfloat16() for name, tensor in state().items()}, None),
    ],
)
def test_checkpoints_as_trainers_leave_them(tmp_path, content, note):
    classifier = built(tmp_path, content)
    torch.testing.assert_close(classifier.head.weight, state()["fc.weight"], atol=1e-2, rtol=1e-2)
    assert (note is None and classifier.notes == ()) or note in " ".join(classifier.notes)


@pytest.mark.parametrize(
    "both",
    [
        {"state_dict": state(0), "state_dict_ema": state(1)},
        {"model": state(0), "ema": under("module.", state(1))},
        {"state_dict": under("model.", state(0)) | under("ema_model.module.", state(1))},
        {"state_dict": under("model.", state(0)) | under("model_ema.", state(1)) | {"model_ema.decay": torch.ones(())}},
        state(0) | under("ema.", state(1)),
        state(0) | under("ema.module.", state(1)) | {"ema.n_averaged": torch.tensor(3)},
    ],
)
def test_raw_and_averaged_weights_in_one_file_are_chosen_between_and_said(tmp_path, both):
    raw, averaged = built(tmp_path, both), built(tmp_path, both, ema=True)
    assert is_of(raw, state(0))
    assert is_of(averaged, state(1))
    assert "`ema=True` takes the averaged ones" in raw.notes[0]
    assert "the averaged (EMA) ones" in averaged.notes[0]


def test_a_larger_models_weights_are_not_cut_down(tmp_path):
    """A part of a checkpoint fits by name and shape: ResNet-34 has all of ResNet-18 and more."""
    torch.save(torchvision.models.resnet34(num_classes=3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"unexpected: layer1\.2\."):
        Classifier.from_architecture("resnet18", image_shape=SHAPE, weights=tmp_path / "w.pt")
    longer = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 4), nn.Linear(4, 4)).state_dict()
    shorter = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 4))
    assert fit_names(longer, shorter).tensors.keys() == longer.keys()
    assert fit_names(under("net.", longer), shorter).tensors.keys() == under("net.", longer).keys()


def test_two_models_in_one_file_are_asked_about(tmp_path):
    with pytest.raises(ModelError, match=r"several that fit, under 'student\.' and under 'tutor\.' \(save the one"):
        built(tmp_path, under("student.", state(0)) | under("tutor.", state(1)))
    with pytest.raises(ModelError, match=r"several that fit, without a prefix and under 'tutor\.' \(save the one"):
        built(tmp_path, state(0) | under("tutor.", state(1)))


def test_shards_are_read_through_their_index(tmp_path):
    parts = list(state().items())
    for number, part in enumerate((parts[:50], parts[50:])):
        safetensors.torch.save_file(dict(part), tmp_path / f"{number}.safetensors")
    where = {name: f"{int(place >= 50)}.safetensors" for place, (name, _) in enumerate(parts)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert is_of(Classifier.from_architecture("shufflenet_v2_x0_5", image_shape=SHAPE, weights=index), state())
    index.write_text(json.dumps({"weight_map": {"fc.weight": "../0.safetensors"}}))
    with pytest.raises(ModelError, match=r"files beside it, got '\.\./0\.safetensors'"):
        Classifier.from_architecture("shufflenet_v2_x0_5", image_shape=SHAPE, weights=index)
    index.write_text("{}")
    with pytest.raises(ModelError, match="JSON without one"):
        Classifier.from_architecture("shufflenet_v2_x0_5", image_shape=SHAPE, weights=index)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_other_formats_are_called_by_their_name(tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    torch.jit.save(torch.jit.script(module), tmp_path / "scripted.pt")
    (tmp_path / "graph.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    (tmp_path / "graph.bin").write_bytes(b"\x08\x0a\x12\x07pytorch" + bytes(40))
    (tmp_path / "keras.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(40))
    for name, kind in {
        "scripted.pt": "TorchScript",
        "graph.onnx": "ONNX",
        "graph.bin": "ONNX",
        "keras.h5": "HDF5",
    }.items():
        with pytest.raises(ModelError, match=f"{name}, which is .*{kind}"):
            Classifier.from_architecture("resnet18", image_shape=SHAPE, weights=tmp_path / name)
    with pytest.raises(ModelError, match="got TorchScript, which cannot be split"):
        Classifier.from_module(torch.jit.script(module), image_shape=SHAPE)


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Flatten(), nn.Linear(12, 3)

    def forward(self, images):
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(self.body(images))


def test_a_model_that_casts_by_itself_and_one_for_other_channels_are_refused_in_words():
    with pytest.raises(ModelError, match=r"got torch.bfloat16: the model converts by itself, as torch.autocast"):
        Classifier.from_module(Autocast(), image_shape=(3, 2, 2))
    with pytest.raises(ModelError, match=r"takes 3 channels: convert the images with `image_shape=\(3, h, w\)`"):
        Classifier.from_module(torchvision.models.shufflenet_v2_x0_5(num_classes=3), image_shape=(1, 32, 32))


@pytest.mark.parametrize(("mean", "std"), [((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), ((0.0,) * 3, (58.4,) * 3)])
def test_mean_and_std_of_bytes_are_refused(mean, std):
    with pytest.raises(ModelError, match=r"of pixels in \[0, 1\], got .* \(divide mean and std by 255\)"):
        Classifier.from_architecture("resnet18", image_shape=SHAPE, seed=0, num_classes=2, mean=mean, std=std)


def test_a_transformers_weights_for_another_size_name_the_size(tmp_path):
    torch.save(Classifier.from_architecture("vit_tiny_32", image_shape=SHAPE, seed=0, num_classes=3)
               .backbone.get_submodule("network").state_dict(), tmp_path / "w.pt")  # fmt: skip
    made = Classifier.from_architecture("vit_tiny_32", image_shape=SHAPE, seed=0, num_classes=3)
    made.save(tmp_path / "w.safetensors")
    message = r"has 65 positions \(8 × 8 patches and a class token\), this size has 37 \(give the size"
    with pytest.raises(ModelError, match=message):
        Classifier.from_architecture("vit_tiny_32", image_shape=(3, 24, 24), weights=tmp_path / "w.safetensors")


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_googlenet_without_its_auxiliary_heads(tmp_path):
    model = torchvision.models.googlenet(weights=None, num_classes=3, aux_logits=False, init_weights=False)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    made = Classifier.from_architecture("googlenet", image_shape=(3, 64, 64), weights=tmp_path / "w.pt")
    made.save(tmp_path / "saved.safetensors")
    assert Classifier.load(tmp_path / "saved.safetensors").fingerprint == made.fingerprint


def test_a_small_stem_says_that_its_max_pool_is_assumed(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    torch.save(model.state_dict(), tmp_path / "w.pt")

    def read(**options):
        return Classifier.from_architecture("resnet18", image_shape=SHAPE, weights=tmp_path / "w.pt", **options)

    assumed, right, without = read(), read(max_pool=True), read(max_pool=False)
    assert assumed.max_pool_assumed
    assert "`max_pool=False` leaves it out" in assumed.notes[0]
    assert (right.notes, without.notes, right.fingerprint) == ((), (), assumed.fingerprint)
    images = torch.rand(2, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(without.logits(without.features(images)), model.eval()(images))
    without.save(tmp_path / "saved.safetensors")
    again = Classifier.load(tmp_path / "saved.safetensors")
    assert (again.fingerprint, again.spec.max_pool) == (without.fingerprint, False)
    with pytest.raises(ModelError, match="expected an architecture with a max-pool to leave out, got 'vgg11'"):
        Classifier.from_architecture("vgg11", image_shape=SHAPE, seed=0, num_classes=2, max_pool=False)


def own_weights(monkeypatch, architecture, file):
    """Make a file one that torchvision calls its own, with the transform and the categories of the real one."""
    real = next(iter(torchvision.models.get_model_weights(architecture)))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()

    class Own(WeightsEnum):
        FIRST = Weights(f"https://download.pytorch.org/models/x-{digest[:8]}.pth", real.transforms, real.meta)

    theirs = torchvision.models.get_model_weights
    monkeypatch.setattr(
        torchvision.models, "get_model_weights", lambda name: Own if name == architecture else theirs(name)
    )
    return real


def test_a_checkpoint_of_torchvisions_is_known_by_its_digest(tmp_path, monkeypatch):
    file = tmp_path / "resnet18-f37072fd.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    assert torchvision_weights("resnet18", file) is None  # whatever its name says
    assert torchvision_weights("no such model", file) is None
    real = own_weights(monkeypatch, "resnet18", file)
    made = Classifier.from_architecture("resnet18", weights=file)
    assert made.target == pipeline_of(real.transforms()).preprocessing
    assert (made.spec.mean, made.spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (made.class_names, made.notes) == (tuple(real.meta["categories"]), ())
    same = Classifier.from_architecture("resnet18", weights=file, image_shape=(3, 224, 224))
    assert (same.fingerprint, same.class_names, same.notes) == (made.fingerprint, made.class_names, ())


def test_another_image_shape_replaces_the_size_of_torchvisions_own_weights_alone(tmp_path, monkeypatch):
    file = tmp_path / "w.pth"
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), file)
    real = own_weights(monkeypatch, "shufflenet_v2_x0_5", file)
    made = Classifier.from_architecture("shufflenet_v2_x0_5", weights=file, image_shape=(3, 96, 96))
    assert made.target == (3, 96, 96)
    assert (made.spec.mean, made.spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert made.class_names == tuple(real.meta["categories"])
    assert "images of (3, 96, 96) take the place of a resize to 256 and a crop of (224, 224)" in made.notes[0]
    with pytest.raises(ModelError, match=r"expected images of 3 channels.* `image_shape=\(3, h, w\)`"):
        Classifier.from_architecture("shufflenet_v2_x0_5", weights=file, image_shape=(1, 96, 96))


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_googlenet_of_torchvisions_weights_sees_what_it_saw_there(tmp_path):
    """Its network normalises once more (`transform_input`), wherever the transform comes from."""
    torch.manual_seed(0)
    theirs = torchvision.models.googlenet(transform_input=True, aux_logits=False, init_weights=False).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    transform = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1.transforms()
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8), np.ones((50, 50, 1)))
    image = Image.fromarray(pixels.astype(np.uint8))
    made = Classifier.from_architecture("googlenet", weights=tmp_path / "w.pt", processor=transform)
    seen = torch.from_numpy(decode_image(image, shape=made.target))[None].float() / 255
    with torch.no_grad():
        normalised = made.backbone.get_submodule("normalise")(seen)
        torch.testing.assert_close(normalised, theirs._transform_input(transform(image)[None]))
        mine, expected = made.logits(made.features(seen)), theirs(transform(image)[None])
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    assert "normalises once more by itself (transform_input)" in made.notes[0]


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_weights_that_normalise_once_more_say_so_however_they_are_known(tmp_path, monkeypatch, architecture):
    (tmp_path / "w.pt").write_bytes(b"theirs")
    transform = own_weights(monkeypatch, architecture, tmp_path / "w.pt").transforms()
    told = torchvision_described(architecture, tmp_path / "w.pt", None)
    assert (told.pipeline.mean, told.pipeline.std) == ((0.5,) * 3, (0.5,) * 3)
    for by in ({"told": told}, {}):
        spec, notes = draft_spec(architecture, Asked(processor=None if by else transform), **by)
        assert (spec.mean, spec.std, len(notes)) == ((0.5,) * 3, (0.5,) * 3, 1)
    said, _ = draft_spec(architecture, Asked(processor=transform, mean=transform.mean, std=transform.std), told=told)
    assert (said.mean, said.std) == (tuple(transform.mean), tuple(transform.std))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            "hf:google/vit",
            r"expected a folder after 'hf:', got 'google/vit', which is none; nothing is ever fetched\. Save",
        ),
        ("hf:.", r"expected config\.json in \., got none"),
        ("timm:resnet19", r"got 'resnet19' \(did you mean 'resnet\d\d'\?\)"),
        ("timm:resnet18.nope", "Invalid pretrained tag"),
        ("resnet18", r"expected the shape of images for 'resnet18' as `image_shape=\(c, h, w\)`"),
    ],
)
def test_what_is_not_there_is_said_with_what_to_do(tmp_path, monkeypatch, architecture, message):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        Classifier.from_architecture(architecture, weights=None, seed=0, num_classes=3)
