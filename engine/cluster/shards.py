"""The shards of an index: asked all at once, loaded again when their workers are lost, missed when they cannot be."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped

from tmm_engine.cluster.board import Board
from tmm_engine.cluster.connection import Connection
from tmm_engine.cluster.crew import ATTEMPTS, START_SECONDS, TICK_SECONDS, losses
from tmm_engine.cluster.identity import Identity
from tmm_engine.cluster.shard import Shard, ShardSetup
from tmm_engine.index.errors import IndexStateError, TmmEngineError

RELOAD_SECONDS = 60.0  # that a search waits for a shard whose worker was lost


class ShardMissingError(Exception):
    """A shard was lost and could not be loaded again in time: `Shards.missing` has it now."""


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """What `ask` gets, and the number that the first shard reports under; None where none reports."""

    method: str
    arguments: Sequence[tuple[Any, ...] | None]
    first: int | None
    say: Callable[[int], None]


@dataclass(slots=True, eq=False)
class _Held:
    """A shard.

    Attributes:
        setup: What it holds.
        actor: That holds it.
        starting: What it answers once it is there; None from then on.
        missing: Why it cannot be asked; None where it can.
    """

    setup: ShardSetup
    actor: Any = None
    starting: Any = None
    missing: str | None = None


class Shards:
    """All exemplars of a version of an index, in workers. They are loaded when it is made.

    Args:
        setups: Of each shard, in the order of their rows.
        connection: To the cluster.
        board: Where their workers report.
        ids: Of all exemplars, in the order of their rows.

    Raises:
        IndexStateError: a worker cannot be started, is of another version, or cannot open the index.
        ModelError: it makes another classifier of it.
    """

    def __init__(
        self, setups: Sequence[ShardSetup], connection: Connection, board: Board, *, ids: Shaped[np.ndarray, "n"]
    ) -> None:
        import ray

        self.ids = ids
        needs = {"num_cpus": connection.cpus, "num_gpus": connection.gpus, "scheduling_strategy": "SPREAD"}
        self._kind: Any = ray.remote(Shard).options(**needs)
        self._held = [_Held(setup) for setup in setups]
        self._board, self._asked, self._lock = board, 0, threading.RLock()
        for held in self._held:
            self._start(held)
        try:
            for held in self._held:
                self._wait(held, START_SECONDS, raising=True)
                if held.missing is not None:
                    raise IndexStateError(f"Ray: not all of {len(setups)} workers started: {held.missing}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        import ray

        for held in self._held:
            ray.kill(held.actor)
        self._held = []

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The first row of each shard, and the one after its last."""
        return [(held.setup.start, held.setup.stop) for held in self._held]

    @property
    def missing(self) -> list[tuple[int, int, str]]:
        """First row, row after the last, and why, of the shards that cannot be asked."""
        return [(held.setup.start, held.setup.stop, held.missing) for held in self._held if held.missing is not None]

    def look(self) -> None:
        """See whether shards that were missing are back."""
        with self._lock:
            for held in self._held:
                if held.missing is not None:
                    self._wait(held, 0.0)

    def ask(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...] | None],
        *,
        reported: bool = False,
        say: Callable[[int], None] = lambda done: None,
    ) -> list[Any]:
        """What shards answer; None of those that are not asked.

        Args:
            method: Of `Shard`.
            arguments: For each shard; None: it is not asked.
            reported: Whether the method's first argument is the number that it reports under; it is put in here.
            say: Told how much is done of all.

        Raises:
            ShardMissingError: one was lost and could not be loaded again in time.
            TmmEngineError: what a worker raised; so are errors of the operating system.
            IndexStateError: all is closed.
        """
        if not self._held:
            raise IndexStateError("Ray: the workers of this engine are closed; open the index again")
        with self._lock:
            first = self._asked
            self._asked += len(self._held)
        question, answers = _Question(method, arguments, first if reported else None, say), dict[int, Any]()
        try:
            lost = self._answered(question, answers)
        finally:
            if reported:
                self._board.forget(first, first + len(arguments))
        if not lost:
            return [answers.get(number) for number in range(len(arguments))]
        for held, _ in lost:
            held.missing = f"its worker was lost {ATTEMPTS} times in a search"
        raise ShardMissingError

    def _answered(self, question: _Question, answers: dict[int, Any]) -> list[tuple[_Held, Any]]:
        """Fill in all answers, loading again what is lost; what was still lost at the last attempt."""
        for _ in range(ATTEMPTS):
            lost = self._gather(question, answers)
            if not lost:
                break
            for held, actor in lost:
                self._reload(held, actor)
        return lost

    def _gather(self, question: _Question, answers: dict[int, Any]) -> list[tuple[_Held, Any]]:
        """Fill in the answers that are not there yet; the shards, with their actors, that were lost meanwhile."""
        import ray

        references, lost, first = {}, [], question.first
        for number, own in enumerate(question.arguments):
            if own is None or number in answers:
                continue
            held = self._held[number]
            if held.missing is not None:
                raise ShardMissingError
            whole = own if first is None else (first + number, *own)
            references[getattr(held.actor, question.method).remote(*whole)] = number, held, held.actor
        while references:
            ready, _ = ray.wait([*references], timeout=TICK_SECONDS)
            for reference in ready:
                number, held, actor = references.pop(reference)
                try:
                    answers[number] = _got(reference)
                except losses():
                    lost.append((held, actor))
            if first is not None:
                self._board.read(question.say, first=first, stop=first + len(question.arguments))
        return lost

    def _reload(self, held: _Held, lost: Any) -> None:
        """Load a shard again, unless another search has done so."""
        import ray

        with self._lock:
            if held.actor is lost:
                ray.kill(lost)
                self._start(held)
                self._wait(held, RELOAD_SECONDS)
            if held.missing is not None:
                raise ShardMissingError

    def _start(self, held: _Held) -> None:
        held.actor = self._kind.remote()
        held.starting = held.actor.prepare.remote(held.setup)

    def _wait(self, held: _Held, seconds: float, *, raising: bool = False) -> None:
        """Wait for a shard that starts; where it does not, `missing` says why, and it goes on starting."""
        import ray

        ends = time.monotonic() + seconds
        while held.starting is not None:
            ready, _ = ray.wait([held.starting], timeout=max(0.0, ends - time.monotonic()))
            if not ready:
                held.missing = held.missing or f"no worker that could hold them was ready within {seconds:g} s"
                return
            try:
                answer = _got(held.starting)
                Identity.own().check(answer.identity, answer.machine)
                held.starting = None
            except losses() as error:
                held.missing = str(error).strip().splitlines()[-1][:300]
                self._start(held)
            except (TmmEngineError, OSError) as error:
                if raising:
                    raise
                held.missing = str(error)
                self._start(held)
                return
        held.missing = None


def _got(reference: Any) -> Any:
    """An answer, or the error that was raised in its place."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, TmmEngineError | OSError):
            raise error.cause from None
        raise
