"""What a server is started with."""

from dataclasses import dataclass, field
from pathlib import Path

from tmm_engine.serving.keys import Keys

MAX_K = 1000
"""Neighbours in one answer."""

SUFFIX = ".idx"
"""Of the folders of indexes that clients build."""

REFRESH_SECONDS = 1.0
"""Between two looks at whether an index has changed on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may bring; checked before anything of it is decoded.

    Attributes:
        body_bytes: Of a request's body.
        pixels: Height × width of one image.
        images: In one request.
        waiting: Images that wait for a collection; a request that would be one too many is answered 503.
        batch: Images of different requests that are searched for together.
        decoding: Images decoded at the same time.
        body_seconds: That a body may take, beside one for every 8 KiB of it.
    """

    body_bytes: int = 32 << 20
    pixels: int = 32 << 20
    images: int = 64
    waiting: int = 64
    batch: int = 16
    decoding: int = 2
    body_seconds: float = 10.0

    @property
    def pixels_together(self) -> int:
        """Of all images in one request: what 16 of the largest have."""
        return 16 * self.pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of a server.

    Attributes:
        limits: Of requests.
        keys: Who may read, who may write; without any, everybody.
        hosts: Names that requests may be addressed to; empty: any.
        batched: Whether images of different requests pass the network together, so that features round otherwise.
        builds: Folder for the indexes of collections that clients build; None: they may not.
        sources: Folder with images that such an index may be built of; None: of images in the request alone.
    """

    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=Keys)
    hosts: tuple[str, ...] = ()
    batched: bool = False
    builds: Path | None = None
    sources: Path | None = None
