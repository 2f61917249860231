"""Models whose output is a structure: one obvious choice is taken, anything else listed."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tmm_engine.index.errors import ModelError
from tmm_engine.index.models.classifier import Classifier

Both = namedtuple("Both", ("logits", "aux_logits"))
SHAPE = (3, 8, 8)


@dataclass
class Output:
    loss: None
    logits: Tensor


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body, self.head, self.wrap = nn.Sequential(nn.Flatten(), nn.Linear(192, 8)), nn.Linear(8, 3), wrap

    def forward(self, images):
        return self.wrap(self.head(self.body(images)))


def plain():
    torch.manual_seed(0)
    return Wrapped(lambda logits: logits)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: {"logits": z, "aux": z + 1},
        lambda z: {"cls": z, "map": z[:, :, None, None]},
        lambda z: (z, None),
        lambda z: [z],
        lambda z: Both(z, z + 1),
        lambda z: Output(None, z),
        lambda z: torchvision.models.GoogLeNetOutputs(z, None, None),
    ],
)
def test_one_obvious_choice_is_taken(wrap):
    torch.manual_seed(0)
    classifier, expected = Classifier.from_module(Wrapped(wrap), image_shape=SHAPE), plain()
    images = torch.rand(4, *SHAPE)
    with torch.no_grad():
        made = classifier.logits(classifier.features(images))
        torch.testing.assert_close(made, expected(images))
        torch.testing.assert_close(classifier.double().features(images.double()).float(), classifier.features(images))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda z: (z, z), r"got tuple with 0: \(2, 3\), 1: \(2, 3\) \(wrap the model"),
        (lambda z: {"a": z, "b": z}, r"got dict with a: \(2, 3\), b: \(2, 3\)"),
        (lambda z: {"a": z[0], "b": "text"}, r"a: \(3,\), b: str"),
        (lambda z: (), "got tuple with nothing"),
        (lambda z: "text", "got str with nothing"),
    ],
)
def test_any_other_is_refused_and_listed(wrap, message):
    with pytest.raises(ModelError, match=message):
        Classifier.from_module(Wrapped(wrap), image_shape=SHAPE)
