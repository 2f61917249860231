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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, Shaped

from tmm_engine.bench.attack import Embedding, features_of
from tmm_engine.bench.noise import Family, Image, Perturbation, gaussian_reach
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.retrievers import Retriever, top
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.progress import Progress, silent

KEY = ("query", "method", "kind", "direction")
"""What a record is found by: open the `RecordFile` with it."""

GRID = tuple(np.geomspace(1 / 64, 1, 10).tolist())
DARKEST = 0.05  # the factor at which `brightness_path` ends
MARGIN_SAMPLES = 8
MARGIN_STEP = 0.1  # L2 norm in pixels
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # of a score: less than that is no change
CONTROL_SEEDS = 4
NEAR = 1e-6  # of the squared norms: a squared distance below that has lost half its digits to the Gram identity
SAME = {Metric.L2: 0.0, Metric.COSINE: 1e-14}  # features of one direction differ by rounding once they are normalised

QueryPath = Callable[[float], Image]
TopSet = Callable[[Image], frozenset[int]]


class Kind(StrEnum):
    """What a record's radius is."""

    GAUSSIAN = "gaussian"  # `empirical_radius`, in L2 norm of pixels, and the next three
    BRIGHTNESS = "brightness"
    ADVERSARIAL = "adversarial"  # towards where PGD has moved φ(x): one path for all methods
    ADAPTIVE = "adaptive"  # towards where it has moved what the method ranks by
    FEATURE = "feature"  # `closed_form_radius`, in L2 norm of features
    MARGIN = "margin"  # `margin_radius`, in L2 norm of pixels
    SEED = "seed"  # not a radius: `seed_changes_top`, a share in [0, 1]


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
    _require_k(k, len(features))
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
    _require_k(k, len(scores))
    best = np.argsort(-scores, kind="stable")[: k + 1]
    gap = float(scores[best[-2]] - scores[best[-1]])
    step = Perturbation(Family.GAUSSIAN, step_norm)
    lipschitz, rounding = 0.0, ROUNDING * float(np.abs(scores[best]).max())
    for number in range(samples):
        nearby = step.apply(image, seed=_derived(seed, number))
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
    first, *others = (_top_set(retriever, image, ids=ids, k=k, seed=seed) for seed in seeds)
    return sum(other != first for other in others) / len(others)


