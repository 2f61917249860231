"""A random sample of a source that is read once, in whatever order."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from tmm_engine.index.errors import InputError
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import EncodedSource, ImageRecord, ImageSource

T = TypeVar("T")


def reservoir(items: Iterable[T], size: int, generator: np.random.Generator) -> list[T]:
    """A uniform sample of so many items, or all where there are no more; they are looked at once."""
    kept: list[T] = []
    for seen, item in enumerate(items, start=1):
        if len(kept) < size:
            kept.append(item)
        elif (slot := int(generator.integers(seen))) < size:
            kept[slot] = item
    return kept


def readable(source: ImageSource, shape: Target, progress: Progress = silent) -> Iterator[ImageRecord]:
    """The source's images that can be read.

    Args:
        source: Read to its end.
        shape: What the images are brought to.
        progress: Told of images read.

    Raises:
        InputError: none can be read.
    """
    seen = 0
    for record in source.read(shape):
        if isinstance(record, ImageRecord):
            seen += 1
            yield record
        progress("reading", seen, len(source))
    if not seen:
        raise InputError(f"{source.name}: no image could be read")


def sampled(
    source: ImageSource, shape: Target, size: int, *, seed: int = 0, progress: Progress = silent
) -> list[ImageRecord]:
    """A uniform sample of the readable images, in random order; all where there are no more.

    Of a source whose images have to be decoded, only those that are drawn are; for one that cannot be read no other is
    drawn, unless none of them can.

    Args:
        source: Gone through to its end.
        shape: What the images are brought to.
        size: At least 1.
        seed: Of the choice (reservoir sampling) and the order.
        progress: Told of images read.

    Raises:
        InputError: no image can be read.
    """
    generator = np.random.default_rng(seed)
    kept = _drawn(source, shape, size, generator, progress) if isinstance(source, EncodedSource) else []
    kept = kept or reservoir(readable(source, shape, progress), size, generator)
    return [kept[place] for place in generator.permutation(len(kept))]


def _drawn(
    source: EncodedSource, shape: Target, size: int, generator: np.random.Generator, progress: Progress
) -> list[ImageRecord]:
    """A uniform sample of the images without those that cannot be read: decoded after it is drawn."""
    drawn = reservoir(range(len(source)), size, generator)
    found: dict[int, ImageRecord] = {}
    for done, (position, record) in enumerate(zip(sorted(drawn), source.read_at(shape, set(drawn)), strict=False)):
        if isinstance(record, ImageRecord):
            found[position] = record
        progress("reading", done + 1, len(drawn))
    return [found[position] for position in drawn if position in found]
