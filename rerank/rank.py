"""The end of a search: the best exemplars by their scores, and all that TMM-NN says of one query."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64, Shaped

from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.rerank.plan import Plan
from tmm_engine.rerank.recognise import Recognised
from tmm_engine.rerank.score import Scores
from tmm_engine.rerank.view import QueryView


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """What TMM-NN says of one query.

    Attributes:
        rows: The best exemplars' rows, best first; ties in order of id.
        scores: Their scores; larger is better.
        confidences: Their P(dummy class), or the positive part of their decorrelated similarity, to the query itself
            even where it was recognised; in [0, 1].
        view: The query: its trigger, what it looks like under it, the model's prediction, y_q.
        plan: The exemplars that were looked at.
        recognised: The exemplar that the query may be a copy of, where the configuration asks.
        timings: Seconds by step; a step done for several queries together counts as shared equally.
    """

    rows: Int64[np.ndarray, "k"]
    scores: Float[np.ndarray, "k"]
    confidences: Float[np.ndarray, "k"]
    view: QueryView
    plan: Plan
    recognised: Recognised | None
    timings: dict[str, float]

    @property
    def scored(self) -> int:
        """How many exemplars were scored."""
        return len(self.plan.scored)

    @property
    def found_on(self) -> int:
        """How many exemplars the head was found on."""
        return self.plan.exemplars if self.plan.found_on is None else len(self.plan.found_on)


def best(
    scores: Scores, rows: Int64[np.ndarray, "n"], ids: Shaped[np.ndarray, "exemplars"], *, k: int
) -> tuple[Int64[np.ndarray, "k"], Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
    """Rows, scores and confidences of the min(k, n) best, best first."""
    values, confidences = scores.scores.cpu().numpy(), scores.confidences.cpu().numpy()
    first = best_first(values, rows, ids, k=k)
    return rows[first], values[first], confidences[first]
