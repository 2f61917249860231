"""How much memory features may take."""

import math
import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tmm_engine.index.errors import InputError

BLOCK = 64 << 20  # bytes that are looked at together beyond what may stay in memory


@dataclass(slots=True, eq=False)
class Lease:
    """Bytes that pages of a file may take in memory, until what cannot do with less claims them.

    Attributes:
        size: How many.
        wanted: How many it would take.
        shrunk: Called when they have become fewer.
    """

    size: int
    wanted: int
    shrunk: Callable[[], None] = field(default=lambda: None, repr=False)


@dataclass(slots=True, eq=False)
class Claim:
    """Bytes that were claimed; whoever shares it may give them back, once.

    Attributes:
        budget: Of what.
        size: How many.
    """

    budget: "Budget"
    size: int

    def release(self) -> None:
        """Give them back."""
        size, self.size = self.size, 0
        self.budget.give_back(size)


@dataclass(slots=True)
class Budget:
    """How many bytes of features may stay in memory between searches; None is all.

    Attributes:
        left: Of it, for what is yet to be opened.
    """

    left: int | None = None
    _leases: list[Lease] = field(default_factory=list, repr=False, compare=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def take(self, wanted: int) -> int:
        """As much of it as is wanted, or is left."""
        with self._guard:
            return self._take(wanted)

    def lend(self, wanted: int) -> Lease:
        """As much of it as is wanted, or is left, for what could do with less."""
        with self._guard:
            lease = Lease(self._take(wanted), wanted)
            self._leases.append(lease)
            return lease

    def end(self, lease: Lease) -> None:
        """What was lent is not used any more."""
        with self._guard:
            if lease in self._leases:
                self._leases.remove(lease)
                self._return(lease.size)

    def claim(self, wanted: int, what: str) -> Claim:
        """All that is wanted, for what cannot do with less: of what is left, then of what was lent, the last first.

        Raises:
            InputError: so much is not left or lent; nothing is taken.
        """
        with self._guard:
            if self.left is None:
                return Claim(self, 0)
            most = self.left + sum(lease.size for lease in self._leases)
            if most < wanted:
                raise InputError(
                    f"memory: {what} takes {-(-wanted >> 20):,} MiB, and {most / (1 << 20):,.1f} MiB of the bound are "
                    f"left: raise it, or search exactly"
                )
            self.left -= wanted
            for lease in reversed(self._leases):
                if self.left < 0 < lease.size:
                    taken = min(lease.size, -self.left)
                    self.left += taken
                    lease.size -= taken
                    lease.shrunk()
            return Claim(self, wanted)

    def give_back(self, taken: int) -> None:
        """What was taken and is let go of; what was lent gets of it what it had wanted."""
        with self._guard:
            self._return(taken)

    def _take(self, wanted: int) -> int:
        if self.left is None:
            return wanted
        taken = min(wanted, self.left)
        self.left -= taken
        return taken

    def _return(self, taken: int) -> None:
        if self.left is None:
            return
        self.left += taken
        for lease in self._leases:
            more = min(self.left, lease.wanted - lease.size)
            lease.size += more
            self.left -= more

    @classmethod
    def beside(cls, memory: int, *, held: int, images: int) -> "Budget":
        """What a bound on the process leaves for features.

        Args:
            memory: Bytes that the process may hold.
            held: That it holds already.
            images: That may be kept for images, at most a quarter of the bound.

        Raises:
            InputError: it leaves nothing beside a block of features and a block of scores.
        """
        left = memory - images - held - 2 * BLOCK
        if left < 0:
            raise InputError(
                f"memory: expected at least {math.ceil((held + 2 * BLOCK) / 0.75) >> 20:,} MiB, since the process "
                f"holds {held >> 20:,} MiB, works with blocks of {2 * BLOCK >> 20} MiB and keeps a quarter for images, "
                f"got {memory >> 20:,} MiB"
            )
        return cls(left)


def held_memory() -> int:
    """Bytes that the process holds now, by the kernel's count; 0 where that cannot be asked."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * mmap.PAGESIZE if status.exists() else 0
