"""How long each step of a search took, for each of its queries."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Timings:
    """Seconds by step; a step done for several queries together counts as shared equally.

    Args:
        queries: How many there are.
    """

    def __init__(self, queries: int) -> None:
        self._seconds: list[dict[str, float]] = [{} for _ in range(queries)]

    @contextmanager
    def step(self, name: str, queries: Sequence[int] | None = None) -> Iterator[None]:
        """Time what happens inside, for the queries at these positions; None is all."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        served = range(len(self._seconds)) if queries is None else queries
        for position in served:
            own = self._seconds[position]
            own[name] = own.get(name, 0.0) + seconds / len(served)

    def of(self, query: int) -> dict[str, float]:
        """The steps of the query at a position, in the order in which they began."""
        return dict(self._seconds[query])
