"""A descriptor: parts of what a network computes, each of unit length over symmetric views, weighted and joined.

A layer and pixels are looked at in the image and in its blurred copy. What the network makes of the image as a whole,
its features and class probabilities, is looked at in every view, and counts the more the surer the network is there: a
view that it was never trained to see says little.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from tmm_engine.index.descriptors.layers import Activations, Layer
from tmm_engine.index.descriptors.projection import Projection

FEATURES = "features"
"""φ(x), as a part's source."""

PROBABILITIES = "probabilities"
"""The square roots of the model's class probabilities: their inner product is the Bhattacharyya coefficient."""


LAYER_VIEWS = 2
"""A layer's output is averaged over so many views, the first."""

CONFIDENCE = 4.0
"""How much less a view counts where the network is less sure: by exp(−4) for each nat of entropy."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One part of a descriptor.

    Attributes:
        source: `FEATURES`, `PROBABILITIES`, or a layer.
        weight: Its share of the similarity; the weights of a descriptor need not add up to 1.
        mean: Subtracted from each view's output before all else; None for probabilities.
        projection: Of the mean over views; None keeps it as it is.
        confidence: How much less a view counts where the network is less sure, of features and probabilities: by
            exp(−confidence · entropy), in nats. 0: all views alike.
    """

    source: str | Layer
    weight: float
    mean: Float[Tensor, "e"] | None
    projection: Projection | None = None
    confidence: float = CONFIDENCE

    def __call__(self, views: Sequence[Activations], head: torch.nn.Linear) -> Float[Tensor, "n k"]:
        """Of unit length."""
        of_layer = isinstance(self.source, Layer)
        seen = views[:LAYER_VIEWS] if of_layer else views
        rows = torch.stack([output_of(view, self.source, head) for view in seen])
        units = normalize(rows if self.mean is None else rows - self.mean, dim=2)
        mean = normalize(units.mean(0) if of_layer else (self._shares(seen, head) * units).sum(0))
        return mean if self.projection is None else self.projection(mean)

    def _shares(self, views: Sequence[Activations], head: torch.nn.Linear) -> Float[Tensor, "views n 1"]:
        """How much each view counts; they sum to 1 over views."""
        probabilities = torch.stack([_probabilities(view, head) for view in views])
        entropy = torch.special.entr(probabilities).sum(2, keepdim=True)
        return (-self.confidence * entropy).softmax(dim=0)


@dataclass(frozen=True, slots=True, eq=False)
class Descriptor:
    """Parts, whose inner products add up: the cosine similarity of two descriptors is the weighted mean of theirs."""

    parts: tuple[Part, ...]

    def __call__(self, views: Sequence[Activations], head: torch.nn.Linear) -> Float[Tensor, "n d"]:
        """One unit vector for each image.

        Args:
            views: What the network computes of each view, the image itself first.
            head: Of the classifier.
        """
        return normalize(torch.cat([part.weight**0.5 * part(views, head) for part in self.parts], dim=1))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """That it looks at."""
        return tuple(dict.fromkeys(part.source for part in self.parts if isinstance(part.source, Layer)))


def output_of(view: Activations, source: str | Layer, head: torch.nn.Linear) -> Float[Tensor, "n e"]:
    """What a part looks at, of one view."""
    if isinstance(source, Layer):
        return view.layers[source]
    if source == FEATURES:
        return view.features.float()
    return _probabilities(view, head).sqrt()


def _probabilities(view: Activations, head: torch.nn.Linear) -> Float[Tensor, "n classes"]:
    probabilities: Tensor = head(view.features).float().softmax(dim=1)
    return probabilities
