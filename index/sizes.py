"""Sizes in bytes, as people write them."""

import re

from tmm_engine.index.errors import InputError

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(size: str | int) -> int:
    """Bytes, from ``2GiB``, ``512 MB`` or a plain number.

    Raises:
        InputError: it is no such size.
    """
    match = re.fullmatch(r"([0-9.]+) *([A-Za-z]*)", str(size).strip())
    try:
        if match:
            return int(float(match[1]) * UNITS[match[2].upper()])
    except (KeyError, ValueError):
        pass
    raise InputError(f"expected a size like 512MiB or 4GiB, got {size!r}")
