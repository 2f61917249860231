"""Which exemplars pulled the model's decision: TracIn's first-order influence of the last layer, from stored features.

For a linear head with cross-entropy, on one checkpoint (Pruthi et al., "Estimating training data influence by tracing
gradient descent", NeurIPS 2020, Eq. 1 and §4.2), a step on exemplar i lowers the query's loss, up to the learning rate,
by the product of their gradients:

    (φ(x_q)·φ(x_i) + 1) · (p_q − y_q)·(p_i − y_i)

==========  ====================================================
symbol      here
==========  ====================================================
φ(x_q)      `Pulled.features`
p_q − y_q   `Pulled.residual`
1           the gradient of the bias; absent where the head has none
==========  ====================================================
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor, nn

from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.scanning import SCAN, Best, Scored


@dataclass(frozen=True, slots=True, eq=False)
class Pulled:
    """The gradients of decisions, factor by factor.

    Attributes:
        features: φ of the queries as the decision saw them.
        residual: p − y, with y the class decided for.
    """

    features: Float64[Tensor, "q d"]
    residual: Float64[Tensor, "q classes"]

    @classmethod
    def of(cls, features: Float32[np.ndarray, "q d"], decided: Int64[np.ndarray, "q"], head: nn.Linear) -> "Pulled":
        """Those of queries for which these classes were decided."""
        precise = torch.from_numpy(features).double()
        return cls(precise, residuals(precise, torch.from_numpy(decided), head))


def residuals(
    features: Float64[Tensor, "n d"], classes: Int64[Tensor, "n"], head: nn.Linear
) -> Float64[Tensor, "n classes"]:
    """p − y: the gradient of cross-entropy with respect to the logits, in float64, where p near 1 keeps its digits."""
    weight = head.weight.detach().cpu().double()
    bias = None if head.bias is None else head.bias.detach().cpu().double()
    logits = torch.nn.functional.linear(features, weight, bias)
    return torch.softmax(logits, dim=1) - torch.nn.functional.one_hot(classes, len(weight)).double()


def strongest(
    pulled: Pulled, store: ExemplarStore, classes: Int64[np.ndarray, "n"], head: nn.Linear, *, k: int
) -> list[tuple[Scored, Scored]]:
    """For each query the at most k exemplars that pulled most towards the decision, and those that pulled away from it.

    Values are positive where a step on the exemplar makes the decision firmer, negative where it makes it weaker.
    One scan over the stored features of all exemplars, whatever the number of queries.

    Args:
        pulled: The decisions.
        store: The exemplars; φ(x_i) are their plain features.
        classes: y_i, classes of the model's.
        head: The classifier's.
        k: At most so many of each sign.
    """
    towards = [Best(k, store.ids) for _ in pulled.features]
    away = [Best(k, store.ids) for _ in pulled.features]
    start = 0
    for block in store.scan_features(SCAN):
        rows = np.arange(start, start + len(block))
        start += len(block)
        for query, values in enumerate(_influences(pulled, block, classes[rows], head)):
            towards[query].offer(rows[values > 0], values[values > 0])
            away[query].offer(rows[values < 0], -values[values < 0])
    return [(more.found, Scored(less.found.rows, -less.found.values)) for more, less in zip(towards, away, strict=True)]


def _influences(
    pulled: Pulled, block: Float32[np.ndarray, "b d"], classes: Int64[np.ndarray, "b"], head: nn.Linear
) -> Float64[np.ndarray, "q b"]:
    features = torch.tensor(block).double()  # a copy: a store's may be read-only
    alike = pulled.features @ features.T + (0.0 if head.bias is None else 1.0)  # (q, d) @ (d, b) -> (q, b)
    agreeing = pulled.residual @ residuals(features, torch.tensor(classes), head).T
    return (alike * agreeing).numpy()
