"""What the literature does with a first ranking: answer as the nearest, expand the query, re-rank by neighbourhoods.

All take unit vectors and give a score for every exemplar; larger is nearer.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from tmm_engine.rerank.recognise import FIRST_RATIO, TIED, Recognised, chord, comes_first, first_among

ABOVE = 1e-3  # of all other scores, whose largest is at most 1
K1, K2, OWN = 20, 6, 0.3  # of Zhong et al.: neighbours, neighbours averaged, share of the first ranking

Gate = Literal["gate", "never first", "first by ratio", "first by rank", "always first"]
GATES: dict[Gate, Callable[[Recognised, int, int], bool]] = {
    "gate": comes_first,
    "never first": lambda recognised, rank, exemplars: False,
    "first by ratio": lambda recognised, rank, exemplars: recognised.ratio < FIRST_RATIO,
    "first by rank": lambda recognised, rank, exemplars: recognised.ratio < TIED and rank < first_among(exemplars),
    "always first": lambda recognised, rank, exemplars: recognised.ratio < TIED,
}
"""Whether the recogniser's nearest begins an answer: the engine's own rule, and what it was chosen among."""


def gated(
    queries: Float[Tensor, "q d"],
    exemplars: Float[Tensor, "n d"],
    copies: tuple[Float[Tensor, "q e"], Float[Tensor, "n e"]],
    *,
    threshold: float,
    first: Callable[[Recognised, int, int], bool] = comes_first,
) -> tuple[Float[Tensor, "q n"], Bool[np.ndarray, "q"]]:
    """Queries that are taken for copies answered for as the exemplar, as mode robust does (`rerank.recognise`).

    An exemplar that comes first has a score just above all others.

    Args:
        queries: By what ranks.
        exemplars: By the same.
        copies: Both by what recognises.
        threshold: Of the ratio.
        first: Whether the nearest comes first; of what recognised it, its rank, and the number of exemplars.

    Returns:
        Scores, and which queries were taken for copies.
    """
    found = (copies[0] @ copies[1].T).topk(2, dim=1)
    moved, nearest = queries.clone(), []
    for place, (rows, scores) in enumerate(zip(found.indices.tolist(), found.values.tolist(), strict=True)):
        distances = chord(scores[0]), chord(scores[1])
        recognised = Recognised.nearest(rows[0], distances, threshold=threshold)
        moved[place] = recognised.moved(queries[place], exemplars[rows[0]])
        nearest.append((rows[0], recognised))
    scores = normalize(moved) @ exemplars.T
    for own, (row, recognised) in zip(scores, nearest, strict=True):
        if first(recognised, int((own > own[row]).sum()), len(exemplars)):
            own[row] = own.max() + ABOVE
    return scores, np.array([recognised.share >= 0.5 for _, recognised in nearest])


def expanded(
    queries: Float[Tensor, "q d"], exemplars: Float[Tensor, "n d"], *, neighbours: int, power: float
) -> Float[Tensor, "q n"]:
    """Query expansion: the query and its nearest, weighted by a power of similarity (Radenović et al., TPAMI 2019)."""
    found = (queries @ exemplars.T).topk(neighbours, dim=1)
    weights = found.values.clamp(min=0) ** power
    return normalize(queries + (weights[:, :, None] * exemplars[found.indices]).sum(1)) @ exemplars.T


def k_reciprocal(queries: Float[Tensor, "q d"], exemplars: Float[Tensor, "n d"]) -> Float[Tensor, "q n"]:
    """Minus the distance of Zhong et al. (CVPR 2017), Eqs. 5 to 12: of neighbourhoods and, in part, the first ranking.

    A query's neighbours are exemplars only; what counts as its reciprocal neighbour has it, were it an exemplar, among
    its own.
    """
    among = exemplars @ exemplars.T
    first = queries @ exemplars.T
    kth = among.topk(K1 + 1, dim=1).values[:, -1]  # one more, for each has itself
    of_exemplars = _encoded(among, kth, among)
    of_queries = _encoded(first, kth, among)
    nearest = among.topk(K2, dim=1).indices
    of_exemplars = of_exemplars[nearest].mean(1)
    nearest = first.topk(K2 - 1, dim=1).indices
    of_queries = (of_queries + of_exemplars[nearest].sum(1)) / K2
    total = of_queries.sum(1)[:, None] + of_exemplars.sum(1)[None]
    smaller = torch.stack([torch.minimum(row[None], of_exemplars).sum(1) for row in of_queries])
    jaccard = 1 - smaller / (total - smaller).clamp(min=1e-12)
    return -((1 - OWN) * jaccard + OWN * (1 - first))


def _encoded(
    similarity: Float[Tensor, "q n"], kth: Float[Tensor, "n"], among: Float[Tensor, "n n"]
) -> Float[Tensor, "q n"]:
    """The k-reciprocal neighbours of each row, and those of theirs that overlap by two thirds; by exp(−distance)."""

    def reciprocal(rows: Float[Tensor, "m n"], count: int, reach: Float[Tensor, "n"]) -> Bool[Tensor, "m n"]:
        return (rows >= rows.topk(count, dim=1).values[:, -1:]) & (rows >= reach)

    own = reciprocal(similarity, K1, kth)
    half = reciprocal(among, K1 // 2, among.topk(K1 // 2 + 1, dim=1).values[:, -1])
    sizes = half.sum(1).float()
    shared = own.float() @ half.float().T  # (q, n): how many of the neighbours of n are neighbours of q
    joins = own & (shared >= 2 / 3 * sizes)
    members = own | ((joins.float() @ half.float()) > 0)
    weights = torch.where(members, torch.exp(similarity - 1), torch.zeros(()))
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
