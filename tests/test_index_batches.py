"""Batch sizes, and reading ahead in a thread."""

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmm_engine.index.batches import MAX_IMAGES, PIXELS, forward_batch_size, prefetched


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def counting(produced: list[int], end: int = 1000) -> Iterator[int]:
    for number in range(end):
        produced.append(number)
        yield number


@given(st.integers(1, 3), st.integers(1, 5000), st.integers(1, 5000))
def test_a_forward_pass_takes_at_least_one_image_and_a_bounded_number_of_pixels(channels, height, width):
    size = forward_batch_size((channels, height, width))
    assert 1 <= size <= MAX_IMAGES
    assert size == 1 or size * height * width <= PIXELS


def test_batch_sizes_of_the_docstring():
    assert forward_batch_size((3, 32, 32)) == 512
    assert forward_batch_size((3, 224, 224)) == 10


@given(st.lists(st.none() | st.integers() | st.text()), st.integers(1, 5))
def test_items_come_in_order_whatever_they_are(items, depth):
    assert list(prefetched(items, depth=depth)) == items
    assert prefetching() == []


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_exception_comes_after_the_items_before_it(kind):
    error = kind("from the thread")

    def items() -> Iterator[int]:
        yield from (1, 2, 3)
        raise error

    received = []
    with pytest.raises(kind) as raised:
        for item in prefetched(items()):
            received.append(item)  # noqa: PERF402
    assert received == [1, 2, 3]
    assert raised.value is error
    assert prefetching() == []


def test_nothing_starts_before_the_first_item_is_asked_for():
    produced: list[int] = []
    prefetched(counting(produced))
    assert produced == []
    assert prefetching() == []


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_thread_runs_only_so_far_ahead(depth):
    produced: list[int] = []
    iterator = prefetched(counting(produced), depth=depth)
    for taken in range(1, 6):
        next(iterator)
        limit = taken + depth + 1  # those ready, and the one in hand
        deadline = time.monotonic() + 5
        while len(produced) < limit and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(produced) == limit
    iterator.close()


def test_closing_early_stops_the_thread_and_runs_the_generators_cleanup():
    cleaned = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            cleaned.set()

    iterator = prefetched(items())
    assert next(iterator) == 0
    assert len(prefetching()) == 1
    iterator.close()
    assert prefetching() == []
    del iterator
    assert cleaned.wait(5)


def test_leaving_a_loop_by_an_exception_stops_the_thread():
    with pytest.raises(RuntimeError, match="the consumer's"):
        for _ in prefetched(counting([])):
            raise RuntimeError("the consumer's")
    assert prefetching() == []
