"""Made pictures as cameras leave them: odd sizes, JPEG and PNG, grey, with an alpha channel, turned by EXIF."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [
    (97, 131),
    (131, 97),
    (240, 181),
    (161, 161),
    (63, 200),
    (301, 223),
    (90, 91),
    (175, 260),
    (121, 77),
    (199, 333),
]
ORIENTATION = 0x0112


def texture(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 (h, w, 3): waves of several lengths, edges and a little noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = []
    for _ in range(3):
        waves = [np.sin(x * a + y * b) for a, b in generator.uniform(-1.5, 1.5, (6, 2))]
        planes.append(
            127 + 30 * sum(waves) + 40 * (x * generator.uniform(0.2, 2) > y) + generator.normal(0, 6, x.shape)
        )
    return np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)


def photographs(folder: Path) -> list[Path]:
    """Twenty files."""
    files = []
    for number in range(20):
        height, width = SIZES[number % len(SIZES)]
        image = Image.fromarray(texture(height, width, number))
        exif = Image.Exif()
        if number % 5 == 1:
            exif[ORIENTATION] = (3, 6, 8, 5)[number // 5]
        if number % 7 == 3:
            image = image.convert("L")
        suffix = ".jpg" if number % 2 else ".png"
        if suffix == ".png" and number % 4 == 0:
            image = image.convert("RGBA")
        files.append(folder / f"{number:02}{suffix}")
        image.save(files[-1], exif=exif)
    return files
