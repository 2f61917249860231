"""Attempts to read or change an index where the disk is full, permissions are missing, or the clock was set back."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tmm_engine.bench.reliability import faults
from tmm_engine.bench.reliability.faults import Content, Plan
from tmm_engine.index.errors import TmmEngineError
from tmm_engine.index.store import building, commit
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.manifest import EXEMPLARS, MANIFEST, Manifest
from tmm_engine.versions import versions_of

NOBODY = 65534
SET_BACK = timedelta(days=730)
LIMITS = (0, 500, 2000, 5000, 8000, 20_000)  # bytes that a file may have; some lack only a file's end
KINDS = ("add", "delete", "compact", "build")
NOT_MOUNTED = "not mounted, which takes root on Linux"
CONTENT = Plan(0).first()
LATER = {"later": 99}


@dataclass(frozen=True, slots=True)
class Attempt:
    """Something that is tried in a process of its own.

    Attributes:
        what: In words.
        index: Its folder.
        work: Returns an outcome.
        arguments: Of the work.
        allowed: Outcomes that are right, and what the index must then hold; None where the work has looked.
        around: Entered before the work; leaving it makes the index accessible again.
    """

    what: str
    index: Path
    work: Callable[..., str]
    arguments: tuple[Any, ...]
    allowed: dict[str, Content | None]
    around: AbstractContextManager[None] = field(default_factory=nullcontext)


@dataclass(frozen=True, slots=True)
class Skipped:
    """What cannot be tried here, with the reason."""

    what: str


Attempts = Iterator[Attempt | Skipped]


def full_disks(folder: Path) -> Attempts:
    """Changes where files may not grow beyond a size, and on a disk that is full before long."""
    for limit in LIMITS:
        index, now = folder / str(limit) / "idx", Plan(limit).first()
        index.parent.mkdir(parents=True)
        write_index(faults.source_of(now), index, faults.small_classifier())
        _, after = Plan(limit).next(now)
        allowed: dict[str, Content | None] = {"error": now, "done": after}
        yield Attempt(f"no file beyond {limit} bytes", index, faults.fill_disk, (index, limit, limit), allowed)
    with small_disk(folder / "disk") as disk:
        if disk is None:
            yield Skipped(f"small disk: {NOT_MOUNTED}")
            return
        index = disk / "idx"
        write_index(faults.source_of(CONTENT), index, faults.small_classifier())
        yield Attempt("small disk", index, faults.change_on_small_disk, (index, 0), {"error": None})


def permissions(folder: Path) -> Attempts:
    """Readers and writers who may read but not write, or not even read, a part of an index."""
    index = _built(folder / "denied" / "idx")
    rehearsal = Path(shutil.copytree(index.parent, folder / "rehearsal")) / "idx"
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    reading = (index, rehearsal)
    parts = [path for path in sorted(index.rglob("*")) if path.is_dir()]
    yield Attempt("nothing denied, read", index, read, reading, {"right": CONTENT})
    for path in (index.parent, index, *parts):
        name = path.relative_to(index.parent)
        around = denied(path, 0o555)
        yield Attempt(f"{name} cannot be written, read", index, read, reading, {"right": CONTENT}, around)
        around = denied(path, 0o000)
        yield Attempt(f"{name} cannot be entered, read", index, read, reading, {"error": CONTENT}, around)
    for file in sorted({MANIFEST, *Manifest.read(index).files}):
        either: dict[str, Content | None] = (
            {"error": CONTENT} if file == MANIFEST else {"error": CONTENT, "right": CONTENT}
        )
        yield Attempt(f"{file} cannot be read", index, read, reading, either, denied(index / file, 0o000))
    for kind in KINDS:
        arguments = (index, kind, CONTENT, planned(kind, CONTENT), rehearsal)
        for path in _written_by(kind, index):
            around = denied(path, 0o555 if path.is_dir() else 0o444)
            what = f"{path.relative_to(index.parent)} cannot be written, {kind}"
            yield Attempt(what, index, change, arguments, {"error": CONTENT}, around)


def read_only(folder: Path) -> Attempts:
    """A reader and every kind of writer on a file system that was mounted again to be read only."""
    with small_disk(folder / "disk") as disk:
        if disk is None:
            yield Skipped(f"read-only disk: {NOT_MOUNTED}")
            return
        index = _built(disk / "idx")
        yield Attempt("read-only disk, read", index, read, (index, None), {"right": CONTENT}, unwritable(disk))
        for kind in KINDS:
            arguments = (index, kind, CONTENT, planned(kind, CONTENT), None)
            yield Attempt(f"read-only disk, {kind}", index, change, arguments, {"error": CONTENT}, unwritable(disk))


def clocks(folder: Path) -> Attempts:
    """Every kind of change by a writer whose clock is two years earlier than the one that built the index."""
    for kind in KINDS:
        index, after = _built(folder / kind / "idx"), planned(kind, CONTENT)
        yield Attempt(
            f"clock set back, {kind}", index, change_earlier, (index, kind, CONTENT, after), {"done": after | LATER}
        )


def planned(kind: str, now: Content) -> Content:
    """What a change of this kind leaves."""
    if kind == "add":
        return now | {"id 2": 90, "late": 91}
    if kind == "delete":
        return {id_: number for id_, number in now.items() if id_ not in ("id 3", "id 7")}
    return {f"id {n}": 100 + n for n in range(faults.START)} if kind == "build" else now


# ---- in processes of their own


def read(index: Path, rehearsal: Path | None) -> str:
    """Open and search: ``right``, ``wrong`` or ``error``; without privileges where there is a copy to rehearse with."""
    torch.set_num_threads(1)

    def look(path: Path) -> str:
        with faults.open_small(path) as engine:
            return "right" if faults.answers_right(engine, CONTENT) else "wrong"

    if rehearsal is not None:
        look(rehearsal)
        give_privileges_up()
    return outcome_of(lambda: look(index))


def change(index: Path, kind: str, now: Content, after: Content, rehearsal: Path | None) -> str:
    """One change: ``done`` or ``error``; without privileges where there is a copy to rehearse with."""
    torch.set_num_threads(1)
    classifier = faults.small_classifier()

    def make(path: Path) -> str:
        faults.carry_out(path, kind, now, after, classifier)
        return "done"

    if rehearsal is not None:
        own = Path(shutil.copytree(rehearsal, rehearsal.parent / str(os.getpid())))
        make(own)
        shutil.rmtree(own)
        give_privileges_up()
    return outcome_of(lambda: make(index))


def change_earlier(index: Path, kind: str, now: Content, after: Content) -> str:
    """One change by a clock that was set back, then one by the true clock: ``done``, or what is not in order.

    Lance's own clock, which is not Python's, is the true one throughout.
    """
    built = Manifest.read(index)
    with clock_set_back():
        outcome = change(index, kind, now, after, None)
    changed = Manifest.read(index)
    if outcome != "done" or changed.created >= built.created:
        return f"{outcome}, made at {changed.created}, built at {built.created}"
    faults.carry_out(index, "add", after, after | LATER, faults.small_classifier())
    contents = [after, after | LATER] if kind == "build" else [now, after, after | LATER]
    if [version.version for version in versions_of(index)] != list(range(1, len(contents) + 1)):
        return f"the versions are {versions_of(index)}"
    for number, content in enumerate(contents, start=1):
        with faults.open_small(index, version=number) as engine:
            if faults.content_of(engine) != content:
                return f"wrong at version {number}"
    return outcome


@contextmanager
def clock_set_back() -> Iterator[None]:
    """Python's clocks, as this program reads them, two years earlier."""
    now = time.time

    class Earlier(datetime):
        """Says what the time was two years ago."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) - SET_BACK

    with (
        patch.object(time, "time", lambda: now() - SET_BACK.total_seconds()),
        patch.object(commit, "datetime", Earlier),
        patch.object(building, "datetime", Earlier),
    ):
        yield


def outcome_of(work: Callable[[], str]) -> str:
    """What work returns; ``error`` for one of ours, in one line."""
    try:
        return work()
    except TmmEngineError as error:
        return "error" if len(str(error).splitlines()) == 1 else f"an error that is not one line: {error}"


def give_privileges_up() -> None:
    """Permissions say nothing to root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


# ---- around them


@contextmanager
def denied(path: Path, mode: int) -> Iterator[None]:
    """Permissions of a file or folder meanwhile."""
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


@contextmanager
def unwritable(disk: Path) -> Iterator[None]:
    """A mounted file system is read only meanwhile."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


@contextmanager
def small_disk(folder: Path, *, mebibytes: int = 1) -> Iterator[Path | None]:
    """A small file system in memory; None where it cannot be mounted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if (
        os.name != "posix"
        or shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)  # files of it may still be mapped


def _built(index: Path) -> Path:
    """An index that wants to write a FAISS cache when it is searched."""
    index.parent.mkdir(parents=True, exist_ok=True)
    write_index(faults.source_of(CONTENT), index, faults.small_classifier(), neighbours="HNSW8")
    return index


def _written_by(kind: str, index: Path) -> list[Path]:
    """What a change of this kind cannot do without writing to."""
    lock, exemplars = index.with_name(f".{index.name}.lock"), index / EXEMPLARS
    if kind == "build":
        return [lock, index.parent]
    return [lock, index, exemplars / "_versions", *([] if kind == "delete" else [exemplars / "data"])]
