"""A query: pixels in [0, 1] of the index's shape, with a name for the answer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float32

from tmm_engine.index.errors import ImageError, InputError, printable
from tmm_engine.index.labels import Vocabulary, match_labels
from tmm_engine.index.limits import MAX_PIXELS
from tmm_engine.index.models.preprocessing import Target, shape_of
from tmm_engine.index.sources.images import channels_first, decode_image, to_numpy
from tmm_engine.index.sources.records import ImageRecord, ImageSource, label_values_of
from tmm_engine.index.types import ImageLike
from tmm_engine.results import FailedQuery

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """What is searched for.

    Attributes:
        name: Its path, id, or position: how answers refer to it.
        pixels: float32 (c, h, w) in [0, 1].
        label: Its own where it is known, by name, or by its number in the index; only shown, never used in a search.
        assumed: What had to be assumed of the image, in sentences; answers repeat them.

    Raises:
        ImageError: pixels of another kind.
        InputError: a label of another kind.
    """

    name: str
    pixels: Float32[np.ndarray, "c h w"]
    label: int | str | None = None
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.pixels, np.ndarray) and self.pixels.ndim == 3 and self.pixels.dtype == np.float32):
            raise ImageError(
                f"{self.name}: expected pixels as an array (c, h, w) of float32 in [0, 1], got "
                f"{type(self.pixels).__name__}; search with the image itself, which is brought to that"
            )
        if not isinstance(self.label, int | np.integer | str | None):
            raise InputError(f"{self.name}: expected a label's name or number, got {type(self.label).__name__}")


def as_query(image: ImageLike | Query, *, shape: Target, name: str, max_pixels: int = MAX_PIXELS) -> Query:
    """A query from anything that is an image.

    Files, bytes and PIL images are brought to `shape`; arrays must have it. Floating-point arrays keep their precision.

    Args:
        image: What to search for.
        shape: What the index's classifier looks at (`Classifier.target`).
        name: Used where the image brings none of its own.
        max_pixels: Height × width beyond which a file is refused before it is decoded.

    Raises:
        ImageError: an unreadable image, or an array of another shape, dtype or range.
    """
    expected = shape_of(shape)
    if isinstance(image, Query):
        if image.pixels.shape != expected:
            raise ImageError(
                f"{image.name}: expected a query of shape (c, h, w) = {expected}, got {image.pixels.shape}"
            )
        return image
    if isinstance(image, str | Path):
        name = printable(image)
    assumed: list[str] = []
    decoded = decode_image(image, shape=shape, assumed=assumed, max_pixels=max_pixels)
    pixels = decoded.astype(np.float32) / np.float32(255.0)
    if isinstance(image, np.ndarray | torch.Tensor) and np.issubdtype(to_numpy(image).dtype, np.floating):
        values = channels_first(to_numpy(image)[None], shape=expected)[0]
        pixels = np.array(values, dtype=np.float32, order="C").clip(0, 1)
    return Query(name, pixels, None, tuple(assumed))


def answered(
    queries: Sequence[Query], ask: Callable[[Sequence[Query]], Iterable[Answer]]
) -> list[Answer | FailedQuery]:
    """The answers to all queries at once; where one of them cannot be searched with, one by one.

    Args:
        queries: Any number.
        ask: Answers some of them, in their order.
    """
    if not queries:
        return []
    try:
        return [*ask(queries)]
    except ImageError as error:
        if len(queries) == 1:
            return [FailedQuery(queries[0].name, str(error))]
    return [answer for query in queries for answer in answered([query], ask)]


def queries_from(
    source: ImageSource, shape: Target, *, prefix: str = "", vocabulary: Vocabulary | None = None
) -> list[Query | FailedQuery]:
    """All images of a source as queries, as `each_query` has them one by one."""
    return [*each_query(source, shape, prefix=prefix, vocabulary=vocabulary)]


def each_query(
    source: ImageSource, shape: Target, *, prefix: str = "", vocabulary: Vocabulary | None = None
) -> Iterator[Query | FailedQuery]:
    """Every image of a source as a query, with its label where it has one; for one that cannot be read, why.

    Labels that have names are names: their numbers in the source are not those of the index.

    Args:
        source: Where they come from.
        shape: What the index's classifier looks at (`Classifier.target`).
        prefix: Put before their ids to make names.
        vocabulary: The index's: by it a table's numbers are names, or not, as they are of exemplars.
    """
    values = label_values_of(source)
    are_names = bool(
        values and vocabulary and match_labels(source.name, None, vocabulary, values=values).numbers is not None
    )
    for record in source.read(shape):
        name = prefix + record.id
        if isinstance(record, ImageRecord):
            names, label = source.class_names, record.label
            own: int | str | None = label if label is None or names is None else names[label]
            if are_names and label is not None:
                own = str(label)
            yield Query(name, record.image.astype(np.float32) / np.float32(255.0), own)
        else:
            yield FailedQuery(name, record.reason)
