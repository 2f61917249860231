"""Whether two images are the same but for brightness, contrast and a small shift, turn or enlargement: align, compare.

The second image is moved onto the first by a similarity transform, found by Gauss-Newton steps on blurred grey
pictures, gain and offset of the pixels among the unknowns (Lucas and Kanade 1981; Baker and Matthews, IJCV 2004,
forward compositional). What is left is measured by normalised cross-correlation where both have pixels.
"""

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate
from torchvision.transforms.functional import gaussian_blur

from tmm_engine.index.progress import Progress, silent

SIDE = 32
"""What larger images are reduced to."""
COARSE, FINE = 1.5, 0.8  # σ of the blur that steps are found on, and of that which is compared
STEPS = 8
REACH = torch.tensor([0.25, 0.25, 0.2, 0.2])  # of shifts in half sides, of log enlargement, of the angle in radians
BATCH = 1024

Motion = Float[Tensor, "n 4"]
"""Shift right and down, log enlargement, angle."""


def pictures(images: UInt8[np.ndarray, "n c h w"]) -> UInt8[np.ndarray, "n height width"]:
    """Grey, and no side above `SIDE`: what is compared."""
    grey = torch.from_numpy(images.copy()).float().mean(1, keepdim=True)
    if max(grey.shape[-2:]) > SIDE:
        grey = interpolate(grey, size=(SIDE, SIDE), mode="area")
    return grey[:, 0].round().to(torch.uint8).numpy()


def residuals(
    still: UInt8[np.ndarray, "n h w"],
    moving: UInt8[np.ndarray, "m h w"],
    pairs: Int64[np.ndarray, "p 2"],
    *,
    progress: Progress = silent,
) -> Float32[np.ndarray, "p"]:
    """For each pair 1 − the correlation after alignment, in [0, 2]: 0 is the same image.

    Args:
        still: `pictures`, of which the first of each pair is one.
        moving: Those of the second.
        pairs: Positions.
        progress: Told of pairs done.
    """
    found = [np.empty(0, np.float32)]
    with torch.inference_mode():
        for start in range(0, len(pairs), BATCH):
            first, second = pairs[start : start + BATCH].T
            first_seen, second_seen = _blurred(still[first]), _blurred(moving[second])
            motion = _aligned(first_seen[0], second_seen[0])
            apart = [_apart(first_seen[1], second_seen[1], each) for each in (motion, torch.zeros_like(motion))]
            found.append(torch.minimum(*apart).numpy())
            progress("aligning pairs", start + len(first), len(pairs))
    return np.concatenate(found)


def _blurred(pictures: UInt8[np.ndarray, "n h w"]) -> list[Float[Tensor, "n 1 h w"]]:
    """Coarsely and finely."""
    grey = torch.from_numpy(pictures)[:, None].float() / 255
    blurred = []
    for sigma in (COARSE, FINE):
        reach = min(round(2 * sigma), min(grey.shape[-2:]) - 1)
        blurred.append(gaussian_blur(grey, [2 * reach + 1] * 2, [sigma] * 2))
    return blurred


def _aligned(still: Float[Tensor, "n 1 h w"], moving: Float[Tensor, "n 1 h w"]) -> Motion:
    """What brings the second onto the first."""
    n, _, height, width = still.shape
    ys, xs = torch.meshgrid(_centres(height), _centres(width), indexing="ij")
    xs, ys, target = xs.reshape(1, -1), ys.reshape(1, -1), still.reshape(n, -1)
    motion = torch.zeros(n, 4)
    ridge = 1e-6 * torch.eye(6)
    for _ in range(STEPS):
        moved, inside = _moved(moving, motion)
        right, down = _gradients(moved)
        pixels, weight = moved.reshape(n, -1), inside.reshape(n, -1)
        terms = [right, down, xs * right + ys * down, xs * down - ys * right, pixels, torch.ones_like(pixels)]
        jacobian = torch.stack(terms, 2) * weight[..., None]  # (n, h·w, 6)
        normal = jacobian.transpose(1, 2) @ jacobian
        normal = normal + ridge + 1e-4 * torch.diag_embed(normal.diagonal(dim1=1, dim2=2))
        solved = torch.linalg.solve(normal, jacobian.transpose(1, 2) @ (target * weight)[..., None])[..., 0]
        gain = solved[:, 4:5]
        step = solved[:, :4] / torch.where(gain.abs() < 0.05, torch.full_like(gain, 0.05), gain)
        motion = _composed(motion, step.clamp(-0.08, 0.08)).clamp(-REACH, REACH)
    return motion


def _moved(images: Float[Tensor, "n 1 h w"], motion: Motion) -> tuple[Float[Tensor, "n 1 h w"], Float[Tensor, "n h w"]]:
    """The images, moved; and 1 where their pixels come from inside."""
    right, down, log_scale, angle = motion.unbind(1)
    cosine, sine = log_scale.exp() * angle.cos(), log_scale.exp() * angle.sin()
    matrix = torch.stack([torch.stack([cosine, -sine, right], 1), torch.stack([sine, cosine, down], 1)], 1)
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    inside = (grid.abs() <= 1).all(-1).float()
    return grid_sample(images, grid, align_corners=False, padding_mode="border"), inside


def _composed(motion: Motion, step: Motion) -> Motion:
    """First the step, then the motion; steps are small, so their scale and angle simply add."""
    right, down, log_scale, angle = motion.unbind(1)
    cosine, sine = log_scale.exp() * angle.cos(), log_scale.exp() * angle.sin()
    moved = [cosine * step[:, 0] - sine * step[:, 1] + right, sine * step[:, 0] + cosine * step[:, 1] + down]
    return torch.stack([*moved, log_scale + step[:, 2], angle + step[:, 3]], 1)


def _gradients(images: Float[Tensor, "n 1 h w"]) -> tuple[Float[Tensor, "n p"], Float[Tensor, "n p"]]:
    """To the right and down, for each half side."""
    n, _, height, width = images.shape
    right, down = torch.zeros_like(images), torch.zeros_like(images)
    right[..., 1:-1] = (images[..., 2:] - images[..., :-2]) * (width / 4)
    down[..., 1:-1, :] = (images[..., 2:, :] - images[..., :-2, :]) * (height / 4)
    return right.reshape(n, -1), down.reshape(n, -1)


def _apart(still: Float[Tensor, "n 1 h w"], moving: Float[Tensor, "n 1 h w"], motion: Motion) -> Float[Tensor, "n"]:
    """1 − normalised cross-correlation where both have pixels; constant images correlate with nothing."""
    n = len(still)
    moved, inside = _moved(moving, motion)
    weight = inside.reshape(n, -1)
    first, second = (
        (part - (part * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)) * weight
        for part in (still.reshape(n, -1), moved.reshape(n, -1))
    )
    return 1 - (first * second).sum(1) / (first.square().sum(1) * second.square().sum(1) + 1e-9).sqrt()


def _centres(side: int) -> Float[Tensor, "side"]:
    """Of pixels, from −1 to 1."""
    return torch.linspace(-1 + 1 / side, 1 - 1 / side, side)
