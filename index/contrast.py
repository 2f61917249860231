"""Contrast stretching: what darkening and lost contrast did to a query is undone before anything looks at it.

Queries and exemplars alike: a query that is an exemplar must still look like it.
"""

import torch
from jaxtyping import Float, UInt8
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


def stretch_images(images: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
    """The same of stored images, rounded to 8 bits again."""
    return (stretch_contrast(images.float() / 255.0) * 255.0).round().to(torch.uint8)