def measure_radius(
    retrievers: Sequence[Retriever],
    images: Float32[np.ndarray, "q c h w"],
    names: Sequence[str],
    ids: Shaped[np.ndarray, "n"],
    record_file: RecordFile,
    *,
    classifier: Classifier,
    features: Float32[np.ndarray, "n d"],
    numbers: Int64[np.ndarray, "q"],
    k: int = 10,
    kinds: Sequence[Kind] = tuple(Kind),
    directions: int = 3,
    largest_norm: float = 5.0,
    tolerance: float = 0.02,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Append a record for every query, retriever, kind of radius and direction that the file does not have yet.

    A record is ``{"query", "method", "kind", "direction", "radius", "censored", "evaluations"}``. See `Kind` for what
    ``radius`` is; it is null where it is infinite. ``censored``: the radius is larger than that. ``evaluations``: how
    often the retriever was run. Only Gaussian noise has more than direction 0.

    Args:
        retrievers: What is compared; the kind `Kind.FEATURE` is for those named 'l2' and 'cosine' only.
        images: The queries, in [0, 1]; exemplars or not.
        names: Of the queries, for the records.
        ids: Of all exemplars.
        record_file: Opened with `KEY`.
        classifier: φ.
        features: φ of all exemplars.
        numbers: Of the queries: the seeds of their noise.
        k: Size of the set; fewer than n.
        kinds: Of radius.
        directions: Of Gaussian noise, for each query.
        largest_norm: L2 norm at which paths of noise end; darkening ends at 0.05 of the brightness.
        tolerance: Of a radius along a path, in L2 norm.
        seed: Of directions and retrievers.
        progress: Told of radii done.

    Raises:
        InputError: k is not in [1, n), or there is not one name and number per query.
    """
    _require_k(k, len(ids))
    if not len(images) == len(names) == len(numbers):
        raise InputError(
            f"expected a name and a number for each of {len(images)} queries, got {len(names)} and {len(numbers)}"
        )
    precise = features.astype(np.float64)
    total = len(images) * sum(len(list(_kinds(retriever, kinds, directions))) for retriever in retrievers)
    done = 0
    for number, name, image in zip(numbers.tolist(), names, images, strict=True):
        query = _Query(image, number, ids, classifier, precise, k, largest_norm, tolerance, seed)
        for retriever in retrievers:
            for kind, direction in _kinds(retriever, kinds, directions):
                key = {"query": name, "method": retriever.name, "kind": str(kind), "direction": direction}
                if not record_file.done(**key):
                    radius = query.radius(retriever, kind, direction)
                    found = {"radius": radius.value, "censored": radius.censored, "evaluations": radius.evaluations}
                    record_file.append(key | found)
                done += 1
                progress("radii", done, total)


def _kinds(retriever: Retriever, kinds: Sequence[Kind], directions: int) -> Iterator[tuple[Kind, int]]:
    for kind in kinds:
        if kind is not Kind.FEATURE or retriever.name in list(Metric):
            for direction in range(directions if kind is Kind.GAUSSIAN else 1):
                yield kind, direction


@dataclass(frozen=True)
class _Query:
    image: Image
    number: int
    ids: Shaped[np.ndarray, "n"]
    classifier: Classifier
    features: Float64[np.ndarray, "n d"]
    k: int
    largest_norm: float
    tolerance: float
    seed: int

    @cached_property
    def adversarial(self) -> QueryPath:
        return adversarial_path(self.image, embedding=features_of(self.classifier), largest_norm=self.largest_norm)

    @cached_property
    def feature(self) -> Float64[np.ndarray, "d"]:
        with torch.no_grad():
            return features_of(self.classifier)(torch.tensor(self.image)[None])[0].double().cpu().numpy()

    def radius(self, retriever: Retriever, kind: Kind, direction: int) -> Radius:
        match kind:
            case Kind.FEATURE:
                metric = Metric(retriever.name)
                value = closed_form_radius(self.feature, self.features, k=self.k, metric=metric)
                return Radius(value, censored=False, evaluations=0)
            case Kind.MARGIN:
                margin = margin_radius(
                    retriever, self.image, k=self.k, samples=MARGIN_SAMPLES, step_norm=MARGIN_STEP, seed=self.seed
                )
                return Radius(margin.value, censored=False, evaluations=1 + MARGIN_SAMPLES)
            case Kind.SEED:
                seeds = range(self.seed, self.seed + CONTROL_SEEDS)
                share = seed_changes_top(retriever, self.image, ids=self.ids, k=self.k, seeds=seeds)
                return Radius(share, censored=False, evaluations=CONTROL_SEEDS)
            case _:
                return self._along(self._path(retriever, kind, direction), retriever)

    def _path(self, retriever: Retriever, kind: Kind, direction: int) -> QueryPath:
        match kind:
            case Kind.GAUSSIAN:
                noise = _derived(self.seed, self.number, direction)
                return gaussian_path(self.image, seed=noise, largest_norm=self.largest_norm)
            case Kind.BRIGHTNESS:
                return brightness_path(self.image)
            case Kind.ADVERSARIAL:
                return self.adversarial
            case Kind.ADAPTIVE:
                return adversarial_path(self.image, embedding=retriever.embedding, largest_norm=self.largest_norm)
        raise AssertionError(f"{kind} is not found along a path")

    def _along(self, path: QueryPath, retriever: Retriever) -> Radius:
        top_set = partial(_top_set, retriever, ids=self.ids, k=self.k, seed=self.seed)
        return empirical_radius(top_set, path, tolerance=self.tolerance)


def _top_set(retriever: Retriever, image: Image, *, ids: Shaped[np.ndarray, "n"], k: int, seed: int) -> frozenset[int]:
    return frozenset(top(retriever.scores(image, seed=seed), ids, k).tolist())


def _require_k(k: int, n: int) -> None:
    if not 1 <= k < n:
        raise InputError(f"expected k in [1, {n - 1}], fewer than the {n} exemplars, got {k}")


def _distance(image: Image, other: Image) -> float:
    return float(np.linalg.norm(image.astype(np.float64) - other))


def _derived(*numbers: int) -> int:
    """A seed for the combination of these."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
