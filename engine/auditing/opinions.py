"""What an image's label should be: the model's opinion and the neighbours', weighed by how well they tell the labels.

p(c | x) ∝ model(c | x)^a · neighbours(c | x)^b, a logarithmic pool. Labels are taken to be right but for a share π,
which have any other label, so that label y is seen with probability (1 − π) p(y | x) + π (1 − p(y | x)) / (C − 1).
a, b and π make the labels that are there most likely. No exemplar is its own neighbour.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from tmm_engine.index.neighbours.graph import NeighbourGraph

LEAST = 1e-6  # probability that the model gives to any class
UNHEARD = 0.1  # the share of any label among neighbours, of that where all are as frequent
SHARPNESS = 10.0  # a neighbour less similar by 0.1 has 1/e of the vote
PRIOR = (-0.5, -1.0, -3.0)
"""Where log a, log b and logit π are looked for first."""
STEPS = 60


@dataclass(frozen=True, slots=True, eq=False)
class Opinions:
    """On every exemplar with a label of its own.

    Attributes:
        probabilities: Of each label that may be given.
        numbers: Which labels these are.
        wrong: The probability that the given label is wrong.
        share: π, of all labels.
        weights: (a, b), of the model and the neighbours.
    """

    probabilities: Float64[np.ndarray, "n c"]
    numbers: Int64[np.ndarray, "c"]
    wrong: Float64[np.ndarray, "n"]
    share: float
    weights: tuple[float, float]


def votes(
    graph: NeighbourGraph, labels: Int64[np.ndarray, "n"], given: Bool[np.ndarray, "n"], count: int
) -> Float64[np.ndarray, "n c"]:
    """Of the neighbours that have labels of their own, weighted by similarity, as shares; even where none has.

    Args:
        graph: By cosine similarity.
        labels: Numbers from 0 to count − 1 where they are given.
        given: Which are.
        count: C.
    """
    weights = np.exp(SHARPNESS * (graph.scores - graph.scores[:, :1]).astype(np.float64)) * given[graph.rows]
    counted = np.zeros((len(labels), count))
    cast = np.where(given, labels, 0)[graph.rows]
    np.add.at(counted, (np.arange(len(labels))[:, None], cast), weights)
    total = counted.sum(axis=1, keepdims=True)
    return np.where(total > 0, counted / np.maximum(total, 1e-300), 1 / count)


def translated(
    probabilities: Float64[np.ndarray, "n m"], labels: Int64[np.ndarray, "n"], given: Bool[np.ndarray, "n"], count: int
) -> Float64[np.ndarray, "n c"]:
    """The model's opinion in labels that are not its classes: how often each goes with what the model sees.

    The exemplar itself does not count.
    """
    seen = np.where(given[:, None], probabilities, 0.0)
    together = np.zeros((probabilities.shape[1], count))
    np.add.at(together.T, labels[given], seen[given])
    weights = probabilities / (seen.sum(axis=0) - seen + 1.0)
    found = weights @ together
    own = np.flatnonzero(given)
    found[own, labels[own]] -= (weights[own] * seen[own]).sum(axis=1)
    found = np.maximum(found, 0) + 1e-3 / count
    return found / found.sum(axis=1, keepdims=True)


def pooled(
    model: Float64[np.ndarray, "n c"],
    neighbours: Float64[np.ndarray, "n c"],
    labels: Int64[np.ndarray, "n"],
    given: Bool[np.ndarray, "n"],
    *,
    numbers: Int64[np.ndarray, "c"],
) -> Opinions:
    """Both opinions as one, and what it says of the labels.

    Args:
        model: Probabilities of C ≥ 2 labels.
        neighbours: The same, by vote.
        labels: Numbers from 0 to C − 1 where they are given.
        given: Which are; at least one.
        numbers: The labels' own.
    """
    logs = torch.from_numpy(np.log(np.stack([model + LEAST, neighbours + UNHEARD / model.shape[1]])))  # (2, n, c)
    own, rows = torch.from_numpy(labels[given]), torch.from_numpy(np.flatnonzero(given))
    asked, others = logs[:, rows], logs.shape[2] - 1
    start = torch.tensor(PRIOR, dtype=torch.float64)
    free = start.clone().requires_grad_(True)

    def right(of: torch.Tensor) -> torch.Tensor:
        pool = (free[:2].exp()[:, None, None] * of).sum(0)
        return pool.log_softmax(dim=1).gather(1, own[:, None])[:, 0].exp()

    def loss() -> torch.Tensor:
        search.zero_grad()
        share, correct = free[2].sigmoid(), right(asked)
        seen = (1 - share) * correct + share * (1 - correct) / others
        value = -(seen + 1e-12).log().mean() + 1e-3 * (free - start).square().sum()
        value.backward()
        return value

    search = torch.optim.LBFGS([free], max_iter=STEPS, line_search_fn="strong_wolfe")
    search.step(loss)
    with torch.no_grad():
        weights, share = free[:2].exp(), float(free[2].sigmoid())
        found = (weights[:, None, None] * logs).sum(0).softmax(dim=1).numpy()
        correct = right(asked).numpy()
    wrong = np.zeros(len(labels))
    wrong[given] = share * (1 - correct) / others / ((1 - share) * correct + share * (1 - correct) / others)
    return Opinions(found, numbers, wrong, share, (float(weights[0]), float(weights[1])))
