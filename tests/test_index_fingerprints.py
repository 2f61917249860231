"""What identifies the user's own code: what its modules are, not how PyTorch prints them."""

import pytest
import torch
from torch import nn
from torchvision.transforms import Normalize

from tmm_engine.index.models.classifier import Classifier

SHAPE = (3, 8, 8)


class Printed(nn.BatchNorm2d):
    """As BatchNorm2d, which another PyTorch prints otherwise."""

    says = ""

    def extra_repr(self):
        return super().extra_repr() + self.says


def network(stride=2, *, eps=1e-5, printed=Printed):
    torch.manual_seed(0)
    body = nn.Conv2d(3, 4, 3, stride=stride), printed(4, eps=eps), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(4, 3))


def identity(model):
    classifier = Classifier.from_module(model, image_shape=SHAPE)
    return classifier.fingerprint, classifier.former_fingerprint


def test_the_printed_form_does_not_matter_and_what_computes_does(monkeypatch):
    new, former = identity(network())
    monkeypatch.setattr(Printed, "says", ", bias=True")
    assert identity(network())[0] == new
    assert identity(network())[1] != former
    others = {identity(model)[0] for model in (network(1), network(eps=1e-3), network(printed=nn.BatchNorm2d))}
    assert len(others | {new}) == 4


class Scaled(nn.Module):
    """Code of a user's with a number of its own."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, images):
        return images * self.factor


def test_numbers_that_a_user_s_own_modules_hold_count():
    fronts = [Scaled(1.0), Scaled(2.0), *(Normalize([mean] * 3, [0.5] * 3) for mean in (0.4, 0.5))]
    assert len({identity(nn.Sequential(front, *network()))[0] for front in fronts}) == len(fronts)
    assert identity(nn.Sequential(Scaled(2.0), *network())) == identity(nn.Sequential(Scaled(2.0), *network()))


def test_the_fingerprint_of_before_is_still_ones_own():
    classifier = Classifier.from_module(network(), image_shape=SHAPE)
    assert classifier.known_as(classifier.fingerprint) is classifier
    known = classifier.known_as(classifier.former_fingerprint)
    assert known is not None
    assert known.fingerprint == classifier.former_fingerprint
    assert classifier.known_as("") is None


def test_an_architecture_has_one_fingerprint_by_both_rules():
    made = Classifier.from_architecture("resnet18", image_shape=SHAPE, seed=0, num_classes=3)
    assert made.fingerprint == made.former_fingerprint


@pytest.mark.parametrize("shape", [SHAPE, (3, 9, 9)])
def test_a_lazy_model_is_run_once_and_always_the_same(shape):
    lazy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    first, second = (Classifier.from_module(lazy, image_shape=shape) for _ in range(2))
    assert isinstance(lazy[2], nn.LazyLinear), "the user's model stays as it is"
    assert first.feature_dim == 4 * (shape[1] - 2) ** 2
    assert first.num_classes == second.num_classes == 3
