"""Conformal prediction: from nonconformity to p-values, credibility, confidence and sets of classes.

How strange a class j is for an image x is its margin: how much nearer the nearest other class is,

    A_j(x) = max_{i ≠ j} s_i(x) − s_j(x)

with s_j the mean score of the k exemplars of class j that are nearest to x (the k-NN nonconformity of Vovk, Gammerman
and Shafer, *Algorithmic Learning in a Random World*, 2005, with differences of scores instead of a ratio of distances,
so that it serves every mode). Against the margins a_1 … a_n that the right classes of n calibration images have,

    p_j(x) = (1 + #{i: a_i ≥ A_j(x)}) / (n + 1)

Credibility is the largest p_j and confidence 1 − the second largest (as in Papernot and McDaniel, *Deep k-Nearest
Neighbors*, 2018, who count disagreeing neighbours instead: these tie for nearly all images of a good model, and sets at
small α then hold nearly all classes). The set {j: p_j > α} misses the class of a new image with probability at most α,
and at least α − 1/(n + 1), if that image and the calibration images are exchangeable.

Written out rather than taken from `crepes`, which needs pandas and scipy for it; a test holds both together.
"""

import numpy as np
from jaxtyping import Float64


def margins(scores: Float64[np.ndarray, "q classes"]) -> Float64[np.ndarray, "q classes"]:
    """A_j: larger is stranger. With a single class, which nothing is nearer than, minus its score.

    Args:
        scores: s_j; −∞ for a class of which nothing was scored, which is then as strange as can be: ∞.
    """
    if scores.shape[1] == 1:
        return -scores
    nearest_two = np.sort(scores, axis=1)[:, -2:]
    first = np.arange(scores.shape[1]) == scores.argmax(axis=1)[:, None]
    others = np.where(first, nearest_two[:, :1], nearest_two[:, 1:])
    return np.subtract(others, scores, out=np.full(scores.shape, np.inf), where=scores > -np.inf)


def p_values(strange: Float64[np.ndarray, "*q"], calibrated: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "*q"]:
    """The share of the calibration's values that are at least as strange, the new one counted in: in (0, 1].

    Args:
        strange: Larger is stranger.
        calibrated: Of the calibration images, ascending.
    """
    return (len(calibrated) - np.searchsorted(calibrated, strange, side="left") + 1) / (len(calibrated) + 1)
