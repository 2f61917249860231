"""Step 3 of TMM-NN: from triggered features to scores, by what step 2 found for a query."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tmm_engine.index.types import Rows
from tmm_engine.rerank.discriminant import Discriminant
from tmm_engine.rerank.settings import Score

MATCH_COSINE = 0.25  # weight of the cosine similarity beside the confidence, in deciding whether two images are one


class Scores(NamedTuple):
    """What exemplars are ranked by; how sure the model is that they are like the query, in [0, 1]; and how much each
    looks like the very image that the query shows, at most 1 (`rerank.recognise`).
    """

    scores: Float[Tensor, "n"]
    confidences: Float[Tensor, "n"]
    matches: Float[Tensor, "n"]


@runtime_checkable
class Scorer(Protocol):
    """Scores exemplars."""

    def score(self, triggered: Float[Tensor, "n d"], rows: Int64[np.ndarray, "n"] | None) -> Scores:
        """Of φ(x_i^t) of the exemplars at `rows` of the store; None is all of them, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadScorer:
    """By the dummy class of a tuned head (Eq. 4); the confidence is P(dummy class)."""

    head: nn.Linear
    ranked_by: Score

    def score(self, triggered: Float[Tensor, "n d"], rows: Int64[np.ndarray, "n"] | None) -> Scores:
        """z_C or its log-odds; the rows do not matter."""
        log_odds = dummy_scores(self.head, triggered, Score.LOG_ODDS)
        scores = log_odds if self.ranked_by is Score.LOG_ODDS else dummy_scores(self.head, triggered, self.ranked_by)
        confidences = torch.sigmoid(log_odds)
        return Scores(scores, confidences, confidences)


@dataclass(frozen=True, slots=True, eq=False)
class DiscriminantScorer:
    """By the decorrelated similarity to the triggered query; the confidence is its positive part.

    Attributes:
        discriminant: Of the exemplars' triggered features.
        query: (d,), φ(x_q^t).
        lengths: (n,), of all exemplars of the store, where they are known.
    """

    discriminant: Discriminant
    query: Float[Tensor, "d"]
    lengths: Float[Tensor, "all"] | None = None

    def score(self, triggered: Float[Tensor, "n d"], rows: Int64[np.ndarray, "n"] | None) -> Scores:
        """Similarities in [−1, 1]."""
        if self.lengths is None:
            lengths = self.discriminant.lengths(triggered)
        else:
            lengths = self.lengths if rows is None else self.lengths[torch.from_numpy(rows).to(self.lengths.device)]
        similarities = self.discriminant.similarities(self.query, triggered, lengths=lengths)
        confidences = similarities.clamp(min=0.0)
        return Scores(similarities, confidences, confidences)


@dataclass(frozen=True, slots=True, eq=False)
class FusedScorer:
    """By confidence + weight · cosine similarity of clean features.

    The confidence decides which exemplar *is* the query's, the cosine similarity which others are like it.

    Attributes:
        scorer: Gives the confidence.
        weight: Of the cosine similarity.
        query: (d,), φ(x_q).
        clean: φ(x_i) of given rows.
    """

    scorer: Scorer
    weight: float
    query: Float[Tensor, "d"]
    clean: Callable[[Rows | None], Tensor]

    def score(self, triggered: Float[Tensor, "n d"], rows: Int64[np.ndarray, "n"] | None) -> Scores:
        """At most 1 + weight."""
        confidences = self.scorer.score(triggered, rows).confidences
        features = self.clean(rows)
        lengths = features.norm(dim=1) * self.query.norm()
        cosine = (features @ self.query / lengths.where(lengths > 0, 1.0)).where(lengths > 0, 0.0)
        matches = (confidences + MATCH_COSINE * cosine) / (1.0 + MATCH_COSINE)
        return Scores(confidences + self.weight * cosine, confidences, matches)


def dummy_scores(head: nn.Linear, features: Float[Tensor, "n d"], score: Score) -> Float[Tensor, "n"]:
    """Each row's score for the dummy class, the last of the tuned head (Eq. 4).

    Log-odds z_C − logsumexp(z_0..C−1), or the raw logit z_C.
    """
    logits = head(features)  # (n, d) @ (d, C+1) -> (n, C+1)
    dummy = logits[:, -1]
    return dummy if score is Score.LOGIT else dummy - torch.logsumexp(logits[:, :-1], dim=1)
