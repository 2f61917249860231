"""Structural similarity (SSIM): Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to
structural similarity", IEEE Transactions on Image Processing 13(4), 2004.
"""

import numpy as np
from jaxtyping import Float, Float32, Float64
from scipy.ndimage import gaussian_filter

SIGMA, RADIUS = 1.5, 5  # §III-C: a circular Gaussian window of 11×11
C1, C2 = 0.01**2, 0.03**2  # Eqs. 7 and 10, for pixels in [0, 1]


def ssim(image: Float32[np.ndarray, "c h w"], others: Float32[np.ndarray, "n c h w"]) -> Float64[np.ndarray, "n"]:
    """SSIM of an image with each of several others (Eq. 13), the mean over all pixels and channels (Eq. 17).

    Pixels are in [0, 1]. Borders are mirrored, not cut off, so that every pixel of a small image counts.

    Returns:
        In [−1, 1]; 1 where the images are equal.
    """
    x, y = image[None].astype(np.float64), others.astype(np.float64)
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    variance_x, variance_y = _local_mean(x * x) - mean_x**2, _local_mean(y * y) - mean_y**2
    covariance = _local_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    similarity: Float64[np.ndarray, "n"] = (luminance * structure).mean(axis=(1, 2, 3))
    return similarity


def _local_mean(images: Float[np.ndarray, "n c h w"]) -> Float[np.ndarray, "n c h w"]:
    means: Float[np.ndarray, "n c h w"] = gaussian_filter(images, SIGMA, radius=RADIUS, axes=(2, 3))
    return means
