"""A lane: one thread that works off what is asked of an index, with a limit on what may wait."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tmm_engine.index.errors import TmmEngineError

Item = TypeVar("Item")
Answer = TypeVar("Answer")


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

    Nothing waits for company: what is there when the thread is free is what it takes.

    Args:
        name: Of its thread.
        limit: Items that may wait.
        together: Items that are worked off at once.
    """

    def __init__(self, name: str, *, limit: int, together: int) -> None:
        self._limit, self._together = limit, together
        self._waiting: deque[_Asked] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 0.0  # that one item took, lately
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

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
            self._changed.notify()
        return asked.answers

    def close(self) -> None:
        """Take nothing more, and finish what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

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
            self._seconds = (time.perf_counter() - began) / len(items)

    def _next(self) -> list[_Asked]:
        """What is worked off next: the first that waits, and what is like it; nothing once the lane is closed."""
        with self._changed:
            while True:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return []
                first = self._waiting.popleft()
                batch, size = [first], len(first.items)
                for each in [*self._waiting] if first.kind is not None else []:
                    if each.kind == first.kind and size + len(each.items) <= self._together:
                        self._waiting.remove(each)
                        batch.append(each)
                        size += len(each.items)
                if wanted := [each for each in batch if each.answers.set_running_or_notify_cancel()]:
                    return wanted
