"""Standard output and standard error as they are: in an encoding that lacks characters, full, or closed."""

import codecs
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

PLAIN = {"—": "-", "–": "-", "−": "-", "…": "...", "×": "x", "·": "*", "’": "'"}
"""What stands for characters of our own texts where they cannot be printed; others are spelled as in Python."""
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)  # of a file that was open already


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(mark) or ascii(mark)[1:-1] for mark in lacking), error.end


codecs.register_error("tmm-engine", _replaced)


@contextmanager
def as_output_can() -> Iterator[None]:
    """Characters that standard output and standard error lack are replaced; one that cannot be written to is an error.

    Raises:
        SystemExit: with 1: standard output is full, or its device failed; stderr says so in one line. Nothing is said
            where its reader has seen enough.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tmm-engine")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # closed by the shell
                sys.stdout.flush()
    except OSError as error:
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        _forget_output()
        if error.errno != errno.EPIPE:
            with suppress(OSError):
                click.echo(f"error: standard output, or a file, could not be written ({error.strerror})", err=True)
        sys.exit(1)


def echo_json(fields: dict[str, Any]) -> None:
    """A line of JSON on stdout, its text as it is where the encoding has all of it, else with JSON's escapes."""
    line = json.dumps(fields, ensure_ascii=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(fields)
    click.echo(line)


def _forget_output() -> None:
    """Let what is still to be written go nowhere, or Python would fail once more when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
