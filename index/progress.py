"""How long work reports that it moves: a callback, so that no library layer draws anything."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called as work goes on; whoever passes one decides whether and how to show it."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` units of ``step`` are finished."""


def silent(step: str, done: int, total: int) -> None:
    """Show nothing."""


def part_of(progress: Progress, number: int, parts: int) -> Progress:
    """What reports one of so many equal parts as its share of the whole; parts are counted from 0."""

    def shared(step: str, done: int, total: int) -> None:
        progress(step, number * total + done, parts * total)

    return shared
