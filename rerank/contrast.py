"""Contrast stretching: what darkening and lost contrast did to a query is undone before anything looks at it."""

from jaxtyping import Float
from torch import Tensor


def stretch_contrast(images: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n c h w"]:
    """Each image's own pixels, all channels together, mapped linearly onto [0, 1]; a constant image stays as it is.

    Invariant to x ↦ a·x + b with a > 0, as long as nothing was cut off.

    Args:
        images: Pixels in [0, 1].
    """
    low, high = images.amin((-3, -2, -1), keepdim=True), images.amax((-3, -2, -1), keepdim=True)
    spread = high - low
    return ((images - low) / spread.where(spread > 0, 1.0)).where(spread > 0, images)
