"""Which exemplars a search looks at, drawn once: those that the head is found on, and those that are scored."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from tmm_engine.rerank.settings import TmmConfig


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Rows of a store.

    Attributes:
        exemplars: How many the store has.
        found_on: Rows that the head is found on; None is all. Candidates come first, in their own order.
        candidates: Rows that are scored; None is all.
        streamed: Whether all are scored chunk by chunk, in a pass of its own, since they are too many to hold.
    """

    exemplars: int
    found_on: Int64[np.ndarray, "found"] | None
    candidates: Int64[np.ndarray, "candidates"] | None
    streamed: bool

    @classmethod
    def draw(cls, exemplars: int, config: TmmConfig, candidates: Int64[np.ndarray, "candidates"] | None) -> "Plan":
        """A seeded sample where there are more than `Sample.max_exemplars`; companions beside candidates.

        Where the configuration draws nothing, the head is found on all exemplars, whatever is scored.
        """
        many = exemplars > config.sample.max_exemplars and candidates is None
        if not config.draws:
            return cls(exemplars, candidates, candidates, many)
        generator = np.random.default_rng(config.seed)
        if candidates is not None:
            beside = np.ones(exemplars, dtype=bool)
            beside[candidates] = False
            others = np.flatnonzero(beside)
            count = min(config.sample.companions, len(others))
            companions = np.sort(generator.choice(others, count, replace=False))
            return cls(exemplars, np.concatenate([candidates, companions]), candidates, False)
        if many:
            sample = np.sort(generator.choice(exemplars, config.sample.max_exemplars, replace=False))
            return cls(exemplars, sample, None, True)
        return cls(exemplars, None, None, False)

    @property
    def scored(self) -> Int64[np.ndarray, "scored"]:
        """The rows that are scored."""
        return np.arange(self.exemplars) if self.candidates is None else self.candidates
