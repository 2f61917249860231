"""Models from the command line: what is guessed is said, and what nothing tells is asked for."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torchvision.models import resnet18

from tests.digits import IMAGES, LABELS, write_photos
from tmm_engine.building import build_index
from tmm_engine.cli.main import main
from tmm_engine.index import Classifier, InputError, open_source, settled
from tmm_engine.index.store.manifest import Manifest


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Photos, and the weights of a ResNet without a max-pool: fitted to the digits, and as it was."""
    folder = tmp_path_factory.mktemp("models")
    write_photos(folder / "photos")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet18(num_classes=10)
        model.conv1, model.maxpool = nn.Conv2d(1, 64, 3, 1, 1, bias=False), nn.Identity()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        images = torch.from_numpy(IMAGES[:120])[:, None].float() / 255
        with torch.no_grad():
            model.train()(images)
        model.eval()
        torch.save(model.state_dict(), folder / "untrained.pt")
        head, model.fc = model.fc, nn.Identity()
        with torch.no_grad():
            features = torch.cat([model(images), torch.ones(len(images), 1)], dim=1)
            targets = nn.functional.one_hot(torch.from_numpy(LABELS[:120]).long(), 10).float()
            solved = torch.linalg.lstsq(features, targets, driver="gelsd").solution
            head.weight.copy_(solved[:-1].T)
            head.bias.copy_(solved[-1])
        model.fc = head
        torch.save(model.state_dict(), folder / "fitted.pt")
    return folder


def build(work, weights, *options):
    arguments = ("build-index", work / "photos", work / "a.idx", "--model", "resnet18", "--weights", work / weights)
    return CliRunner().invoke(main, [*map(str, arguments), "--views", "0", "--overwrite", *options])


def test_the_labels_settle_whether_there_is_a_max_pool(work):
    done = build(work, "fitted.pt")
    assert done.exit_code == 0, done.stderr
    assert "the small stem is taken without a max-pool: the model then agrees with 100% of the labels" in done.stderr
    assert Manifest.read(work / "a.idx").model.max_pool is False


def test_where_they_do_not_it_is_asked_for_and_can_be_said(work):
    asked = build(work, "untrained.pt")
    assert asked.exit_code == 1
    assert "nothing tells whether a max-pool follows it, nor do the labels" in asked.stderr
    said = build(work, "untrained.pt", "--max-pool")
    assert said.exit_code == 0, said.stderr
    assert Manifest.read(work / "a.idx").model.max_pool is True
    kept = build(work, "untrained.pt", "--small-stem")
    note = "the max-pool after it is taken to be there, which the weights do not tell (--no-max-pool"
    assert kept.stderr.count(note) == 1


def readings(work, weights):
    return {
        f"max_pool={pool}": Classifier.from_architecture(
            "resnet18", image_shape=(1, 8, 8), weights=work / weights, max_pool=pool
        )
        for pool in (True, False)
    }


def test_python_chooses_by_the_labels_as_the_command_line_does(work):
    photos, fitted = open_source(work / "photos"), readings(work, "fitted.pt")
    choice = settled(fitted, photos)
    assert choice.classifier is not None
    assert choice.classifier.spec.max_pool is False
    assert choice.shares["max_pool=False"] == 1.0
    assert choice.classifier.notes == (
        f"max_pool=False: the model then agrees with 100% of the labels of {len(photos)} images, else with "
        f"{choice.shares['max_pool=True']:.0%}",
    )
    undecided = settled({"one": choice.classifier, "the same": choice.classifier}, photos)
    assert (undecided.classifier, undecided.shares, undecided.images) == (None, {"one": 1, "the same": 1}, len(photos))
    nothing = settled(fitted, open_source(np.zeros((2, 1, 8, 8), np.uint8)))
    assert (nothing.classifier, nothing.shares, nothing.images) == (None, {}, 0)
    with pytest.raises(InputError, match="expected at least two readings to choose from, got 1"):
        settled({"alone": choice.classifier}, photos)


def test_a_build_in_python_reports_what_was_assumed_of_the_model(work):
    assumed = Classifier.from_architecture("resnet18", image_shape=(1, 8, 8), weights=work / "untrained.pt")
    report = build_index(work / "photos", work / "python.idx", assumed, views=0)
    assert "the max-pool after it is taken to be there" in report.remarks[0]


def test_a_saved_classifier_keeps_its_image_shape(work):
    """Whatever the images have: the size and the channels that it was saved with are its own."""
    Classifier.from_architecture(
        "resnet18", image_shape=(3, 12, 12), seed=0, num_classes=10, mean=(0.4,) * 3, std=(0.2,) * 3
    ).save(work / "saved.safetensors")
    for options, shape in ((), (3, 12, 12)), (("--image-size", "16"), (3, 16, 16)):
        done = build(work, "saved.safetensors", *options)
        assert done.exit_code == 0, done.stderr
        assert Manifest.read(work / "a.idx").image_shape == shape


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--mean", "120"), 1, "divide mean and std by 255"),
        (("--channels", "3"), 1, "convert the images with --channels 1"),
        (("--ema",), 1, "found none that are known as such"),
        (("--preprocessing", "ResNet18_Weights"), 1, "as in ResNet18_Weights.IMAGENET1K_V1"),
        (("--preprocessing", "ResNet18_Weights.IMAGENET1K_V1", "--image-size", "64"), 2, "give --channels too"),
    ],
)
def test_what_does_not_go_together_is_said_as_the_command_line_calls_it(work, options, code, message):
    done = build(work, "untrained.pt", "--max-pool", *options)
    assert (done.exit_code, message in done.stderr) == (code, True), done.stderr
