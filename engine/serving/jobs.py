"""Long work: it goes on when whoever asked for it is gone, says how far it is, and can be cancelled."""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tmm_engine.index.errors import TmmEngineError
from tmm_engine.index.progress import Progress
from tmm_engine.serving.lane import BusyError, Lane

WAITING = 32
"""Jobs that may be under way or wait."""

KEPT = 100
"""Jobs that are remembered; the oldest that have ended are forgotten first."""


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class UnknownJobError(TmmEngineError):
    """No job has this id."""


class _CancelledError(Exception):
    """Raised where a job that is to be cancelled reports how far it is."""


@dataclass(slots=True, eq=False)
class Job:
    """One piece of long work.

    Attributes:
        id: In addresses.
        kind: What it does, in a word.
        collection: To which.
        state: Where it is.
        step: What it is at.
        done: Of this step.
        total: Of this step.
        created: Seconds since 1970.
        ended: Likewise, once it has.
        result: Once it is done.
        error: Why it failed.
    """

    kind: str
    collection: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: JobState = JobState.QUEUED
    step: str = ""
    done: int = 0
    total: int = 0
    created: float = field(default_factory=time.time)
    ended: float | None = None
    result: Any = None
    error: str | None = None
    _public: Callable[[str], str] = str
    _cancel: threading.Event = field(default_factory=threading.Event)
    _future: "Future[list[None]] | None" = None

    def told(self) -> dict[str, Any]:
        """As plain values, but for the result."""
        names = ("id", "kind", "collection", "state", "step", "done", "total", "created", "ended", "error")
        return {name: getattr(self, name) for name in names}

    @property
    def over(self) -> bool:
        """Whether nothing will come any more."""
        return self.ended is not None

    def cancel(self) -> None:
        """Where it is, it stops at the next sign of progress; what it would have changed stays as it was."""
        self._cancel.set()
        if self._future is not None and self._future.cancel():
            self._end(JobState.CANCELLED)

    def run(self, work: Callable[[Progress], Any]) -> None:
        """Do it; whatever happens is kept."""
        self.state = JobState.RUNNING
        try:
            self.result = work(self._report)
            self._end(JobState.DONE)
        except _CancelledError:
            self._end(JobState.CANCELLED)
        except TmmEngineError as error:
            self._fail(str(error))
        except BaseException as error:  # a panic in Rust is no Exception
            self._fail(f"this should not happen: {type(error).__name__}: {error}")

    def _report(self, step: str, done: int, total: int) -> None:
        if self._cancel.is_set():
            raise _CancelledError
        self.step, self.done, self.total = step, done, total

    def _fail(self, error: str) -> None:
        self.error = self._public(error)
        self._end(JobState.FAILED)

    def _end(self, state: JobState) -> None:
        self.state = state
        self.ended = time.time()


class Jobs:
    """All jobs of a server; one runs at a time.

    Args:
        public: Makes of an error what anybody may read.
    """

    def __init__(self, public: Callable[[str], str] = str) -> None:
        self._public = public
        self._jobs: dict[str, Job] = {}
        self._lane = Lane("jobs", limit=WAITING, together=1)
        self._guard = threading.Lock()

    def start(self, kind: str, collection: str, work: Callable[[Progress], Any]) -> Job:
        """A job that runs when those before it have ended.

        Args:
            kind: What it does, in a word.
            collection: To which.
            work: Is given where to report to; what it returns is the result.

        Raises:
            BusyError: too many wait.
        """
        job = Job(kind, collection, _public=self._public)
        with self._guard:
            if sum(not each.over for each in self._jobs.values()) >= WAITING:
                raise BusyError(float(WAITING))
            self._jobs[job.id] = job
            over = [each.id for each in self._jobs.values() if each.over]
            for known in over[: max(0, len(self._jobs) - KEPT)]:
                del self._jobs[known]
            job._future = self._lane.ask([work], lambda asked: [*map(job.run, asked)])
        return job

    def __getitem__(self, job_id: str) -> Job:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise UnknownJobError(f"no job has the id {job_id!r}; the last {KEPT} are remembered") from None

    def all(self) -> list[Job]:
        """Newest first."""
        with self._guard:
            return [*self._jobs.values()][::-1]

    def stop(self) -> None:
        """Cancel what waits and what runs."""
        for job in self.all():
            if not job.over:
                job.cancel()

    def close(self) -> None:
        """As `stop`, and wait until they have."""
        self.stop()
        self._lane.close()
