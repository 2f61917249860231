"""Cutting work into batches: how many images one forward pass takes, and reading the next batch while the last is worked on."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from index.images import Shape

T = TypeVar("T")

MAX_IMAGES = 1024
PIXELS = 1 << 20  # a batch's pixels per channel: 1,024 images of 32×32, 20 of 224×224


def forward_batch_size(shape: Shape) -> int:
    """Images in one forward pass, so that activations stay small whatever the image size."""
    _, height, width = shape
    return max(1, min(MAX_IMAGES, PIXELS // (height * width)))


def prefetched(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """The items in order, produced by a thread that runs at most `depth` ahead. Its exceptions are raised here.

    Closing the iterator early stops the thread after the item it is at.
    """
    done = object()
    ready: queue.Queue[object] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put(done)
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) is not done:
            item, error = entry  # type: ignore[misc]
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
