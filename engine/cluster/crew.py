"""Workers of one kind: given work, replaced when they are lost, heard in order."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tmm_engine.cluster.connection import Connection
from tmm_engine.cluster.identity import Identity
from tmm_engine.index.errors import IndexStateError, TmmEngineError

AHEAD = 2  # tasks that a worker has at a time, so that it never waits for the next
ATTEMPTS = 3  # at a task, each of which lost a worker
STARTS = 3  # that may fail one after another
START_SECONDS = 180.0  # without a single worker before a run is given up
TICK_SECONDS = 0.5  # between two looks at the progress


def losses() -> tuple[type[Exception], ...]:
    """What Ray raises in the place of an answer whose worker is gone, be it killed for memory or with its machine."""
    from ray import exceptions as ray

    return (
        ray.RayActorError,
        ray.ObjectLostError,
        ray.OutOfMemoryError,
        ray.NodeDiedError,
        ray.WorkerCrashedError,
        ray.ActorUnschedulableError,
    )


@dataclass(frozen=True, slots=True)
class Presence:
    """What a worker says once it is ready.

    Attributes:
        identity: What it runs.
        machine: Where.
        process: Its number there.
    """

    identity: Identity
    machine: str
    process: int


@dataclass(slots=True, eq=False)
class _Task:
    """A part of the work, its place among the others, and how often a worker was lost at it."""

    number: int
    what: str
    arguments: tuple[Any, ...]
    attempts: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    """An actor of Ray's, and what it has not answered: whether it is ready, and its tasks in order."""

    actor: Any
    starting: Any = None
    tasks: dict[Any, _Task] = field(default_factory=dict)


class Crew:
    """As many workers as a connection has room for; they start when it is made.

    Args:
        kind: A class: its `prepare` makes a worker ready and returns a `Presence`, its `work` does a task.
        connection: To the cluster.

    Attributes:
        lost: How many workers were lost and replaced.
    """

    def __init__(self, kind: type, connection: Connection) -> None:
        import ray

        needs = {"num_cpus": connection.cpus, "num_gpus": connection.gpus, "scheduling_strategy": "SPREAD"}
        self._kind: Any = ray.remote(kind).options(**needs)
        self._workers = [_Worker(self._kind.remote()) for _ in range(connection.workers)]
        self._prepared: tuple[Any, ...] = ()
        self._again, self._found = deque[_Task](), dict[int, Any]()
        self._failures, self._last_present = 0, time.monotonic()
        self.lost = 0

    def close(self) -> None:
        """End the workers."""
        import ray

        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers.clear()

    def run(
        self,
        prepared: tuple[Any, ...],
        tasks: Iterator[tuple[str, tuple[Any, ...]]],
        *,
        tick: Callable[[], None],
    ) -> Iterator[Any]:
        """What comes of every task, in their order.

        Args:
            prepared: What every worker's `prepare` gets.
            tasks: Each in words, and what a worker's `work` gets; taken as workers become free.
            tick: Called now and then.

        Raises:
            IndexStateError: no worker can be started, one is of another version, or ATTEMPTS were lost at one task.
            TmmEngineError: what a worker raised; so are errors of the operating system.
        """
        import ray

        self._prepared = tuple(map(ray.put, prepared))
        for worker in self._workers:
            worker.starting = worker.actor.prepare.remote(*self._prepared)
        numbered, following = (_Task(number, *task) for number, task in enumerate(tasks)), 0
        while self._hand_out(numbered) or any(worker.tasks for worker in self._workers):
            for reference in self._news():
                self._hear(reference)
            tick()
            while following in self._found:
                yield self._found.pop(following)
                following += 1

    def _hand_out(self, tasks: Iterator[_Task]) -> bool:
        """Give every worker that is ready what it can take; whether any task may be left."""
        for _ in range(AHEAD):
            for worker in self._workers:
                if worker.starting is None and len(worker.tasks) < AHEAD:
                    task = self._again.popleft() if self._again else next(tasks, None)
                    if task is None:
                        return False
                    worker.tasks[worker.actor.work.remote(*task.arguments)] = task
        return True

    def _news(self) -> list[Any]:
        """What was answered; waits for it a little."""
        import ray

        starting = [worker.starting for worker in self._workers if worker.starting is not None]
        running = [reference for worker in self._workers for reference in worker.tasks]
        if len(starting) < len(self._workers):
            self._last_present = time.monotonic()
        elif time.monotonic() - self._last_present > START_SECONDS:
            free, known = ray.available_resources(), ray.cluster_resources()
            raise IndexStateError(
                f"Ray: no worker started within {START_SECONDS:g} s: {free.get('CPU', 0):g} of {known.get('CPU', 0):g} "
                f"CPUs are free; wait until others are done, or use another cluster. Nothing was changed"
            )
        ready, _ = ray.wait([*running, *starting], timeout=TICK_SECONDS)
        return list(ready)

    def _hear(self, reference: Any) -> None:
        """An answer, or that its worker was lost."""
        import ray
        from ray.exceptions import RayTaskError

        worker = next(own for own in self._workers if reference == own.starting or reference in own.tasks)
        try:
            answer = ray.get(reference)
        except losses() as error:
            self._replace(worker, error)
        except RayTaskError as error:
            if isinstance(error.cause, TmmEngineError | OSError):
                raise error.cause from None
            raise
        else:
            if reference == worker.starting:
                Identity.own().check(answer.identity, answer.machine)
                worker.starting, self._failures = None, 0
            else:
                self._found[worker.tasks.pop(reference).number] = answer

    def _replace(self, worker: _Worker, error: Exception) -> None:
        """Another worker in the place of one that was lost; its tasks are to be done again."""
        import ray

        reason = str(error).strip().splitlines()[-1][:300]
        if worker.starting is not None:
            self._failures += 1
            if self._failures == STARTS:
                raise IndexStateError(f"Ray: no worker can be started ({reason}). Nothing was changed")
        tasks = [*worker.tasks.values()]
        if tasks:
            tasks[0].attempts += 1
            if tasks[0].attempts == ATTEMPTS:
                raise IndexStateError(f"Ray: {ATTEMPTS} workers were lost at {tasks[0].what} ({reason})")
        self._again.extend(tasks)
        ray.kill(worker.actor)  # it may only be out of reach
        self._workers.remove(worker)
        actor = self._kind.remote()
        self._workers.append(_Worker(actor, actor.prepare.remote(*self._prepared)))
        self.lost += 1
