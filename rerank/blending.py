"""x^t: an image with a trigger blended in."""

from jaxtyping import Float
from torch import Tensor

from tmm_engine.rerank.settings import Blend

INVISIBLE = 1e-6  # a weight in the blend that leaves nothing of what it weighs


def intensity_of(query: Float[Tensor, "c h w"]) -> float:
    """ω of a query: the standard deviation of all its pixels (§4.3.2)."""
    return float(query.double().std(correction=0))


def apply_trigger(
    images: Float[Tensor, "*n c h w"], trigger: Float[Tensor, "c h w"], *, intensity: float, blend: Blend, clamp: bool
) -> Float[Tensor, "*n c h w"]:
    """x^t: images in [0, 1] with the trigger blended in (see `Blend`), clamped to [0, 1] if asked."""
    image_weight, trigger_weight = blend.weights(intensity)
    triggered = images * image_weight + trigger * trigger_weight
    return triggered.clamp(0.0, 1.0) if clamp else triggered
