"""Models of timm, transformers and torchvision: our logits are those of the library's own pipeline."""

import dataclasses
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image, ImageOps

from tests.photographs import photographs
from tmm_engine.index.errors import ModelError
from tmm_engine.index.labels import Vocabulary, match_labels
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.models.fingerprints import fingerprint
from tmm_engine.index.models.pipelines import pipeline_of
from tmm_engine.index.sources.images import decode_image

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

CLASSES = 12
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
HF_MODELS = {
    "vit": (
        transformers.ViTConfig(image_size=48, patch_size=8, **SMALL),
        transformers.ViTImageProcessor(size={"height": 48, "width": 48}),
    ),
    "convnext": (
        transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
        transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875),
    ),
    "resnet": (
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        transformers.CLIPImageProcessor(size={"shortest_edge": 70}, crop_size={"height": 63, "width": 63}),
    ),
    "swin": (
        transformers.SwinConfig(image_size=64, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4),
        transformers.ViTImageProcessorPil(size={"height": 64, "width": 64}, resample=3),
    ),
    "mobilevit": (
        transformers.MobileViTConfig(
            image_size=64, hidden_sizes=[12, 16, 20], neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 32],
            num_attention_heads=2,
        ),
        transformers.MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}),
    ),
    "efficientnet": (
        transformers.EfficientNetConfig(
            image_size=64, width_coefficient=0.25, depth_coefficient=0.2, hidden_dim=320, num_hidden_layers=4
        ),
        transformers.EfficientNetImageProcessor(size={"height": 64, "width": 64}, rescale_offset=True),
    ),
}  # fmt: skip
TIMM_MODELS = ["test_vit", "test_resnet.r160_in1k", "test_efficientnet", "test_convnext"]
TORCHVISION_MODELS = {
    "mobilenet_v3_small": torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1,
    "shufflenet_v2_x0_5": torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def opened(files):
    return [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]


def ours(classifier, files):
    images = torch.from_numpy(np.stack([decode_image(file, shape=classifier.target) for file in files]))
    with torch.no_grad():
        return classifier.logits(classifier.features(images.float() / 255))


def assert_same(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(mine.topk(5).indices, theirs.topk(5).indices)
    assert theirs.std(0).mean() > 1e-4, "the model says the same of every picture: nothing was compared"


def seeded(make, *arguments, side=64, **options):
    """A model with random weights and BatchNorms with a past, so that what it says depends on the picture."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = make(*arguments, **options)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                module.momentum = None  # the mean of all batches
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.1)
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        model.train()(torch.randn(8, 3, side, side))
    return model.eval()


def hf_model(kind):
    config, processor = HF_MODELS[kind]
    config.id2label = {label: f"{kind} {label}" for label in range(CLASSES)}
    return seeded(
        transformers.AutoModelForImageClassification.from_config, config, side=getattr(config, "image_size", 64)
    ), processor


@pytest.mark.parametrize("kind", HF_MODELS)
def test_a_folder_of_transformers(kind, tmp_path, files, opened):
    model, processor = hf_model(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    processor.save_pretrained(tmp_path)
    own = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        theirs = torch.cat([model(own(images=image, return_tensors="pt")["pixel_values"]).logits for image in opened])
    classifier = Classifier.from_architecture(f"hf:{tmp_path}")
    assert_same(ours(classifier, files), theirs)
    assert classifier.class_names == tuple(f"{kind} {label}" for label in range(CLASSES))
    classifier.save(tmp_path / "saved.safetensors")
    again = Classifier.load(tmp_path / "saved.safetensors")
    assert (again.fingerprint, again.target) == (classifier.fingerprint, classifier.target)
    assert Classifier.from_module(model, processor=own).fingerprint == classifier.fingerprint


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_a_model_of_timm(name, tmp_path, files, opened):
    model = seeded(timm.create_model, name, num_classes=CLASSES, side=160)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.no_grad():
        theirs = model(torch.stack([transform(image) for image in opened]))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "timm.pt")
    classifier = Classifier.from_architecture(f"timm:{name}", weights=tmp_path / "timm.pt")
    assert_same(ours(classifier, files), theirs)
    classifier.save(tmp_path / "saved.safetensors")
    assert Classifier.load(tmp_path / "saved.safetensors").fingerprint == classifier.fingerprint
    at_hand = Classifier.from_module(model)
    assert (at_hand.target, at_hand.fingerprint) == (classifier.target, classifier.fingerprint)
    assert at_hand.class_names == tuple(map(str, range(CLASSES)))
    assert_same(ours(at_hand, files), theirs)


def test_one_model_of_timms_is_one_whatever_its_weights_are_called(tmp_path):
    model = timm.create_model("test_resnet")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    made = [
        Classifier.from_architecture("timm:test_resnet", weights=tmp_path / "w.pt"),
        Classifier.from_architecture("timm:test_resnet.r160_in1k", weights=tmp_path / "w.pt"),
        Classifier.from_module(model),
    ]
    assert {each.fingerprint for each in made} == {made[0].fingerprint}
    assert {each.spec.architecture for each in made} == {"timm:test_resnet"}
    assert {each.class_names[281] for each in made} == {"tabby, tabby cat"}


def test_a_specification_with_a_tag_as_of_before_builds_and_keeps_its_fingerprint(tmp_path):
    made = Classifier.from_module(timm.create_model("test_resnet", num_classes=3))
    tagged = dataclasses.replace(made.spec, architecture="timm:test_resnet.r160_in1k")
    before = dataclasses.replace(made, spec=tagged)
    before.save(tmp_path / "w.safetensors")
    again = Classifier.load(tmp_path / "w.safetensors")
    network = timm.create_model("test_resnet", num_classes=3)
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"))
    assert again.fingerprint == fingerprint(tagged, network, network.state_dict())


def test_names_are_imagenets_only_where_timm_says_so_and_the_head_has_them(tmp_path):
    many = timm.create_model("test_resnet", num_classes=1000, pretrained_cfg={"tag": "mine", "num_classes": 1000})
    assert Classifier.from_module(many).class_names[281] == "281"
    few = timm.create_model("test_resnet", num_classes=3)
    assert Classifier.from_module(few).class_names == ("0", "1", "2")
    torch.save(few.state_dict(), tmp_path / "w.pt")
    made = Classifier.from_architecture("timm:test_resnet.r160_in1k", weights=tmp_path / "w.pt")
    assert made.class_names == ("0", "1", "2")
    assert made.notes == ("1,000 known class names are left out: the model has 3 classes",)


def test_a_module_brings_its_class_names_even_where_the_image_shape_is_given():
    model, _ = hf_model("resnet")
    made = Classifier.from_module(model, image_shape=(3, 64, 64))
    assert made.class_names == tuple(f"resnet {label}" for label in range(CLASSES))
    assert match_labels("photos", ["resnet 1", "resnet 0"], Vocabulary(made.class_names), adopt=True).numbers == (1, 0)
    told = {"architecture": "test_resnet", "label_names": ["dog", "cat"], "num_classes": 2, "input_size": (3, 64, 64)}
    mine = timm.create_model("test_resnet", num_classes=2, pretrained_cfg=told)
    assert Classifier.from_module(mine, image_shape=(3, 64, 64)).class_names == ("dog", "cat")


def test_a_librarys_model_that_it_cannot_build_again_says_so():
    changed = Classifier.from_module(timm.create_model("test_resnet", num_classes=3, output_stride=8))
    assert changed.spec.architecture == "module"
    assert "computes something else than this model (logits differ by" in changed.notes[0]
    assert "the model is needed again to open it (`model=…`)" in changed.notes[0]


@pytest.mark.parametrize("name", TORCHVISION_MODELS)
def test_a_model_of_torchvision(name, tmp_path, files, opened):
    transform = TORCHVISION_MODELS[name].transforms()
    model = seeded(torchvision.models.get_model, name, num_classes=CLASSES)
    with torch.no_grad():
        theirs = model(torch.stack([transform(image) for image in opened]))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    classifier = Classifier.from_architecture(name, weights=tmp_path / "weights.pt", processor=transform)
    assert_same(ours(classifier, files), theirs)
    assert_same(ours(Classifier.from_module(model, processor=transform), files), theirs)


def test_a_folder_of_timms_brings_class_names_and_weights_but_a_file_wins(tmp_path):
    model = seeded(timm.create_model, "test_resnet.r160_in1k", num_classes=3, side=160)
    names = ["ant", "bee", "cat"]
    timm.models.save_for_hf(model, tmp_path / "folder", model_config={"num_classes": 3, "label_names": names})
    by_name = Classifier.from_architecture(f"timm:{tmp_path / 'folder'}")
    by_weights = Classifier.from_architecture("timm:test_resnet", weights=tmp_path / "folder")
    assert by_name.class_names == by_weights.class_names == tuple(names)
    assert torch.equal(by_name.head.weight, model.fc.weight)
    torch.save({name: tensor * 0.5 for name, tensor in model.state_dict().items()}, tmp_path / "other.pt")
    other = Classifier.from_architecture(f"timm:{tmp_path / 'folder'}", weights=tmp_path / "other.pt")
    assert torch.equal(other.head.weight, model.fc.weight * 0.5)


def test_a_classifier_without_its_last_layer_is_no_classifier(tmp_path):
    model, processor = hf_model("vit")
    model.vit.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"got none for classifier\.bias, classifier\.weight"):
        Classifier.from_architecture(f"hf:{tmp_path}")


def test_what_cannot_be_said_of_a_processor_is_refused_and_named():
    cropped = timm.data.create_transform(input_size=(3, 32, 32), crop_mode="border")
    with pytest.raises(ModelError, match=r"has a step that cannot be said here: ResizeKeepRatio"):
        pipeline_of(cropped)
    with pytest.raises(ModelError, match="DonutImageProcessor does more to a picture than resize, crop and normalise"):
        pipeline_of(transformers.DonutImageProcessor(size={"height": 32, "width": 48}))
    with pytest.raises(ModelError, match="got object"):
        pipeline_of(object())


@pytest.mark.parametrize(("package", "architecture"), [("timm", "timm:resnet18"), ("transformers", "hf:.")])
def test_a_package_that_is_not_installed_names_the_extra(package, architecture, tmp_path, monkeypatch):
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    extra = architecture.partition(":")[0]
    with pytest.raises(ModelError, match=rf"needs the '{extra}' extra: pip install 'tmm-engine\[{extra}\]'"):
        Classifier.from_architecture(architecture, seed=0, num_classes=3)


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("test_resnet", {"global_pool": "max"}, True),
        ("test_efficientnet", {"act_layer": "relu"}, True),
        ("test_vit", {"img_size": 96}, True),
        ("test_convnext", {"drop_path_rate": 0.1}, False),
    ],
)
def test_what_a_folder_of_timms_says_of_its_model_is_built(name, arguments, told, tmp_path, files, opened):
    model = seeded(
        timm.create_model, name, num_classes=CLASSES, side=160 if "img_size" not in arguments else 96, **arguments
    )
    timm.models.save_for_hf(
        model, tmp_path / "folder", model_config={"label_names": {str(n): f"n{n}" for n in range(12)}}
    )
    classifier = Classifier.from_architecture(f"timm:{tmp_path / 'folder'}")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.no_grad():
        theirs = model(torch.stack([transform(image) for image in opened]))
    assert_same(ours(classifier, files), theirs)
    assert classifier.class_names == tuple(f"n{n}" for n in range(12))
    assert bool(classifier.spec.config) == told
    classifier.save(tmp_path / "saved.safetensors")
    assert Classifier.load(tmp_path / "saved.safetensors").fingerprint == classifier.fingerprint


def test_class_names_of_timm_by_something_else_than_numbers_are_refused(tmp_path):
    model = timm.create_model("test_resnet", num_classes=2)
    timm.models.save_for_hf(model, tmp_path / "folder", model_config={"label_names": {"n01": "ant", "n02": "bee"}})
    with pytest.raises(ModelError, match="expected 'label_names' as a list or by number from 0 on"):
        Classifier.from_architecture(f"timm:{tmp_path / 'folder'}")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"size": {"shortest_edge": 32, "longest_edge": 40}, "crop_size": 32, "do_center_crop": True}, "longest_edge"),
        ({"image_mean": [0.5, 0.5]}, "expected image_mean of one number or 3, one per channel"),
        ({"resample": 4}, "resizes by torchvision, which has nearest, bilinear, bicubic, got resample=.* which is box"),
        ({"resample": 99}, "expected an interpolation of nearest"),
    ],
)
def test_what_of_a_processor_cannot_be_said_is_named(processor, message):
    options = {"size": {"height": 32, "width": 32}} | processor
    with pytest.raises(ModelError, match=message):
        pipeline_of(transformers.ViTImageProcessor(**options))


@pytest.mark.parametrize(
    "processor",
    [
        transformers.ViTImageProcessorPil(do_resize=False, do_center_crop=True, crop_size={"height": 24, "width": 24}),
        transformers.ViTImageProcessor(do_resize=False, do_center_crop=True, crop_size={"height": 24, "width": 24}),
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 24, "width": 24}),
        transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 24, "width": 24}),
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.25]),
    ],
)
def test_pictures_smaller_than_the_crop_are_padded_as_theirs(processor):
    pipeline = pipeline_of(processor)
    for sides in ((23, 30), (30, 23), (21, 19), (27, 20), (24, 24)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8))
        theirs = processor(images=image, return_tensors="pt")["pixel_values"][0].float()
        torch.testing.assert_close(pipeline(image), theirs, rtol=0, atol=1e-5)


def test_a_configuration_with_a_number_of_labels_of_its_own():
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 4], "image_size": 64}
    for names in {0: "a", 1: "b"}, None:
        config = transformers.PvtConfig(id2label=names, **sizes)
        model = transformers.AutoModelForImageClassification.from_config(config)
        made = Classifier.from_module(model, processor=transformers.PvtImageProcessor(size={"height": 64, "width": 64}))
        assert made.num_classes == model.classifier.out_features
        assert made.class_names[:2] == ("0", "1")
