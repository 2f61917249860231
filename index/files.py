"""Replacing a file or a folder as a whole: a reader sees the old one or the new one, never half of one."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tmm_engine.index.errors import InputError

TEMPORARY = ".writing-"
"""What the names of things that are being written begin with; they lie beside what they are to replace."""


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Where to write a file or a folder that takes the place of `path` if the block ends without an exception.

    Else nothing of it stays. A link keeps pointing where it does. Permissions are those of any new file.

    Args:
        path: What is replaced, or does not exist yet; its folder must exist.
        durable: The new file is on the disk, under its name, when this returns.

    Raises:
        OSError: it cannot be written.
    """
    target = path.resolve()
    written, replaced = _beside(target), _beside(target)
    try:
        yield written
        if durable:
            _sync(written)
        _exchange(written, target, replaced)
        if durable:
            sync_folder(target.parent)
    finally:
        for left in (written, replaced):
            if left.is_dir():
                shutil.rmtree(left)
            elif left.exists():
                left.unlink()


def write_file(path: Path | str, content: bytes) -> None:
    """Replace the file as a whole.

    Raises:
        InputError: It cannot be written.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"expected a file to write to, got {path}, which is a folder or a device")
        with replacing(path) as written:
            written.write_bytes(content)
    except OSError as error:
        raise InputError(
            f"expected a file name in an existing, writable folder, got {path} ({error.strerror}; "
            "make the folder or name another)"
        ) from error


def _exchange(written: Path, target: Path, replaced: Path) -> None:
    """Rename `written`; a folder is in the way of that, and goes aside."""
    if not target.is_dir():
        written.replace(target)
        return
    target.rename(replaced)
    try:
        written.rename(target)
    except BaseException:
        replaced.rename(target)
        raise


def sync_folder(folder: Path) -> None:
    """See to it that what was renamed in a folder stays so."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(target: Path) -> Path:
    return target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
