"""Perceptual hashes as vectors: their cosine similarity is 1 − 2 · the share of bits that differ."""

from collections.abc import Callable
from typing import Any

import imagehash
import numpy as np
from jaxtyping import Float32
from PIL import Image

HASHES: dict[str, Callable[[Image.Image], Any]] = {
    "average hash": imagehash.average_hash,
    "perceptual hash": imagehash.phash,
    "difference hash": imagehash.dhash,
    "wavelet hash": imagehash.whash,
}


def hashed(images: Float32[np.ndarray, "n c h w"], name: str) -> Float32[np.ndarray, "n bits"]:
    """One row of ±1/√bits for each image.

    Args:
        images: Pixels in [0, 1].
        name: One of HASHES.
    """
    return np.stack([_bits(image, HASHES[name]) for image in images])


def _bits(image: Float32[np.ndarray, "c h w"], hash_of: Callable[[Image.Image], Any]) -> Float32[np.ndarray, "bits"]:
    pixels = np.rint(image * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[0]) if len(pixels) == 1 else Image.fromarray(pixels.transpose(1, 2, 0))
    signs = np.where(hash_of(picture).hash.ravel(), np.float32(1), np.float32(-1))
    return (signs / np.sqrt(np.float32(len(signs)))).astype(np.float32)
