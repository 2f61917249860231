"""Foreign exemplars: the bound by hand and against draws, the mixed store, counts, resuming."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import tiny_arrays, tiny_classifier
from tests.digits import write_photos
from tests.fakes import NotAttacked
from tmm_engine.bench.benchmarks.ood import KEY, foreign_images, measure_foreign, mixed, noise_images, outranking_bound
from tmm_engine.bench.methods import Method
from tmm_engine.bench.noise import Perturbation, parse
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.retrievers import make_retrievers
from tmm_engine.bench.suite import Suite
from tmm_engine.index.columns import embed
from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.index.store.embedding import predict
from tmm_engine.rerank.columns import STRETCHED_FEATURE

N, M = 20, 6
scores = st.floats(-100, 100, allow_subnormal=False)


@pytest.fixture(scope="module")
def suite() -> Suite:
    images, labels = tiny_arrays(1)
    ids = [f"{'az'[row % 2]}{row:03}" for row in range(len(images))]  # before and behind those of foreign exemplars
    return Suite.load(ArraySource(images, labels, ids=ids, name="tiny"), tiny_classifier(), exemplars=N)


# --------------------------------------------------------------------------------------------- bound


def test_the_bound_by_hand():
    foreign = np.array([-1.0, 1.0, -1.0, 1.0])  # mean 0, σ = 1
    assert outranking_bound(2.0, foreign) == pytest.approx(4 * math.exp(-2.0))
    assert outranking_bound(12.0, 3 * foreign + 6) == pytest.approx(4 * math.exp(-2.0))
    assert outranking_bound(1.0, foreign) == 1.0  # 4 · exp(−1/2) is above 1
    assert outranking_bound(0.0, foreign) == outranking_bound(-5.0, foreign) == 1.0
    assert outranking_bound(0.1, np.zeros(3)) == 0.0
    assert outranking_bound(0.0, np.zeros(3)) == 1.0


@given(st.lists(scores, min_size=1, max_size=20), scores, scores)
def test_the_bound_is_a_share_that_falls_as_the_true_score_rises(foreign, one, other):
    low, high = (outranking_bound(true, np.array(foreign)) for true in sorted((one, other)))
    assert 0.0 <= high <= low <= 1.0


def test_gaussian_scores_keep_to_the_bound():
    generator = np.random.default_rng(0)
    for true in (2.5, 3.0, 3.5, 4.0):
        draws = generator.standard_normal((2000, 50))
        observed = (draws.max(axis=1) > true).mean()
        bounds = [outranking_bound(true, draw) for draw in draws]
        assert 0 <= observed <= np.mean(bounds)


# --------------------------------------------------------------------------------------------- exemplars


def test_noise_is_uniform_and_seeded():
    images = noise_images(40, (3, 8, 8), seed=1)
    assert (images.shape, images.dtype) == ((40, 3, 8, 8), np.uint8)
    assert (images.min(), images.max()) == (0, 255)
    assert images.mean() == pytest.approx(127.5, abs=3)
    np.testing.assert_array_equal(images, noise_images(40, (3, 8, 8), seed=1))
    assert not np.array_equal(images, noise_images(40, (3, 8, 8), seed=2))


def test_foreign_images_are_a_seeded_subset_in_the_shape_asked_for(tmp_path: Path):
    source = FolderSource(write_photos(tmp_path / "photos", count=15))  # (1, 8, 8)
    few, more = (foreign_images(source, count, (3, 16, 16), seed=0) for count in (4, 9))
    assert few.shape == (4, 3, 16, 16)
    np.testing.assert_array_equal(more[:4], few)
    assert not np.array_equal(foreign_images(source, 4, (3, 16, 16), seed=1), few)
    assert len(foreign_images(source, 400, (3, 16, 16), seed=0)) == 15
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="no image could be read"):
        foreign_images(FolderSource(tmp_path / "broken"), 4, (3, 16, 16), seed=0)


def test_foreign_exemplars_come_last_and_bear_the_models_labels(suite: Suite):
    foreign = noise_images(M, (3, 8, 8), seed=0)
    store = mixed(suite, foreign)
    rows, own, others = np.arange(N + M), np.arange(N), np.arange(N, N + M)
    np.testing.assert_array_equal(store.images(rows), np.concatenate([suite.store.images(own), foreign]))
    np.testing.assert_array_equal(store.features(own), suite.store.features(own))
    features = embed(foreign, suite.classifier)
    np.testing.assert_array_equal(store.features(others), features)
    with torch.inference_mode():
        stretched = suite.classifier.features(stretch_contrast(torch.from_numpy(foreign) / 255))
    found = store.features(rows, column=STRETCHED_FEATURE)
    np.testing.assert_array_equal(found[:N], suite.store.features(own, column=STRETCHED_FEATURE))
    np.testing.assert_allclose(found[N:], stretched, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(store.labels[:N], suite.store.labels)
    np.testing.assert_array_equal(store.labels[N:], predict(features, suite.classifier))
    assert store.label_is_predicted.tolist() == N * [False] + M * [True]
    assert store.ids[:N].tolist() == suite.store.ids.tolist()


# --------------------------------------------------------------------------------------------- records


class ByRow(NotAttacked):
    """Fixed scores; counts its searches."""

    def __init__(self, name: str, own: list[float], foreign: list[float]) -> None:
        self.name, self.searches, self._scores = name, 0, np.array(own + foreign)

    def scores(self, query: np.ndarray, *, seed: int = 0) -> np.ndarray:
        self.searches += 1
        return self._scores


def measure(path: Path, suite: Suite, *retrievers: object, levels: tuple[str, ...] = ("clean",)) -> list[dict]:
    perturbations: list[Perturbation] = [parse(level) for level in levels]
    store = mixed(suite, noise_images(M, (3, 8, 8), seed=0))
    with RecordFile.open(path, {"benchmark": "ood"}, KEY, ("benchmark",)) as records:
        measure_foreign(
            retrievers,
            suite.queries(3),
            store,
            perturbations,
            records,
            foreign="noise",
            foreign_count=M,
            classifier=suite.classifier,
        )
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_only_foreign_exemplars_that_come_first_are_counted(suite: Suite, tmp_path: Path):
    own = [5.0 if row in suite.queries(3) else 9.0 for row in range(N)]  # other true exemplars do not matter
    foreign = [6.0, 0.0, 5.0, 4.0, 1.0, 7.0]
    found = measure(tmp_path / "o.jsonl", suite, ByRow("a", own, foreign), ByRow("b", own, [1.0, 0.0] * 3))
    ahead = {id_: 2 + (id_ > "foreign/00000002") for id_ in suite.store.ids[suite.queries(3)]}  # a tie, by id
    assert len(found) == 6
    assert set(ahead.values()) == {2, 3}
    for record in found:
        assert (record["foreign"], record["foreign_count"], record["level"]) == ("noise", M, "clean")
        assert record["outranked"] == (ahead[record["query"]] if record["method"] == "a" else 0)
        expected = outranking_bound(5.0, np.array(foreign if record["method"] == "a" else [1.0, 0.0] * 3))
        assert record["bound"] == pytest.approx(expected)


def test_a_rerun_measures_what_is_missing(suite: Suite, tmp_path: Path):
    path, first = tmp_path / "o.jsonl", ByRow("a", [1.0] * N, [0.0] * M)
    found = measure(path, suite, first, levels=("clean",))
    measure(path, suite, first, levels=("clean",))
    assert first.searches == 3
    more = measure(path, suite, first, ByRow("b", [1.0] * N, [0.0] * M), levels=("clean", "brightness 0.5"))
    assert more[:3] == found
    assert len(more) == 3 * 2 * 2
    assert first.searches == 6


def test_real_methods_tell_noise_from_exemplars(suite: Suite, tmp_path: Path):
    store = mixed(suite, noise_images(M, (3, 8, 8), seed=0))
    names = ("l2", "cosine", "fast", "paper,trigger_steps=2,tuning_min_steps=2")
    retrievers = make_retrievers([Method.parse(name) for name in names], suite.classifier, store)
    found = measure(tmp_path / "o.jsonl", suite, *retrievers, levels=("clean", "gaussian 1"))
    assert len(found) == 3 * 2 * len(names)
    for record in found:
        assert 0 <= record["outranked"] <= M
        assert 0 <= record["bound"] <= 1
        if record["method"] in ("l2", "cosine", "fast") and record["level"] == "clean":
            assert record["outranked"] == 0
