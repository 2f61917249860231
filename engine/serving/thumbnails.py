"""Pictures of exemplars as PNG files, those asked for last kept in memory."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.views.showing import as_picture, png_bytes
from tmm_engine.views.tiles import enlarged

KEPT = 1024
LARGEST = 1024


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A PNG file.

    Attributes:
        content: Of the file.
        tag: The same for the same content, in quotes: an entity tag of HTTP.
    """

    content: bytes
    tag: str


class Thumbnails:
    """Of the exemplars of one store.

    Args:
        store: The exemplars.
    """

    def __init__(self, store: ExemplarStore) -> None:
        # of nothing that knows this object: in a cycle the store would stay in memory after the version is gone
        self._kept: Callable[[int, int | None], Thumbnail] = lru_cache(KEPT)(partial(_made, store))

    def of(self, row: int, *, side: int | None = None) -> Thumbnail:
        """One exemplar's.

        Args:
            row: Its place in the store.
            side: Of a square that it fills, in pixels; small ones grow by a whole factor, pixels staying square. None:
                as it is stored.
        """
        return self._kept(row, side)


def _made(store: ExemplarStore, row: int, side: int | None) -> Thumbnail:
    image = store.images(np.array([row]))[0]
    content = png_bytes(as_picture(image) if side is None else enlarged(image, side=side))
    return Thumbnail(content, f'"{hashlib.blake2b(content, digest_size=16).hexdigest()}"')
