"""Images on their way into an index."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException

from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.images import decode_image
from tmm_engine.index.store.changes import ChangeReport
from tmm_engine.index.store.embedding import BuildReport
from tmm_engine.index.types import ImageShape
from tmm_engine.results import FailedQuery
from tmm_engine.serving.reading import check_together, from_base64
from tmm_engine.serving.requests import NamedExemplar
from tmm_engine.serving.settings import Limits

Value = str | int | float | bool | None
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # line breaks among them
MAX_DECODED = 1 << 30
"""Bytes that the images of one request may become."""


@dataclass(frozen=True, slots=True)
class Arriving:
    """An image that is to become an exemplar, not decoded.

    Attributes:
        id: Its id.
        content: Of the file.
        label: Its label's name.
        metadata: By column.

    Raises:
        InputError: an id that no address can have, or a label that is no name.
    """

    id: str
    content: bytes
    label: str | None = None
    metadata: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id or CONTROL.search(self.id) or not {".", ".."}.isdisjoint(self.id.split("/")):
            raise InputError(
                f"expected an id that an address can have, without line breaks and without '.' or '..' between "
                f"slashes, got {self.id!r}"
            )
        if self.label is not None and (not self.label.strip() or CONTROL.search(self.label)):
            raise InputError(f"{self.id}: expected a label's name in one line, or none at all, got {self.label!r}")


def all_arriving(given: Sequence[NamedExemplar], shape: ImageShape, limits: Limits) -> list[Arriving]:
    """Images of one request, held to limits.

    Args:
        given: As they came.
        shape: That each of them will have.
        limits: Of requests.

    Raises:
        HTTPException: they are too large together, or one is not in base64.
        InputError: as `Arriving`, or two have the same id.
    """
    [(most, times)] = Counter(each.id for each in given).most_common(1) or [("", 1)]
    if times > 1:
        raise InputError(f"expected different ids, got {most!r} {times} times")
    decoded = len(given) * math.prod(shape)
    if decoded > MAX_DECODED:
        raise HTTPException(
            413,
            f"expected images that become at most {MAX_DECODED:,} bytes together, got {decoded:,}; send them in "
            f"several requests",
        )
    arriving = [Arriving(each.id, from_base64(each.image, each.id), each.label, each.metadata) for each in given]
    check_together([each.content for each in arriving], limits)
    return arriving


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
        InputError: metadata are of other kinds than their columns.
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
    columns = dict.fromkeys(name for each in good for name in each.metadata)
    source = ArraySource(
        np.stack(images),
        [each.label for each in good] if any(each.label is not None for each in good) else None,
        ids=[each.id for each in good],
        metadata={name: [each.metadata.get(name) for each in good] for name in columns},
        name="the server's clients",
    )
    return source, failed


def remarked(report: BuildReport | ChangeReport, failed: Sequence[FailedQuery]) -> dict[str, Any]:
    """What a change or a build says of its images, as plain values.

    Args:
        report: Of it.
        failed: What could not be decoded before it.
    """
    skipped = [*failed, *(FailedQuery(each.id, each.reason) for each in report.skipped)]
    return {"skipped": [each.to_json() for each in skipped], "remarks": list(report.remarks)}
