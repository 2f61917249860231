"""Types that several rooms name."""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image

ImageShape = tuple[int, int, int]
"""Channels (1 or 3), height, width."""

ImageLike = Path | str | bytes | bytearray | memoryview | io.IOBase | Image.Image | np.ndarray | torch.Tensor
"""Whatever can be decoded as one image: a file, its content, an open file, pixels."""

Rows = Int64[np.ndarray, "rows"]
"""Exemplars by their positions, 0 to n−1, in one opened version of a store."""
