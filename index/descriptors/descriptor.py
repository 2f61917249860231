"""A descriptor: parts of what a network computes, each of unit length over symmetric views, weighted and joined."""

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


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One part of a descriptor.

    Attributes:
        source: `FEATURES`, `PROBABILITIES`, or a layer.
        weight: Its share of the similarity; the weights of a descriptor need not add up to 1.
        mean: Subtracted from each view's output before all else; None for probabilities.
        projection: Of the mean over views; None keeps it as it is.
    """

    source: str | Layer
    weight: float
    mean: Float[Tensor, "e"] | None
    projection: Projection | None = None

    def __call__(self, views: Sequence[Activations], head: torch.nn.Linear) -> Float[Tensor, "n k"]:
        """Of unit length."""
        rows = [output_of(view, self.source, head) for view in views]
        centred = rows if self.mean is None else [row - self.mean for row in rows]
        mean = normalize(torch.stack([normalize(row) for row in centred]).mean(0))
        return mean if self.projection is None else self.projection(mean)


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
    probabilities: Tensor = head(view.features).float().softmax(dim=1)
    return probabilities.sqrt()
