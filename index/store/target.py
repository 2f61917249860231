"""Where an index appears: built beside the target, shown by a rename; an interrupted build leaves what was there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from tmm_engine.index.errors import IndexStateError, WriterBusyError, printable
from tmm_engine.index.files import sync_folder
from tmm_engine.index.store.manifest import MANIFEST

RECOVERY_SECONDS = 10.0
WRITER_SECONDS = 10.0  # that a writer waits for another


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a target that cannot become an index.

    Raises:
        IndexStateError: it exists and is no index, or is one and `overwrite` is not set, or its folder cannot be
            written.
    """
    if str(target) != printable(target):
        raise IndexStateError(f"{printable(target)}: expected a path in UTF-8, which Lance needs; choose another")
    if _exists(target) and not (target / MANIFEST).is_file() and not _is_empty_folder(target):
        raise IndexStateError(f"{target} exists and is not an index: it is left alone; choose another path")
    if (target / MANIFEST).is_file() and not overwrite:
        raise IndexStateError(f"{target} is an index already; `overwrite=True` replaces it")
    folder = target.parent
    if not folder.is_dir():
        raise IndexStateError(f"{folder} is not a folder; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise IndexStateError(f"{folder} cannot be written to; choose another path or change its permissions")


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside the target to build in; it takes the target's place if the block ends without an exception.

    Only one process at a time builds a target. What an earlier, killed build left behind is removed first.

    Raises:
        IndexStateError: see `check_target`; or another process is building the same target.
    """
    check_target(target, overwrite=overwrite)
    target = target.resolve()  # a link stays one, and "." gets a name
    lock = _lock(target)
    try:
        with lock.acquire(timeout=0):
            _recover(target)
            check_target(target, overwrite=overwrite)
            staging = _beside(target, "building")
            try:
                staging.mkdir()
                yield staging
                _swap(staging, target)
            finally:
                _recover(target)
    except filelock.Timeout:
        raise IndexStateError(f"another process is building {target}; wait for it to end") from None


@contextmanager
def locked(index: Path) -> Iterator[None]:
    """Alone among the writers of an index; readers do not wait.

    Raises:
        IndexStateError: another process goes on writing, or the lock's folder cannot be written to.
    """
    lock = _lock(index.resolve())
    try:
        lock.acquire(timeout=WRITER_SECONDS)
    except filelock.Timeout:
        raise WriterBusyError(
            f"another process is writing {index} and did not end in {WRITER_SECONDS:g} s; nothing was changed, "
            f"try again"
        ) from None
    except OSError as error:
        raise IndexStateError(
            f"{index} cannot be locked: {error.strerror or error}; try where {index.resolve().parent} can be written to"
        ) from error
    try:
        yield
    finally:
        lock.release()


def recover(target: Path) -> None:
    """Finish an overwrite that was killed between its two renames, the one moment at which the target does not
    exist.

    Raises:
        IndexStateError: its folder cannot be entered or written to, or another process does not let go of it.
    """
    target = target.resolve()
    if not _exists(target) and _exists(_beside(target, "previous")):
        try:
            with _lock(target).acquire(timeout=RECOVERY_SECONDS):
                _recover(target)
        except OSError as error:  # filelock's Timeout is one
            raise IndexStateError(
                f"{target} was not put back after an interrupted overwrite: {error.strerror or error}; "
                f"try again where {target.parent} can be written to"
            ) from error


def _recover(target: Path) -> None:
    """Put back what a swap took away, or remove what it replaced, and what was being built."""
    previous = _beside(target, "previous")
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(target)
    shutil.rmtree(_beside(target, "building"), ignore_errors=True)


def _swap(staging: Path, target: Path) -> None:
    previous = _beside(target, "previous")
    if target.exists():
        target.rename(previous)
    staging.rename(target)
    sync_folder(target.parent)


def _beside(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}"


def _lock(target: Path) -> filelock.FileLock:
    return filelock.FileLock(_beside(target, "lock"))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise IndexStateError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
