"""Symmetric views: the same few changed copies of query and exemplar alike, whose features are averaged.

What a small shift or a little blur does to a feature is then much the same on both sides, and matters less.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.functional import gaussian_blur

from tmm_engine.index.contrast import stretch_contrast

BLUR = 1 / 40
"""σ, as a share of the shorter side: 0.8 pixels of 32."""

SHIFT = 1 / 16
"""As a share of each side: 2 pixels of 32."""

ORDER = (
    (0, 0, False),
    (0, 0, True),
    (1, 0, False),
    (-1, 0, False),
    (0, 1, False),
    (0, -1, False),
    (1, 0, True),
    (-1, 0, True),
    (0, 1, True),
    (0, -1, True),
)
"""(down, right, whether blurred) of each view: the image itself, then blurred, then moved."""

MAX_VIEWS = len(ORDER)


def symmetric_views(images: Float[Tensor, "n c h w"], count: int) -> Iterator[Float[Tensor, "n c h w"]]:
    """The first so many views of images, their contrast stretched.

    Args:
        images: Pixels in [0, 1].
        count: 1 to `MAX_VIEWS`; 1 is the stretched image alone.
    """
    stretched = stretch_contrast(images)
    height, width = images.shape[-2:]
    for y, x, blurred in ORDER[:count]:
        view = _moved(stretched, y, x) if y or x else stretched
        yield blur(view, BLUR * min(height, width)) if blurred else view


def _moved(images: Float[Tensor, "n c h w"], down: int, right: int) -> Float[Tensor, "n c h w"]:
    """By so many times `SHIFT` of each side, in whole pixels; in small images, where that is less than one, in part."""
    shares = [SHIFT * side for side in images.shape[-2:]]
    whole = shifted(images, *(sign * max(1, round(share)) for sign, share in zip((down, right), shares, strict=True)))
    share = min(1.0, *(share for sign, share in zip((down, right), shares, strict=True) if sign))
    return whole if share == 1.0 else images.lerp(whole, share)


def shifted(images: Float[Tensor, "n c h w"], down: int, right: int) -> Float[Tensor, "n c h w"]:
    """Moved by whole pixels; what comes in repeats the edge."""
    height, width = images.shape[-2:]
    room = (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))  # left, right, top, bottom
    wider = pad(images, room, mode="replicate")
    top, left = max(-down, 0), max(-right, 0)
    return wider[..., top : top + height, left : left + width]


def blur(images: Float[Tensor, "n c h w"], sigma: float) -> Float[Tensor, "n c h w"]:
    """Gaussian, of a standard deviation in pixels; edges are mirrored.

    As `gaussian_blur` of torchvision to rounding, but as two matrix products, which for large σ take a fraction of it.
    """
    reach = max(1, round(2.5 * sigma))
    reach = min(reach, min(images.shape[-2:]) - 1)
    if reach < 1:
        return images
    down, right = (_blurring(side, sigma, reach).to(images) for side in images.shape[-2:])
    return down @ images @ right.T


def _blurring(side: int, sigma: float, reach: int) -> Float[Tensor, "side side"]:
    """What blurs a column of pixels, as a matrix: the blurred identity."""
    blurred: Tensor = gaussian_blur(torch.eye(side)[None], [1, 2 * reach + 1], [sigma] * 2)
    return blurred[0]
