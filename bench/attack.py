"""The adversary: projected gradient ascent on how far a perturbation moves what a method ranks by.

The same attack serves two ends. Against the plain features φ(x) it is one perturbation for all methods, and says how it
transfers to those that rank by something else. Against each method's own embedding it is *adaptive*: every method meets
the attack that is made for it, with the same budget, as evaluations of robustness should be (Tramèr et al., *On
Adaptive Attacks to Adversarial Example Defenses*, arXiv 2002.08347). It is adaptive to the embedding only: it does not
go through a trigger of the query's own, and may be too weak for that.

*Towards* an embedding, such as that of a wrong exemplar, it descends instead: that aims at the gate of
`rerank.recognise` where the embedding holds what the gate looks at.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from tmm_engine.index.models.classifier import Classifier

STEPS = 20
TRAVEL = 2.5  # all steps together, as a multiple of the bound: enough to reach any point of the ball and to turn

Embedding = Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n e"]]
"""What is moved: differentiable, of float32 pixels in [0, 1] on the CPU."""


def features_of(classifier: Classifier) -> Embedding:
    """φ(x), whatever the classifier's device and precision."""
    return lambda pixels: classifier.features(pixels.to(classifier.head.weight))


def pgd(
    image: Float32[np.ndarray, "c h w"],
    generator: np.random.Generator,
    embedding: Embedding,
    *,
    bound: float,
    towards: Float[Tensor, "1 e"] | None = None,
) -> Float32[np.ndarray, "c h w"]:
    """Projected gradient ascent on ‖e(x+δ) − e(x)‖₂, from a random start (Madry et al., arXiv 1706.06083).

    Or descent on ‖e(x+δ) − e'‖₂.

    Each step goes along the normalised gradient, then back into the ball; clipping to [0, 1] only shortens δ.

    Args:
        image: x, in [0, 1].
        generator: Of the start.
        embedding: e.
        bound: On ‖δ‖₂.
        towards: e', of what the attack wants the image to be taken for.

    Returns:
        x + δ, in [0, 1] up to rounding.
    """
    x = torch.tensor(image)
    delta = _clipped(x, bound * _unit(torch.tensor(generator.standard_normal(image.shape)).to(x)))
    with torch.no_grad():
        target = embedding(x[None]) if towards is None else towards
    sign = 1.0 if towards is None else -1.0
    for _ in range(STEPS):
        delta.requires_grad_()
        distance = torch.linalg.vector_norm(embedding((x + delta)[None]) - target)
        (gradient,) = torch.autograd.grad(distance, delta)
        delta = delta.detach() + sign * TRAVEL * bound / STEPS * _unit(gradient)
        delta = _clipped(x, delta.norm().clamp(max=bound) * _unit(delta))
    return (x + delta).numpy()


def _unit(vector: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
    return vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)


def _clipped(x: Float[Tensor, "c h w"], delta: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
    return (x + delta).clamp(0, 1) - x
