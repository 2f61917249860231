"""Images on their way into an index."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.images import decode_image
from tmm_engine.results import FailedQuery

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Arriving:
    """An image that is to become an exemplar, not decoded.

    Attributes:
        id: Its id.
        content: Of the file.
        label: Its label's name.
        metadata: By column.
    """

    id: str
    content: bytes
    label: str | None = None
    metadata: dict[str, Value] = field(default_factory=dict)


def source_of(
    arriving: Sequence[Arriving], target: Target, *, max_pixels: int
) -> tuple[ArraySource, list[FailedQuery]]:
    """Those that can be decoded as a source, and what is wrong with the others.

    Args:
        arriving: At least one.
        target: What the index's classifier looks at.
        max_pixels: Of an image.

    Raises:
        ImageError: none can be decoded.
        InputError: two have the same id, or metadata are of other kinds than their columns.
    """
    good, images, failed = [], [], []
    for each in arriving:
        try:
            images.append(decode_image(each.content, shape=target, max_pixels=max_pixels))
            good.append(each)
        except ImageError as error:
            failed.append(FailedQuery(each.id, str(error)))
    if not good:
        raise ImageError(f"{failed[0].query}: {failed[0].error}")
    if len({each.id for each in good}) < len(good):
        raise InputError("expected different ids, got one twice")
    columns = dict.fromkeys(name for each in good for name in each.metadata)
    source = ArraySource(
        np.stack(images),
        [each.label for each in good] if any(each.label is not None for each in good) else None,
        ids=[each.id for each in good],
        metadata={name: [each.metadata.get(name) for each in good] for name in columns},
        name="the server's clients",
    )
    return source, failed
