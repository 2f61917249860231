"""A gallery: the first queries as rows, beside each the nearest three of every method (the paper's Fig. 4)."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64
from PIL import Image, ImageOps

from tmm_engine.index.files import write_file
from tmm_engine.index.sources.images import to_uint8
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.views.showing import png_bytes
from tmm_engine.views.tiles import BODY, CELL, GAP, PAPER, SMALL, TILE, below, beside, enlarged, framed, text_line

SHOWN = 3  # neighbours of each method


def draw_gallery(
    neighbours: Mapping[int, Mapping[str, Int64[np.ndarray, "k"]]],
    queries: Float32[np.ndarray, "q c h w"],
    labels: Int64[np.ndarray, "q"],
    exemplars: ExemplarStore,
    out: Path,
    *,
    rows: int = 8,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a PNG: queries as rows, methods as columns, neighbours framed by whether they have the query's label.

    Args:
        neighbours: Query -> method -> rows of exemplars, nearest first; every query has the same methods.
        queries: Pixels in [0, 1].
        labels: One per query.
        exemplars: Where the neighbours are.
        out: The file to write.
        rows: How many queries are shown.
        class_names: One per class; by default its number.

    Raises:
        InputError: the file cannot be written.
    """
    names = class_names or [str(label) for label in range(max(labels.max(), exemplars.labels.max()) + 1)]
    width = SHOWN * TILE + (SHOWN - 1) * GAP
    methods = list(next(iter(neighbours.values())))
    titles = [text_line(title, width=width, size=BODY) for title in methods]
    lines = [beside([text_line("query", width=TILE, size=BODY), *titles], gap=3 * GAP)]
    for query, found in islice(neighbours.items(), rows):
        label = int(labels[query])
        own = [_named(enlarged(to_uint8(queries[query][None])[0], side=CELL), names[label])]
        for method in methods:
            near = found[method][:SHOWN]
            pairs = zip(exemplars.images(near), exemplars.labels[near].tolist(), strict=True)
            tiles = [
                _named(framed(enlarged(image, side=CELL), same=other == label), names[other]) for image, other in pairs
            ]
            own.append(ImageOps.pad(beside(tiles, gap=GAP), (width, tiles[0].height), color=PAPER, centering=(0, 0)))
        lines.append(beside(own, gap=3 * GAP))
    write_file(out, png_bytes(ImageOps.expand(below(lines, gap=GAP), border=2 * GAP, fill=PAPER)))


def _named(picture: Image.Image, name: str) -> Image.Image:
    """In the middle of a tile, the name below."""
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    tile.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
    return below([tile, text_line(name, width=TILE, size=SMALL)], gap=2)
