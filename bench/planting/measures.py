"""How well a ranking finds what was planted: area under the ROC curve, average precision."""

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats


def auroc(planted: Bool[np.ndarray, "n"], scores: Float[np.ndarray, "n"]) -> float:
    """The chance that one that was planted scores above one that was not; ties count half."""
    ranks = stats.rankdata(scores)
    some = int(planted.sum())
    others = len(planted) - some
    return float((ranks[planted].sum() - some * (some + 1) / 2) / (some * others))


def average_precision(planted: Bool[np.ndarray, "n"], scores: Float[np.ndarray, "n"], *, missing: int = 0) -> float:
    """Σ (Rₖ − Rₖ₋₁) Pₖ over the distinct scores, as scikit-learn's.

    Args:
        planted: Which were.
        scores: Larger is surer.
        missing: How many planted ones are not among them: they are never found.
    """
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(planted[order])
    last = np.append(np.diff(scores[order]) != 0, True)  # of those that tie
    precision = (found / np.arange(1, len(found) + 1))[last]
    recall = found[last] / (int(planted.sum()) + missing)
    return float((np.diff(recall, prepend=0.0) * precision).sum())
