"""Raw results of a benchmark as JSON lines: what was set, then one flat record per query, perturbation and method.

Every run of a benchmark begins with a line ``{"settings": {…}}``; the records after it were made under these. A run
that was interrupted goes on where it stopped.
"""

import errno
import json
import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import numpy as np

from tmm_engine.bench.machine import describe_machine
from tmm_engine.index.errors import InputError

Record = dict[str, Any]

SETTINGS = "settings"
BEGINNING = f'{{"{SETTINGS}": '.encode()  # of every file of ours


@dataclass(frozen=True, slots=True)
class Records:
    """What a file holds.

    Attributes:
        settings: Of the latest run.
        records: Of all runs, in the order of measurement.
        runs: The settings of every run, the first one first; their identity is the same.
    """

    settings: Record
    records: list[Record]
    runs: list[Record]


class RecordFile:
    """Records of a benchmark, appended one by one; each is in the file when `append` returns. A context manager."""

    def __init__(
        self,
        file: FileIO,
        lock: filelock.BaseFileLock,
        *,
        key: tuple[str, ...],
        found: dict[tuple[Any, ...], Record],
        unwritten: Record | None,
    ) -> None:
        self._file, self._lock, self._key, self._found = file, lock, key, found
        self._unwritten = unwritten  # settings, until this run has something to record

    @classmethod
    def open(
        cls, path: Path, settings: Mapping[str, Any], key: tuple[str, ...], identity: tuple[str, ...]
    ) -> "RecordFile":
        """Begin a file, or go on with one.

        A last line that an interrupted write has torn is dropped. A run that has nothing left to do leaves the file
        as it is.

        Args:
            path: The file; its folder exists.
            settings: Of this run, as JSON takes them; NumPy's scalars and arrays too.
            key: The fields that tell records apart.
            identity: The settings in which a file and this run must agree; others, such as the number of queries, may
                change from run to run.

        Raises:
            InputError: the file was made with other settings, is damaged, is no file of records, cannot be written,
                or is being written by another process.
        """
        if not path.absolute().parent.is_dir():  # the lock would make it
            raise InputError(f"{path}: its folder does not exist; create it first")
        lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
            return cls._resume(path, lock, plain(dict(settings)), key, identity)
        except filelock.Timeout:
            raise InputError(
                f"{path} is being written by another process: wait for it, or choose another --out"
            ) from None
        except OSError as error:
            lock.release()
            raise InputError(f"cannot write {path}: {error.strerror or error} (choose another --out)") from None
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _resume(
        cls,
        path: Path,
        lock: filelock.BaseFileLock,
        settings: Record,
        key: tuple[str, ...],
        identity: tuple[str, ...],
    ) -> "RecordFile":
        content = path.read_bytes() if path.exists() else b""
        lines = _parse(path, content)
        runs = [line[SETTINGS] for _, line in lines if SETTINGS in line]
        for name in identity if runs else ():
            before, now = runs[0].get(name), settings.get(name)
            if before != now:
                raise InputError(
                    f"{path}: expected {name} {before!r}, with which its records were made, got {now!r} (choose "
                    "another --out, or delete the file)"
                )
        found: dict[tuple[Any, ...], Record] = {}
        for number, record in lines:
            if SETTINGS in record:
                continue
            if missing := [name for name in key if name not in record]:
                raise InputError(f"{path}, line {number}: expected a record with {missing[0]!r} (delete the line)")
            found[tuple(record[name] for name in key)] = record
        file = path.open("ab", buffering=0)
        file.truncate(content.rfind(b"\n") + 1)
        unwritten = settings if not runs or settings != runs[-1] else None
        opened = cls(file, lock, key=key, found=found, unwritten=unwritten)
        if not runs:  # an unwritable file fails before the first measurement
            opened._write_settings()
        return opened

    def done(self, **key: Any) -> bool:
        """Whether there is a record with these values of the key fields, all of them."""
        return self.find(**key) is not None

    def find(self, **key: Any) -> Record | None:
        """The record with these values of the key fields, all of them, if there is one."""
        assert key.keys() == set(self._key), f"expected {self._key}, got {tuple(key)}"
        return self._found.get(self._values(key))

    @property
    def records(self) -> list[Record]:
        """All that the file holds now."""
        return [*self._found.values()]

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record: JSON values, NumPy's too; NaN and infinite numbers become null.

        Raises:
            InputError: it cannot be written.
        """
        values = self._values(record)
        assert SETTINGS not in record, f"a record cannot have a field {SETTINGS!r}"
        assert values not in self._found, f"{dict(zip(self._key, values, strict=True))} is recorded already"
        line = plain(dict(record))
        try:
            self._write_settings()
            self._write(line)
        except OSError as error:
            raise InputError(f"cannot write {self._file.name}: {error.strerror} (make room, then run again)") from None
        self._found[values] = line

    def close(self) -> None:
        """Let others write."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _values(self, record: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in self._key)

    def _write_settings(self) -> None:
        if self._unwritten is not None:
            self._write({SETTINGS: self._unwritten})
            self._unwritten = None

    def _write(self, line: Record) -> None:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if self._file.write(text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_records(path: Path) -> Records:
    """Everything in a file, without a last line that is torn.

    Raises:
        InputError: no such file, no file of records, or a damaged line, with its number.
    """
    try:
        lines = _parse(path, path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not lines:
        raise InputError(f"{path}: expected settings in the first line, got an empty file (run the benchmark again)")
    runs = [line[SETTINGS] for _, line in lines if SETTINGS in line]
    return Records(runs[-1], [line for _, line in lines if SETTINGS not in line], runs)


def describe_run() -> Record:
    """What every benchmark's settings say of a run beside its own: start (UTC), commit of the code, machine, versions.

    The commit is None where the code does not lie in a repository of its own; ``-dirty`` at its end: the code differs.
    """
    here = Path(__file__)
    tracked = _git(here, "ls-files", "--error-unmatch", here.name)  # else it is the commit of whatever lies around
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": tracked and _git(here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "machine": describe_machine(),
    }


def plain(value: Any) -> Any:
    """A value as it comes back from JSON: NumPy's as Python's, tuples as lists, NaN and infinite numbers as None."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parse(path: Path, content: bytes) -> list[tuple[int, Record]]:
    """(number, object) of every complete line; the first holds settings."""
    if not BEGINNING.startswith(content[: len(BEGINNING)]):
        raise InputError(f"{path}: expected a file of records, which begins with settings (choose another file)")
    lines = []
    for number, text in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
        except ValueError as error:  # of JSON or of UTF-8
            raise InputError(f"{path}, line {number}: expected JSON, got {text[:40]!r}: {error} (delete it)") from None
        if not isinstance(line, dict) or (SETTINGS in line and not isinstance(line[SETTINGS], dict)):
            raise InputError(f"{path}, line {number}: expected a JSON object, got {text[:40]!r} (delete it)")
        lines.append((number, line))
    return lines


def _git(file: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=file.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
