"""Models from the command line: what is guessed is said, and what nothing tells is asked for."""

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torchvision.models import resnet18

from tests.digits import IMAGES, LABELS, write_photos
from tmm_engine.cli.main import main
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
    assert "after the small stem a max-pool is taken to be there; --no-max-pool leaves it out" in kept.stderr


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
