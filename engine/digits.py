"""1,797 scanned handwritten digits, shipped with the package for its demo; NOTICE says where they are from."""

from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

GREY_LEVELS = 16  # how many of the 4×4 dots under a pixel are ink


def load_digits() -> tuple[UInt8[np.ndarray, "n 8 8"], Int64[np.ndarray, "n"]]:
    """Images, their 17 grey levels spread over 8 bits, and which digit each shows."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]  # (1797, 8, 8) of 0..16, (1797,)
    return np.rint(images * (255 / GREY_LEVELS)).astype(np.uint8), labels.astype(np.int64)
