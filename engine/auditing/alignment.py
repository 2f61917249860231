"""Whether two images are the same but for brightness, contrast and a small shift, turn or enlargement: align, compare.

The second image is moved onto the first by a similarity transform, found by Gauss-Newton steps on blurred grey
pictures, gain and offset of the pixels among the unknowns (Lucas and Kanade 1981; Baker and Matthews, IJCV 2004,
forward compositional). What is left is measured by normalised cross-correlation where both have pixels.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, pad

from tmm_engine.index.progress import Progress, silent

SIDE = 32
"""What larger images are reduced to."""
COARSE, FINE = 1.5, 0.8  # σ of the blur that steps are found on, and of that which is compared
STEPS = 8
REACH = torch.tensor([0.25, 0.25, 0.2, 0.2])  # of shifts in half sides, of log enlargement, of the angle in radians
BATCH = 256

Pictures = Float[Tensor, "n h w"]
"""From 0 to 1."""
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
    shown, found, threads = _Frame(*still.shape[1:]), [np.empty(0, np.float32)], torch.get_num_threads()

    def apart(start: int) -> Float32[np.ndarray, "b"]:
        first, second = pairs[start : start + BATCH].T
        return _compared(shown, _grey(still[first]), _grey(moving[second]))

    starts = range(0, len(pairs), BATCH)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for start, batch in zip(starts, pool.map(apart, starts), strict=True):
            found.append(batch)
            progress("aligning pairs", start + len(batch), len(pairs))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # for threads to come: those of the pool changed it
    return np.concatenate(found)


@torch.inference_mode()
def _compared(shown: "_Frame", target: Pictures, moved: Pictures) -> Float32[np.ndarray, "n"]:
    """By one thread: in hundreds of small steps several would wait for each other longer than they work."""
    motion = _aligned(shown, shown.blurred(target, COARSE), shown.blurred(moved, COARSE))
    target, moved = shown.blurred(target, FINE), shown.blurred(moved, FINE)
    aligned, inside = shown.moved(moved, motion)
    return torch.minimum(_apart(target, aligned, inside), _apart(target, moved, torch.ones_like(inside))).numpy()


def _grey(pictures: UInt8[np.ndarray, "n h w"]) -> Pictures:
    return torch.from_numpy(pictures).float() / 255


class _Frame:
    """What pictures of one size are moved and blurred within.

    Args:
        height: Of the pictures.
        width: Of the pictures.
    """

    def __init__(self, height: int, width: int) -> None:
        ys, xs = torch.meshgrid(_centres(height), _centres(width), indexing="ij")
        self.xs, self.ys = xs.reshape(1, -1), ys.reshape(1, -1)
        self._places = torch.cat([self.xs, self.ys, torch.ones_like(self.xs)])  # (3, h·w)
        self._blurs = {sigma: [_blurring(side, sigma) for side in (height, width)] for sigma in (COARSE, FINE)}

    def blurred(self, pictures: Pictures, sigma: float) -> Pictures:
        """By a Gaussian, with mirrored edges."""
        down, right = self._blurs[sigma]
        return down @ (pictures @ right.T)

    def moved(self, pictures: Pictures, motion: Motion) -> tuple[Pictures, Float[Tensor, "n p"]]:
        """The pictures, moved; and 1 where their pixels come from inside."""
        right, down, log_scale, angle = motion.unbind(1)
        cosine, sine = log_scale.exp() * angle.cos(), log_scale.exp() * angle.sin()
        grid = [torch.stack(row, 1) @ self._places for row in ((cosine, -sine, right), (sine, cosine, down))]  # (n, p)
        inside = (torch.maximum(grid[0].abs(), grid[1].abs()) <= 1).float()
        places = torch.stack(grid, -1).view(*pictures.shape, 2)
        found = grid_sample(pictures[:, None], places, align_corners=False, padding_mode="border")
        return found[:, 0], inside


def _blurring(side: int, sigma: float) -> Float[Tensor, "side side"]:
    """The matrix that blurs columns, mirrored at the ends."""
    reach = min(round(2 * sigma), side - 1)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    mirrored = pad(torch.eye(side)[None], (reach, reach), mode="reflect")[0] if reach else torch.eye(side)
    return (mirrored.unfold(1, 2 * reach + 1, 1) @ (weights / weights.sum())).T


def _aligned(shown: _Frame, still: Pictures, moving: Pictures) -> Motion:
    """What brings the second onto the first."""
    n = len(still)
    target, motion, ridge = still.reshape(n, -1), torch.zeros(n, 4), 1e-6 * torch.eye(6)
    terms = torch.empty(n, 7, target.shape[1])  # the Jacobian's six columns, and what they are to explain
    for _ in range(STEPS):
        moved, weight = shown.moved(moving, motion)
        right, down = _gradients(moved)
        right, down = right * weight, down * weight
        terms[:, 0], terms[:, 1] = right, down
        torch.add(shown.xs * right, shown.ys * down, out=terms[:, 2])
        torch.sub(shown.xs * down, shown.ys * right, out=terms[:, 3])
        torch.mul(moved.reshape(n, -1), weight, out=terms[:, 4])
        terms[:, 5] = weight
        torch.mul(target, weight, out=terms[:, 6])
        products = terms[:, :6] @ terms.transpose(1, 2)  # (n, 6, p) @ (n, p, 7) -> (n, 6, 7)
        normal = products[..., :6] + ridge + 1e-4 * torch.diag_embed(products.diagonal(dim1=1, dim2=2))
        solved = torch.linalg.solve(normal, products[..., 6:])[..., 0]
        gain = solved[:, 4:5]
        step = solved[:, :4] / torch.where(gain.abs() < 0.05, torch.full_like(gain, 0.05), gain)
        motion = _composed(motion, step.clamp(-0.08, 0.08)).clamp(-REACH, REACH)
    return motion


def _composed(motion: Motion, step: Motion) -> Motion:
    """First the step, then the motion; steps are small, so their scale and angle simply add."""
    right, down, log_scale, angle = motion.unbind(1)
    cosine, sine = log_scale.exp() * angle.cos(), log_scale.exp() * angle.sin()
    moved = [cosine * step[:, 0] - sine * step[:, 1] + right, sine * step[:, 0] + cosine * step[:, 1] + down]
    return torch.stack([*moved, log_scale + step[:, 2], angle + step[:, 3]], 1)


def _gradients(pictures: Pictures) -> tuple[Float[Tensor, "n p"], Float[Tensor, "n p"]]:
    """To the right and down, for each half side."""
    n, height, width = pictures.shape
    right, down = torch.zeros_like(pictures), torch.zeros_like(pictures)
    right[..., 1:-1] = (pictures[..., 2:] - pictures[..., :-2]) * (width / 4)
    down[:, 1:-1] = (pictures[:, 2:] - pictures[:, :-2]) * (height / 4)
    return right.reshape(n, -1), down.reshape(n, -1)


def _apart(still: Pictures, moved: Pictures, weight: Float[Tensor, "n p"]) -> Float[Tensor, "n"]:
    """1 − normalised cross-correlation where both have pixels; constant images correlate with nothing."""
    n = len(still)
    first, second = (
        (part - (part * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)) * weight
        for part in (still.reshape(n, -1), moved.reshape(n, -1))
    )
    return 1 - (first * second).sum(1) / (first.square().sum(1) * second.square().sum(1) + 1e-9).sqrt()


def _centres(side: int) -> Float[Tensor, "side"]:
    """Of pixels, from −1 to 1."""
    return torch.linspace(-1 + 1 / side, 1 - 1 / side, side)
