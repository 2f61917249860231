"""Cutting work into batches: how many images one forward pass takes, and reading the next batch while the last is
worked on.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

from tmm_engine.index.types import ImageShape

T = TypeVar("T")

MAX_IMAGES = 512
PIXELS = 1 << 19  # a batch's pixels per channel: 512 images of 32×32, 10 of 224×224


def forward_batch_size(shape: ImageShape) -> int:
    """Images in one forward pass, so that activations stay small whatever the image size."""
    _, height, width = shape
    return max(1, min(MAX_IMAGES, PIXELS // (height * width)))


def prefetched(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """The items in order, produced by a thread that keeps at most `depth` ready, and one more in hand. Its exceptions
    are raised here.

    Closing the iterator early stops the thread after the item it is at.
    """
    ready: queue.Queue[tuple[Literal["item"], T] | tuple[Literal["error"], BaseException] | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[Literal["item"], T] | tuple[Literal["error"], BaseException] | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(None)
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) is not None:
            if entry[0] == "error":
                raise entry[1]
            yield entry[1]
    finally:
        stop.set()
        thread.join()
