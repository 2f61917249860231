"""Photographs to measure with: JPEG of 640×480, made here, with the smooth and the rough of real ones."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 640, 480
DISTINCT = 32  # that are made; the others are these under other names


def write_photographs(folder: Path, count: int) -> Path:
    """So many JPEG files in a folder that does not exist yet."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:06d}.jpg"
        if number >= DISTINCT:
            os.link(folder / f"{number % DISTINCT:06d}.jpg", path)
            continue
        smooth = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(smooth.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.float32)
        grain = generator.normal(0, 6, pixels.shape)
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder
