"""A lane: one thread that works off what is asked of an index, with a limit on what may wait."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tmm_engine.index.errors import TmmEngineError

IDLE = 10.0
"""Seconds without work after which a lane's thread ends."""

SHARE = 0.25
"""Of the time that several took together: how long company is waited for at most, and no longer than `MOMENT`."""

MOMENT = 0.05
"""Seconds."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def in_own_thread(work: Callable[[], Answer]) -> Answer:
    """Compute something in a thread that ends, so that what OpenMP keeps for it goes with it (see `Lane`)."""
    with ThreadPoolExecutor(max_workers=1) as own:
        return own.submit(work).result()


class BusyError(TmmEngineError):
    """There is no place left in a lane.

    Attributes:
        seconds: After which there should be one.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"too much is waiting already; ask again in {seconds:.0f} s")
        self.seconds = seconds


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    items: list[Any]
    kind: object
    work: Callable[[list[Any]], Sequence[Any]]
    answers: Future[list[Any]] = field(default_factory=Future)


class Lane:
    """Works off what is asked, in order; what is asked for alike by several while it is busy, together.

    What comes alone is worked off at once. Where several were worked off together, those who asked will soon ask again:
    as many are waited for, for a moment. The thread ends when it is idle, since OpenMP keeps workers for each thread
    that has computed: where these are more than cores, all are put to sleep after every step and woken for the next,
    which makes a search a quarter slower.

    Args:
        name: Of its thread.
        limit: Items that may wait.
        together: Items that are worked off at once.
        idle: Seconds without work after which the thread ends, until there is some.
    """

    def __init__(self, name: str, *, limit: int, together: int, idle: float = IDLE) -> None:
        self._name, self._limit, self._together, self._idle = name, limit, together, idle
        self._waiting: deque[_Asked] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 0.0  # that one item took, lately
        self._expected, self._patience = 0, 0.0  # who asked together last, if several, and how long they are waited for
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """Items that wait."""
        with self._changed:
            return sum(len(each.items) for each in self._waiting)

    def ask(
        self, items: list[Item], work: Callable[[list[Item]], Sequence[Answer]], *, kind: object = None
    ) -> Future[list[Answer]]:
        """The answers to some items, once they are there.

        Args:
            items: At least one.
            work: Answers items of this kind, in their order.
            kind: What can be worked off together; None: alone.

        Raises:
            BusyError: too much waits already, or the lane is closed.
        """
        asked = _Asked(items, kind, work)
        with self._changed:
            waits = sum(len(each.items) for each in self._waiting)
            if self._closed or (waits and waits + len(items) > self._limit):
                raise BusyError(max(1.0, waits * self._seconds))
            self._waiting.append(asked)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()
        return asked.answers

    def close(self) -> None:
        """Take nothing more, and finish what waits."""
        with self._changed:
            self._closed, thread = True, self._thread
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while batch := self._next():
            began, items = time.perf_counter(), [item for each in batch for item in each.items]
            try:
                answers = iter([*batch[0].work(items)])
                for each in batch:
                    each.answers.set_result([next(answers) for _ in each.items])
            except BaseException as error:  # a panic in Rust is no Exception, and the lane goes on
                for each in batch:
                    if not each.answers.done():
                        each.answers.set_exception(error)
            took = time.perf_counter() - began
            self._seconds = took / len(items)
            self._expected, self._patience = len(batch), min(MOMENT, SHARE * took)

    def _is_company(self) -> bool:
        """Whether as many ask as were worked off together, or the lane is closed."""
        return self._closed or len(self._waiting) >= self._expected

    def _next(self) -> list[_Asked]:
        """What is worked off next: the first that waits, and what is like it; nothing once all is done for a while."""
        with self._changed:
            while True:
                if not self._waiting and not self._closed:
                    self._changed.wait_for(lambda: self._waiting or self._closed, timeout=self._idle)
                if not self._waiting:
                    self._thread = None
                    return []
                if self._expected > 1:
                    self._changed.wait_for(self._is_company, timeout=self._patience)
                    self._expected = 0
                first = self._waiting.popleft()
                batch, size = [first], len(first.items)
                for each in [*self._waiting] if first.kind is not None else []:
                    if each.kind == first.kind and size + len(each.items) <= self._together:
                        self._waiting.remove(each)
                        batch.append(each)
                        size += len(each.items)
                if wanted := [each for each in batch if each.answers.set_running_or_notify_cancel()]:
                    return wanted
