"""Radii against retrievers and geometries whose radius is known."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tmm_engine.bench.attack import features_of
from tmm_engine.bench.benchmarks.radius import CONTROL_SEEDS, KEY, MARGIN_SAMPLES, measure_radius
from tmm_engine.bench.noise import Family, Perturbation
from tmm_engine.bench.radii import (
    Radius,
    adversarial_path,
    brightness_path,
    closed_form_radius,
    empirical_radius,
    gaussian_path,
    margin_radius,
    seed_changes_top,
)
from tmm_engine.bench.records import RecordFile, read_records
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import exact_scores

SETTINGS = {"benchmark": "radius"}


class Scored:
    """A retriever with the given scores of (image, seed); counts how often it is asked."""

    def __init__(self, name: str, score: Callable[[np.ndarray, int], np.ndarray]) -> None:
        self.name = name
        self.asked = 0
        self._score = score
        self.embedding = brightness  # which none here ranks by: an attack on it is a weak one

    def scores(self, query: np.ndarray, *, seed: int = 0) -> np.ndarray:
        self.asked += 1
        return self._score(query, seed)


def picture(seed: int, shape: tuple[int, int, int] = (3, 8, 8)) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def gray_path(t: float) -> np.ndarray:
    """From black outwards; ‖path(1)‖ = 4."""
    return np.full((1, 4, 4), t, np.float32)


def brightness(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.mean((1, 2, 3))[:, None]


def norm(image: np.ndarray) -> float:
    return float(np.linalg.norm(image.astype(np.float64)))


class Threshold:
    """Another top set from a norm on; counts how often it is asked."""

    def __init__(self, *thresholds: float) -> None:
        self.asked = 0
        self._thresholds = thresholds

    def __call__(self, image: np.ndarray) -> frozenset[int]:
        self.asked += 1
        passed = sum(norm(image) >= threshold for threshold in self._thresholds)
        return frozenset({1, 2 + passed % 2})


@given(st.floats(1e-3, 6), st.floats(1e-3, 1))
def test_the_search_brackets_a_known_radius(radius, tolerance):
    top_set = Threshold(radius)
    found = empirical_radius(top_set, gray_path, tolerance=tolerance)
    assert found.evaluations == top_set.asked
    assert found.censored == (radius > 4)
    if found.censored:
        assert found.value == 4
    else:
        assert radius <= found.value <= radius + tolerance


def test_a_fine_search_needs_few_evaluations():
    for radius in (0.05, 0.3, 1.7, 3.99):
        assert empirical_radius(Threshold(radius), gray_path, tolerance=1e-3).evaluations <= 24


def test_norms_beyond_the_largest_are_not_looked_at():
    seen: list[float] = []

    def top_set(image: np.ndarray) -> frozenset[int]:
        seen.append(norm(image))
        return frozenset({norm(image) > 3})

    found = empirical_radius(top_set, gray_path, largest=2.0, tolerance=0.01)
    assert found == Radius(max(seen), censored=True, evaluations=len(seen))
    assert 1 < max(seen) <= 2


def test_a_set_that_changes_back_gives_an_upper_bound():
    found = empirical_radius(Threshold(1.0, 1.01, 3.0), gray_path, tolerance=1e-3)
    assert found.value in (pytest.approx(1.0, abs=1e-3), pytest.approx(3.0, abs=1e-3))


def test_a_path_that_jumps_ends_the_search():
    found = empirical_radius(Threshold(1.0), lambda t: gray_path(float(t > 0.3)), tolerance=1e-6)
    assert found.value == 4
    assert not found.censored


def test_a_path_that_goes_nowhere_is_censored_at_zero():
    black = np.zeros((1, 4, 4), np.float32)
    assert empirical_radius(Threshold(1.0), brightness_path(black), tolerance=0.1) == Radius(0.0, True, 11)


def paths(image: np.ndarray, classifier) -> dict:
    return {
        "gaussian": gaussian_path(image, seed=3, largest_norm=2.0),
        "brightness": brightness_path(image),
        "adversarial": adversarial_path(image, embedding=features_of(classifier), largest_norm=2.0),
    }


@pytest.mark.parametrize("kind", ["gaussian", "brightness", "adversarial"])
def test_paths_begin_at_the_query_stay_in_range_and_grow_evenly(kind, classifier):
    image = picture(0)
    image.flags.writeable = False
    path = paths(image, classifier)[kind]
    assert np.array_equal(path(0.0), image)
    end = norm(path(1.0).astype(np.float64) - image)
    assert end == pytest.approx({"gaussian": 2.0, "brightness": 0.95 * norm(image)}.get(kind, 2.0), rel=0.2)
    for t in np.linspace(0, 1, 9):
        assert path(t).dtype == np.float32
        assert 0 <= path(t).min() <= path(t).max() <= 1
        assert norm(path(t).astype(np.float64) - image) == pytest.approx(t * end, abs=1e-4)


def test_where_the_paths_end(classifier):
    image = picture(0)
    ends = {kind: path(1.0) for kind, path in paths(image, classifier).items()}
    assert np.array_equal(ends["gaussian"], Perturbation(Family.GAUSSIAN, 2.0).apply(image, seed=3))
    np.testing.assert_allclose(ends["brightness"], 0.05 * image, rtol=1e-5)
    attack = Perturbation(Family.PGD, 2.0).apply(image, seed=0, embedding=features_of(classifier))
    np.testing.assert_allclose(ends["adversarial"], attack, atol=1e-6)
    far = gaussian_path(image, seed=3, largest_norm=1e6)(1.0)  # the image has less room than that
    assert set(np.unique(far)) == {0.0, 1.0}


def brute_force(query: np.ndarray, features: np.ndarray, k: int, metric: Metric) -> tuple[float, np.ndarray]:
    """Radius and minimising step, pair by pair, as the formulas say."""
    distances = np.linalg.norm(features - query, axis=1)
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    order = np.argsort(distances if metric is Metric.L2 else -(units @ query))
    best = (math.inf, np.zeros_like(query))
    for i, j in itertools.product(order[:k], order[k:]):
        if metric is Metric.L2:
            normal = features[i] - features[j]
            radius = (distances[j] ** 2 - distances[i] ** 2) / (2 * np.linalg.norm(normal))
        else:
            normal = units[i] - units[j]
            radius = query @ normal / np.linalg.norm(normal)
        if radius < best[0]:
            best = (radius, -radius * normal / np.linalg.norm(normal))
    return best


def top_rows(queries: np.ndarray, features: np.ndarray, k: int, metric: Metric) -> list[frozenset[int]]:
    if metric is Metric.L2:
        scores = -np.linalg.norm(queries[:, None] - features, axis=2)
    else:
        scores = queries @ (features / np.linalg.norm(features, axis=1, keepdims=True)).T
    return [frozenset(rows) for rows in np.argsort(-scores, axis=1)[:, :k].tolist()]


@pytest.mark.parametrize("metric", Metric)
@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(3, 12), st.integers(1, 5), st.booleans())
def test_the_closed_form_is_exact(metric, seed, d, n, k, positive):
    k = min(k, n - 1)
    rng = np.random.default_rng(seed)
    query, features = rng.standard_normal(d), rng.standard_normal((n, d))
    if positive:  # as behind a ReLU
        query, features = np.abs(query), np.abs(features)
    radius = closed_form_radius(query, features, k=k, metric=metric)
    expected, step = brute_force(query, features, k, metric)
    assert radius == pytest.approx(expected, rel=1e-9)
    assume(radius > 1e-6)
    directions = rng.standard_normal((200, d))
    directions *= 0.999999 * radius / np.linalg.norm(directions, axis=1, keepdims=True)
    steps = np.stack([0 * step, (1 + 1e-6) * step, (1 - 1e-6) * step, *directions])
    before, beyond, *within = top_rows(query + steps, features, k, metric)
    assert beyond != before
    assert set(within) == {before}


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_duplicates_on_both_sides_leave_no_radius(metric, factor):
    rng = np.random.default_rng(0)
    features = rng.random((8, 5))
    query = features[2] + 0.01 * rng.random(5)
    features[5] = factor * features[2]
    radius = closed_form_radius(query, features, k=1, metric=metric)
    assert (radius == 0) == (factor == 1 or metric is Metric.COSINE)
    assert closed_form_radius(query, features, k=2, metric=metric) > 0


def test_features_that_are_zero():
    features = np.array([[0.0, 0.0], [0.0, 1.0]])
    query = np.array([0.1, 2.0])
    assert closed_form_radius(query, features, k=1, metric=Metric.COSINE) == pytest.approx(2.0)  # at 90° it is 0
    assert closed_form_radius(np.zeros(2), features, k=1, metric=Metric.COSINE) == 0
    assert closed_form_radius(np.zeros(2), features, k=1, metric=Metric.L2) == pytest.approx(0.5)
    assert closed_form_radius(np.zeros(2), np.zeros((3, 2)), k=1, metric=Metric.L2) == 0


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_nearly_identical_features_lose_no_digits(gap, offset):
    rng = np.random.default_rng(1)
    query = offset + rng.random(16)
    near = query + rng.standard_normal(16)
    features = np.stack([near, near + gap * rng.standard_normal(16)])

    def squared(a, b):
        return sum((Fraction(x) - Fraction(y)) ** 2 for x, y in zip(a, b, strict=True))

    lead = abs(squared(query, features[0]) - squared(query, features[1]))
    expected = float(lead) / (2 * math.sqrt(squared(*features)))
    assert closed_form_radius(query, features, k=1, metric=Metric.L2) == pytest.approx(expected, rel=1e-5)


def test_the_radius_along_a_path_is_never_below_the_closed_form():
    features = np.stack([picture(seed).ravel() for seed in range(30)]).astype(np.float64)
    image = (0.25 + 0.5 * picture(99)).astype(np.float32)

    def top_set(perturbed: np.ndarray) -> frozenset[int]:
        return top_rows(perturbed.reshape(1, -1).astype(np.float64), features, 3, Metric.L2)[0]

    exact = closed_form_radius(image.ravel().astype(np.float64), features, k=3, metric=Metric.L2)
    _, step = brute_force(image.ravel().astype(np.float64), features, 3, Metric.L2)
    worst = (4 * step).astype(np.float32).reshape(image.shape)
    assert 0 <= (image + worst).min() <= (image + worst).max() <= 1
    found = empirical_radius(top_set, lambda t: image + np.float32(t) * worst, tolerance=1e-4)
    assert found.value == pytest.approx(exact, abs=2e-4)
    for seed in range(5):
        noise = gaussian_path(image, seed=seed, largest_norm=5.0)
        assert empirical_radius(top_set, noise, tolerance=1e-3).value > exact


def cones(image: np.ndarray, heights: list[float], slopes: list[float]) -> Scored:
    """Scores that fall from their height at ``image`` with a known slope: their Lipschitz constants."""
    return Scored("cones", lambda query, _: np.array(heights) - np.array(slopes) * norm(query - image.astype(float)))


def test_the_margin_is_half_the_gap_by_the_steepest_of_the_best():
    image = picture(0)
    retriever = cones(image, heights=[3, 9, 7, 4], slopes=[100, 1, 2, 5])
    margin = margin_radius(retriever, image, k=2, samples=4, step_norm=0.1, seed=0)
    assert (margin.gap, margin.lipschitz) == (3, pytest.approx(5))  # the row of slope 100 is not among the best three
    assert margin.value == pytest.approx(3 / (2 * 5))
    assert retriever.asked == 5
    sudden = empirical_radius(
        lambda x: frozenset(np.argsort(-retriever.scores(x))[:2].tolist()),
        gaussian_path(image, seed=0, largest_norm=5.0),
        tolerance=1e-3,
    )
    assert sudden.value > margin.value


def test_more_samples_find_steeper_changes():
    weights = picture(1).astype(np.float64)
    tilted = Scored("tilted", lambda query, _: np.array([(weights * query).sum(), -1.0]))
    steepest = [
        margin_radius(tilted, picture(0), k=1, samples=samples, step_norm=0.1, seed=2).lipschitz for samples in (1, 30)
    ]
    assert 0 < steepest[0] < steepest[1] < norm(weights)


def test_a_margin_without_gap_is_zero_and_without_slope_infinite():
    image = picture(0)
    options = {"k": 1, "samples": 2, "step_norm": 0.1}
    assert margin_radius(cones(image, [1, 1], [0, 0]), image, **options).value == 0
    assert margin_radius(cones(image, [1, 1], [2, 2]), image, **options).value == 0
    assert margin_radius(cones(image, [2, 1], [0, 0]), image, **options).value == math.inf


@pytest.mark.parametrize("k", [0, 3, 4])
def test_k_must_leave_someone_outside(k):
    image = picture(0)
    with pytest.raises(InputError, match=rf"expected k in \[1, 2\], fewer than the 3 exemplars, got {k}"):
        closed_form_radius(np.ones(2), np.eye(3, 2), k=k, metric=Metric.L2)
    with pytest.raises(InputError, match="expected k"):
        margin_radius(cones(image, [1, 2, 3], [1, 1, 1]), image, k=k, samples=1, step_norm=0.1)


def test_the_control_counts_seeds_that_change_the_set():
    image, ids = picture(0), np.array(["a", "b", "c"], dtype=object)
    fickle = Scored("fickle", lambda _, seed: np.array([2.0, 1.0, 3.0 if seed in (2, 3) else 0.0]))
    shuffled = Scored("shuffled", lambda _, seed: np.array([2.0 + seed % 2, 2.5, 0.0]))
    tied = Scored("tied", lambda *_: np.zeros(3))
    assert seed_changes_top(fickle, image, ids=ids, k=2, seeds=range(5)) == 0.5
    assert seed_changes_top(fickle, image, ids=ids, k=2, seeds=(2, 3, 4)) == 0.5
    assert seed_changes_top(shuffled, image, ids=ids, k=2, seeds=range(5)) == 0  # another order, the same set
    assert seed_changes_top(tied, image, ids=ids, k=2, seeds=range(5)) == 0


class Suite:
    """Two retrievers over the exemplars of a store, and a file."""

    def __init__(self, classifier, make_store) -> None:
        store = make_store(classifier, 20, seed=4)
        self.rows = np.array([3, 11])
        self.images = store.images(self.rows).astype(np.float32) / 255
        self.ids, self.classifier, self.features = store.ids, classifier, store.features(np.arange(20))
        self.l2 = Scored("l2", lambda query, _: self._similarity(query))
        self.l2.embedding = features_of(classifier)
        self.fused = Scored("fused", lambda query, seed: self._similarity(query) + 0.01 * seed)

    def _similarity(self, query: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            feature = self.classifier.features(torch.tensor(query)[None])[0].numpy()
        return exact_scores(feature, self.features, Metric.L2)

    def measure(self, path: Path, **options) -> list[dict]:
        with RecordFile.open(path, SETTINGS, KEY, tuple(SETTINGS)) as record_file:
            measure_radius(
                [self.l2, self.fused],
                self.images,
                options.pop("names", self.ids[self.rows].tolist()),
                self.ids,
                record_file,
                numbers=self.rows,
                classifier=self.classifier,
                features=self.features,
                **{"k": 4, "directions": 2, "largest_norm": 3.0, "tolerance": 0.1} | options,
            )
        return read_records(path).records


@pytest.fixture(scope="module")
def suite(classifier, make_store):
    return Suite(classifier, make_store)


def test_every_query_method_and_kind_is_recorded_once(suite, tmp_path):
    suite.l2.asked = 0
    steps: list[tuple[int, int]] = []
    records = suite.measure(tmp_path / "r.jsonl", progress=lambda _, done, total: steps.append((done, total)))
    others = [(kind, 0) for kind in ("brightness", "adversarial", "adaptive", "feature", "margin", "seed")]
    kinds = [("gaussian", 0), ("gaussian", 1), *others]
    assert [tuple(record[name] for name in KEY) for record in records] == [
        (query, method, *kind)
        for query in ("exemplar 0003", "exemplar 0011")
        for method in ("l2", "fused")
        for kind in kinds
        if kind != ("feature", 0) or method == "l2"
    ]
    assert steps == [(done, 30) for done in range(1, 31)]
    assert sum(record["evaluations"] for record in records if record["method"] == "l2") == suite.l2.asked
    found = {tuple(record[name] for name in KEY[1:]): record for record in records[:15]}
    assert found["l2", "seed", 0]["radius"] == found["fused", "seed", 0]["radius"] == 0
    assert found["l2", "seed", 0]["evaluations"] == CONTROL_SEEDS
    assert found["l2", "margin", 0]["evaluations"] == 1 + MARGIN_SAMPLES
    assert found["l2", "margin", 0]["radius"] > 0
    assert found["l2", "gaussian", 0]["radius"] != found["l2", "gaussian", 1]["radius"]
    for kind in kinds[:4]:
        assert found["l2", *kind]["radius"] == found["fused", *kind]["radius"]  # a constant changes no set
        assert found["l2", *kind]["censored"] or found["l2", *kind]["radius"] > 0
    assert found["l2", "adaptive", 0]["radius"] == found["l2", "adversarial", 0]["radius"]  # it ranks by φ(x)
    assert found["fused", "adaptive", 0]["radius"] > 2 * found["fused", "adversarial", 0]["radius"]
    expected = closed_form_radius(
        suite.features[3].astype(np.float64), suite.features.astype(np.float64), k=4, metric=Metric.L2
    )
    assert found["l2", "feature", 0]["radius"] == pytest.approx(expected, rel=1e-4)


def test_the_adversarial_path_is_shorter_than_noise(suite, tmp_path):
    records = suite.measure(tmp_path / "r.jsonl")
    radii = {kind: [r["radius"] for r in records if r["kind"] == kind] for kind in ("gaussian", "adversarial")}
    assert np.mean(radii["adversarial"]) < np.mean(radii["gaussian"])


def test_a_run_goes_on_where_it_stopped_and_repeats_itself(suite, tmp_path):
    path, again = tmp_path / "r.jsonl", tmp_path / "again.jsonl"
    records = suite.measure(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]))
    suite.l2.asked = suite.fused.asked = 0
    assert suite.measure(path) == records
    assert suite.l2.asked == 0
    assert suite.fused.asked == sum(record["evaluations"] for record in records[-3:])
    assert suite.measure(again) == records
    noise, other = (
        [record["radius"] for record in found if record["kind"] == "gaussian"]
        for found in (records, suite.measure(tmp_path / "other.jsonl", seed=1))
    )
    assert all(a != b for a, b in zip(noise, other, strict=True))


def test_what_does_not_fit_is_refused_before_the_first_search(suite, tmp_path):
    suite.l2.asked = 0
    with pytest.raises(InputError, match="a name and a number for each of 2 queries, got 3 and 2"):
        suite.measure(tmp_path / "r.jsonl", names=["a", "b", "c"])
    with pytest.raises(InputError, match=r"expected k in \[1, 19\]"):
        suite.measure(tmp_path / "r.jsonl", k=20)
    assert suite.l2.asked == 0
