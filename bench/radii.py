"""The robustness radius (the paper's Definition 1): how far a query can move before its top-k set changes.

Three ways to it, none of which is the whole truth:

- `empirical_radius`: along paths through pixel space, the whole search rerun at every point. An upper bound: another
  path may be shorter.
- `closed_form_radius`: exact, but in feature space and for plain L2 and cosine search only. No perturbation of pixels
  that moves the feature less than that changes the set.
- `margin_radius`: the bound of Lemma 2 with an estimated Lipschitz constant, hence not certified.

`seed_changes_top` is the control: what the seed alone does to the set.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Shaped

from tmm_engine.bench.attack import Embedding
from tmm_engine.bench.noise import Family, Image, Perturbation, gaussian_reach
from tmm_engine.bench.retrievers import Retriever, top
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.metric import Metric

GRID = tuple(np.geomspace(1 / 64, 1, 10).tolist())


DARKEST = 0.05  # the factor at which `brightness_path` ends


ROUNDING = 4 * float(np.finfo(np.float32).eps)  # of a score: less than that is no change


NEAR = 1e-6  # of the squared norms: a squared distance below that has lost half its digits to the Gram identity


SAME = {Metric.L2: 0.0, Metric.COSINE: 1e-14}  # features of one direction differ by rounding once they are normalised


QueryPath = Callable[[float], Image]


TopSet = Callable[[Image], frozenset[int]]


@dataclass(frozen=True, slots=True)
class Radius:
    """A radius as found by a search.

    Attributes:
        value: An L2 norm at which the top-k set is another one; if censored, the largest norm looked at.
        censored: Nothing changed up to there: the radius along this path is larger.
        evaluations: How often the retriever was run.
    """

    value: float
    censored: bool
    evaluations: int


@dataclass(frozen=True, slots=True)
class Margin:
    """Lemma 2's bound with an estimated constant.

    Attributes:
        value: γ₂ / (2 L̂), in L2 norm of pixels; infinite where no sample moved a score.
        gap: γ₂: the k-th best score minus the next.
        lipschitz: L̂: the largest change of a score seen, per L2 norm of the perturbation.
    """

    value: float
    gap: float
    lipschitz: float


def empirical_radius(top_set: TopSet, path: QueryPath, *, largest: float = math.inf, tolerance: float) -> Radius:
    """The smallest norm along a path at which the top-k set changes, to ``tolerance``.

    Looks outwards at a geometric grid until the set is another one than at t = 0, then bisects between that point and
    the one before. A set that changes and changes back between two points of the grid is missed: the value is an upper
    bound of the radius along the path, and the path's radius is an upper bound of Definition 1's.

    Args:
        top_set: The rows of the top k for an image; the whole pipeline, run anew each time.
        path: From the query (t = 0) outwards (t = 1), continuous; ‖path(t) − path(0)‖₂ must not fall with t.
        largest: Norms beyond it are not looked at; by default the path is followed to its end.
        tolerance: At most so far apart are the norms between which the set changes.
    """
    query = path(0.0)
    unperturbed = top_set(query)

    def probe(t: float) -> tuple[float, bool]:
        """The norm at t, and whether the set is another one there."""
        image = path(t)
        return _distance(image, query), top_set(image) != unperturbed

    inner, inner_norm = 0.0, 0.0
    for evaluations, t in enumerate(GRID, start=2):
        if _distance(path(t), query) > largest:
            return Radius(inner_norm, censored=True, evaluations=evaluations - 1)
        norm, changed = probe(t)
        if changed:
            norm, more = _bisected(probe, (inner, inner_norm), (t, norm), tolerance)
            return Radius(norm, censored=False, evaluations=evaluations + more)
        inner, inner_norm = t, norm
    return Radius(inner_norm, censored=True, evaluations=1 + len(GRID))


def _bisected(
    probe: Callable[[float], tuple[float, bool]],
    inner: tuple[float, float],
    outer: tuple[float, float],
    tolerance: float,
) -> tuple[float, int]:
    """The norm of an (t, norm) with a changed set, within tolerance of one without; and how often it probed."""
    probes = 0
    while outer[1] - inner[1] > tolerance and inner[0] < (t := (inner[0] + outer[0]) / 2) < outer[0]:
        norm, changed = probe(t)
        probes += 1
        if changed:
            outer = (t, norm)
        else:
            inner = (t, norm)
    return outer[1], probes


def gaussian_path(image: Image, *, seed: int, largest_norm: float) -> QueryPath:
    """Gaussian noise of one direction, clipped to [0, 1], its L2 norm growing to ``largest_norm``, or as far as it can.

    The norm at t is t times the norm at 1.
    """
    end = min(largest_norm, gaussian_reach(image, seed=seed))
    return lambda t: Perturbation(Family.GAUSSIAN, t * end).apply(image, seed=seed)


def brightness_path(image: Image) -> QueryPath:
    """Darkening, down to a twentieth of the brightness."""
    return lambda t: image * np.float32(1 - t * (1 - DARKEST))


def adversarial_path(image: Image, *, embedding: Embedding, largest_norm: float) -> QueryPath:
    """Straight from the image to where PGD has moved its embedding far with a perturbation of ``largest_norm`` at most.

    The direction is thus the worst for the embedding at the path's end, not at every norm.
    """
    end = Perturbation(Family.PGD, largest_norm).apply(image, seed=0, embedding=embedding)
    return lambda t: np.clip(image + np.float32(t) * (end - image), 0, 1)


def closed_form_radius(
    feature: Float64[np.ndarray, "d"], features: Float64[np.ndarray, "n d"], *, k: int, metric: Metric
) -> float:
    """The L2 norm of the smallest perturbation of the query's feature that changes the top-k set.

    An exemplar j outside overtakes an i inside at a plane: that between f_i and f_j for L2, at a distance of
    (d_j² − d_i²) / (2 ‖f_i − f_j‖) with d the distances to the query q; for cosine that of equal angles, at a distance
    of q·(u_i − u_j) / ‖u_i − u_j‖ with u = f / ‖f‖, and 0 for f = 0. The radius is the smallest over all such pairs.

    Args:
        feature: φ(x_q).
        features: φ(x_i).
        k: Size of the set; fewer than n.
        metric: Whether L2 distance or cosine similarity ranks.

    Returns:
        An infimum: at the radius itself the two exemplars tie. 0 where identical features (for cosine: of one
        direction) are on both sides.

    Raises:
        InputError: k is not in [1, n).
    """
    require_k(k, len(features))
    if metric is Metric.L2:
        points = features - feature  # so that rounding is relative to the distances
        potential = -np.einsum("nd,nd->n", points, points) / 2
    else:
        norms = np.linalg.norm(features, axis=1, keepdims=True)
        points = np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)
        potential = points @ feature
    inside, outside = np.split(np.argsort(-potential, kind="stable"), [k])
    squares = np.einsum("nd,nd->n", points, points)
    scale = squares[inside, None] + squares[outside]  # (k, n−k), as all that follow
    apart = scale - 2 * (points[inside] @ points.T)[:, outside]
    lead = potential[inside, None] - potential[outside]
    for row, i in enumerate(inside):
        near = np.flatnonzero(apart[row] < NEAR * scale[row])
        apart[row, near] = np.square(points[i] - points[outside[near]]).sum(axis=1)
    radii = np.divide(lead, np.sqrt(apart), out=np.zeros_like(lead), where=apart > SAME[metric] ** 2)
    return max(0.0, float(radii.min()))


def margin_radius(
    retriever: Retriever, image: Image, *, k: int, samples: int, step_norm: float, seed: int = 0
) -> Margin:
    """γ₂ / (2 L̂), the radius of Lemma 2 with an estimate in the Lipschitz constant's place: not certified.

    γ₂ is the score of the k-th best exemplar minus that of the next. L̂ is the largest |s_i(x+δ) − s_i(x)| / ‖δ‖₂ over
    random δ of ``step_norm`` and the k+1 best exemplars i; what float32 rounds is no change. The true constant is a
    supremum over all δ and may be larger by any factor, so the value may exceed the radius.

    Args:
        retriever: Its scores must be finite.
        image: The query.
        k: Size of the set; fewer than n.
        samples: Number of random perturbations; at least 1.
        step_norm: Their L2 norm, clipped to [0, 1].
        seed: Of the perturbations, and the retriever's.

    Raises:
        InputError: k is not in [1, n), or the image has no room for a perturbation of that norm.
    """
    scores = retriever.scores(image, seed=seed).astype(np.float64)
    require_k(k, len(scores))
    best = np.argsort(-scores, kind="stable")[: k + 1]
    gap = float(scores[best[-2]] - scores[best[-1]])
    step = Perturbation(Family.GAUSSIAN, step_norm)
    lipschitz, rounding = 0.0, ROUNDING * float(np.abs(scores[best]).max())
    for number in range(samples):
        nearby = step.apply(image, seed=derived(seed, number))
        change = np.abs(retriever.scores(nearby, seed=seed)[best] - scores[best]).max()
        if change > rounding:
            lipschitz = max(lipschitz, float(change) / _distance(nearby, image))
    if gap == 0:
        return Margin(0.0, gap, lipschitz)
    return Margin(gap / (2 * lipschitz) if lipschitz > 0 else math.inf, gap, lipschitz)


def seed_changes_top(
    retriever: Retriever, image: Image, *, ids: Shaped[np.ndarray, "n"], k: int, seeds: Sequence[int]
) -> float:
    """The share of the other seeds whose top-k set differs from the first one's: 0 for a deterministic retriever.

    What changes by the seed alone does not measure robustness: beside a large share, a small radius says little.

    Args:
        retriever: What is asked, with the same image every time.
        image: The query.
        ids: Of all exemplars; they break ties.
        k: Size of the set.
        seeds: Two at least.
    """
    first, *others = (set_of_top(retriever, image, ids=ids, k=k, seed=seed) for seed in seeds)
    return sum(other != first for other in others) / len(others)


def set_of_top(
    retriever: Retriever, image: Image, *, ids: Shaped[np.ndarray, "n"], k: int, seed: int
) -> frozenset[int]:
    """The rows of the top k: what a radius is measured by."""
    return frozenset(top(retriever.scores(image, seed=seed), ids, k).tolist())


def require_k(k: int, n: int) -> None:
    """Refuse a k that leaves no exemplar outside, as an `InputError`."""
    if not 1 <= k < n:
        raise InputError(f"expected k in [1, {n - 1}], fewer than the {n} exemplars, got {k}")


def _distance(image: Image, other: Image) -> float:
    return float(np.linalg.norm(image.astype(np.float64) - other))


def derived(*numbers: int) -> int:
    """A seed for the combination of these."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
