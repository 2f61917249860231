"""Contrast stretching: what darkening and lost contrast did to a query is undone before anything looks at it.

Queries and exemplars alike: a query that is an exemplar must still look like it.
"""

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from tmm_engine.index.models.classifier import Classifier


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


def embed_stretched(images: UInt8[np.ndarray, "n c h w"], classifier: Classifier) -> Float32[np.ndarray, "n d"]:
    """φ of stored images with their contrast stretched, in one pass."""
    with torch.inference_mode():
        pixels = torch.from_numpy(images).to(classifier.device).float() / 255.0
        return classifier.features(stretch_contrast(pixels)).float().cpu().numpy()
