"""What a tuned index remembers: how thoroughly it is searched, and what that was measured to give."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from tmm_engine.index.neighbours.factories import EXACT, Effort


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """Chosen and measured by `engine.tuning`.

    Attributes:
        factory: FAISS factory string that was measured.
        ef_search: Of `Effort`, and so are the next two.
        nprobe: Of IVF.
        rerank: Candidates scored exactly.
        wanted: The recall that was asked for.
        mode: The mode whose answers were compared.
        k: Of how many neighbours.
        queries: How many exemplars were searched for, each as it is and changed.
        exemplars: How many there were.
        recall_clean: Share of the exact answer that is found, in [0, 1].
        recall_noise: The same of changed exemplars.
        milliseconds: Median of one search, without the network.
        exact_milliseconds: The same of exact search, in turn.
    """

    factory: str
    ef_search: int | None
    nprobe: int | None
    rerank: int
    wanted: float
    mode: str
    k: int
    queries: int
    exemplars: int
    recall_clean: float
    recall_noise: float
    milliseconds: float
    exact_milliseconds: float

    def __post_init__(self) -> None:
        for count in (self.rerank, self.k, self.queries, self.exemplars, self.ef_search or 1, self.nprobe or 1):
            if count < 1:
                raise ValueError(f"expected counts of at least 1, got {count}")

    @property
    def effort(self) -> Effort:
        """How thoroughly the index is searched."""
        return Effort(self.ef_search, self.nprobe, self.rerank)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Tuned":
        """The inverse of `to_json`.

        Raises:
            ValueError, TypeError: it is not.
        """
        if content.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"expected what tuning measured, got {sorted(content)}")
        return cls(**content)

    def sentence(self) -> str:
        """What was measured, in words."""
        effort = {"efSearch": self.ef_search, "nprobe": self.nprobe, "rerank": self.rerank}
        said = ", ".join(f"{name} {value}" for name, value in effort.items() if value is not None)
        said = "exact" if self.factory == EXACT else said
        return (
            f"{self.factory} ({said}): recall@{self.k} of mode {self.mode} {self.recall_clean:.3f} clean, "
            f"{self.recall_noise:.3f} changed; {self.milliseconds:.1f} ms a query, exact {self.exact_milliseconds:.1f} "
            f"ms (tuned on {self.queries:,} of {self.exemplars:,} exemplars)"
        )
