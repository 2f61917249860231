"""Where the rows of a store lie on disk, which stays as it is while others are added and deleted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

Run = tuple[str, int, int]
"""A data file, the first row in it, and the row after the last."""


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Of every row of one version.

    Attributes:
        files: Data files, in the order of their rows; a name stands for its content, in all versions.
        addresses: Of each row, ascending: its file's number << 32, plus its place in the file.
    """

    files: tuple[str, ...]
    addresses: Int64[np.ndarray, "n"]

    def runs(self) -> list[Run]:
        """All rows in order, as runs that lie side by side: few, unless many were deleted one by one."""
        ends = np.flatnonzero(np.diff(self.addresses) != 1) + 1
        parts = np.split(self.addresses, ends)
        return [(self.files[int(part[0]) >> 32], *_span(part)) for part in parts if len(part)]

    def rows_of(self, runs: Sequence[Run]) -> Int64[np.ndarray, "rows"]:
        """For every row of the runs of another version, in order, which row it is here; −1 where it is gone."""
        number = {name: place for place, name in enumerate(self.files)}
        wanted = [np.arange(start, stop) + (number.get(name, len(self.files)) << 32) for name, start, stop in runs]
        addresses = np.concatenate([np.empty(0, np.int64), *wanted])
        rows = np.searchsorted(self.addresses, addresses)
        rows[rows == len(self.addresses)] = 0
        rows[self.addresses[rows] != addresses] = -1
        return rows


def _span(part: Int64[np.ndarray, "rows"]) -> tuple[int, int]:
    mask = (1 << 32) - 1
    return int(part[0]) & mask, (int(part[-1]) & mask) + 1
