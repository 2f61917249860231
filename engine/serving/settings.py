"""What a server is started with."""

from dataclasses import dataclass, field

from tmm_engine.serving.keys import Keys

MAX_K = 1000
"""Neighbours in one answer."""

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
    """

    body_bytes: int = 32 << 20
    pixels: int = 32 << 20
    images: int = 64
    waiting: int = 64
    batch: int = 16
    decoding: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of a server.

    Attributes:
        limits: Of requests.
        keys: Who may read, who may write; without any, everybody.
        hosts: Names that requests may be addressed to; empty: any.
        batched: Whether images of different requests pass the network together, so that features round otherwise.
    """

    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=Keys)
    hosts: tuple[str, ...] = ()
    batched: bool = False
