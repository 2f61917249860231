"""A random sample of a source that is read once, in whatever order."""

import numpy as np

from tmm_engine.index.errors import InputError
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import ImageRecord, ImageSource
from tmm_engine.index.types import ImageShape


def sampled(
    source: ImageSource, shape: ImageShape, size: int, *, seed: int = 0, progress: Progress = silent
) -> list[ImageRecord]:
    """A uniform sample of the readable images, in random order; all where there are no more.

    Args:
        source: Read to its end.
        shape: What the images are brought to.
        size: At least 1.
        seed: Of the choice (reservoir sampling) and the order.
        progress: Told of images read.

    Raises:
        InputError: no image can be read.
    """
    generator, seen = np.random.default_rng(seed), 0
    kept: list[ImageRecord] = []
    for record in source.read(shape):
        if isinstance(record, ImageRecord):
            seen += 1
            if len(kept) < size:
                kept.append(record)
            elif (slot := int(generator.integers(seen))) < size:
                kept[slot] = record
        progress("reading", seen, len(source))
    if not kept:
        raise InputError(f"{source.name}: no image could be read")
    return [kept[place] for place in generator.permutation(len(kept))]
