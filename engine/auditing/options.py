"""What an audit is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

from tmm_engine.auditing.findings import Kind
from tmm_engine.index.errors import InputError, member
from tmm_engine.index.neighbours.graph import DEFAULT_MEMORY

NEIGHBOURS = 20
RATE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOptions:
    """What an audit looks for, and how.

    Attributes:
        kinds: What may be wrong; default: everything.
        k: Neighbours that have a vote; at least 1.
        rate: The share of false findings that is accepted among all findings, above 0, below 1.
        sources: A column of metadata whose values tell sources apart, for leaks.
        memory: Bytes that comparing may take.

    Raises:
        InputError: a value out of its range.
    """

    kinds: Sequence[str] = tuple(Kind)
    k: int = NEIGHBOURS
    rate: float = RATE
    sources: str | None = None
    memory: int = DEFAULT_MEMORY

    def __post_init__(self) -> None:
        kinds = [self.kinds] if isinstance(self.kinds, str) else self.kinds
        object.__setattr__(self, "kinds", tuple(dict.fromkeys(member(Kind, kind, name="kind") for kind in kinds)))
        if not self.kinds:
            raise InputError(f"kinds: expected at least one of {', '.join(Kind)}, got none")
        if isinstance(self.k, bool) or self.k < 1:
            raise InputError(f"k: expected at least 1 neighbour, got {self.k}")
        if not 0 < self.rate < 1:
            raise InputError(f"rate: expected a share of false findings above 0 and below 1, got {self.rate}")
