"""Where all workers write how far they are, and whoever waits for them reads it."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Tallies:
    """How much is done of each part; what is done again counts once."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def report(self, part: int, done: int) -> None:
        """So much of a part is done."""
        self._done[part] = done

    def total(self, first: int, stop: int | None) -> int:
        """Of the parts from one on to before another (None: to the last)."""
        return sum(done for part, done in self._done.items() if part >= first and (stop is None or part < stop))

    def forget(self, first: int, stop: int) -> None:
        """Those parts are done with."""
        for part in range(first, stop):
            self._done.pop(part, None)


class Board:
    """`Tallies` in an actor of Ray's, with no CPU of its own.

    Attributes:
        actor: For workers.
    """

    def __init__(self) -> None:
        import ray

        self.actor: Any = ray.remote(Tallies).options(num_cpus=0, max_restarts=-1).remote()
        self._asked: dict[int, Any] = {}  # by the first part, which is one reader's own

    def read(self, say: Callable[[int], None], *, first: int = 0, stop: int | None = None) -> None:
        """Say how much is done of the parts from one on to before another, if it is known by now; nobody waits."""
        import ray
        from ray.exceptions import RayError

        asked = self._asked.pop(first, None) or self.actor.total.remote(first, stop)
        ready, _ = ray.wait([asked], timeout=0)
        if not ready:
            self._asked[first] = asked
            return
        with suppress(RayError):
            say(ray.get(asked))

    def forget(self, first: int, stop: int) -> None:
        """Those parts are done with."""
        self._asked.pop(first, None)
        self.actor.forget.remote(first, stop)

    def close(self) -> None:
        """End it."""
        import ray

        ray.kill(self.actor)


def reporter(actor: Any, part: int) -> Callable[[int], None]:
    """What a worker calls with how much of a part is done."""

    def report(done: int) -> None:
        actor.report.remote(part, done)

    return report
