"""What benchmarks compare: methods by name, scores, ranks, and the suite that draws exemplars and queries."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import tiny_arrays, tiny_classifier
from tmm_engine import Engine
from tmm_engine.bench.methods import Method
from tmm_engine.bench.retrievers import TmmRetriever, rank_of, scores_of_all, top
from tmm_engine.bench.suite import Suite
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.rerank.settings import (
    Blend,
    Blending,
    GlobalRecipe,
    IndexTrigger,
    QueryTrigger,
    Score,
    TmmConfig,
    TunedHead,
    View,
    preset,
)
from tmm_engine.rerank.tmm import TmmNN

BY_STEPS = ",tuning_min_steps=4,tuning_batch=16"


def quick(name: str) -> str:
    """A method with few steps of whatever it does by steps."""
    closed = name.startswith("fast") or "tuning=discriminant" in name
    return f"{name},trigger_steps=3{'' if closed else BY_STEPS}"


N = 40


def make_suite(*, exemplars: int = N, seed: int = 0) -> Suite:
    images, labels = tiny_arrays(1)
    return Suite.load(
        ArraySource(images, labels, name="tiny"), tiny_classifier(), exemplars=exemplars, seed=seed, data_set="a set"
    )


@pytest.fixture(scope="module")
def suite() -> Suite:
    return make_suite()


@pytest.fixture(scope="module")
def query() -> np.ndarray:
    return (tiny_arrays(2)[0][0] / np.float32(255)).astype(np.float32)


# --------------------------------------------------------------------------------------------- methods


def test_methods_are_read_from_their_names():
    assert Method.parse("l2") == Method("l2", Metric.L2, stretch=False, recognition=None, config=None)
    assert Method.parse("cosine,stretch=true").stretch
    assert Method.parse("paper").config == TmmConfig()
    changed = Method.parse("paper,blend=added,score=logit")
    assert changed.config == TmmConfig(blending=Blending(formula=Blend.ADDED), head=TunedHead(score=Score.LOGIT))
    assert changed.settings()["blend"] == "added"
    assert Method.parse("cosine,stretch=true").settings() == {"stretch": True}
    both = Method.parse("cosine,stretch=true,recognition=0.8")
    assert (both.metric, both.stretch, both.recognition, both.config) == (Metric.COSINE, True, 0.8, None)
    assert both.settings() == {"stretch": True, "recognition": 0.8}
    assert Method.parse("l2,recognition=0.9").settings() == {"stretch": False, "recognition": 0.9}
    assert Method.parse("l2,recognition=none").settings() == {"stretch": False}
    recognising = Method.parse("paper,recognition=0.7")
    assert (recognising.recognition, recognising.settings()["recognition"]) == (None, 0.7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosin", "did you mean .*cosine"),
        ("cosine,blend=added", "cosine,blend=added: a baseline takes stretch and recognition, got blend=added"),
        ("cosine,stretch=true,fusion=4,seed=1", "takes stretch and recognition, got fusion=4, seed=1$"),
        ("cosine,recognition=0", r"recognition: expected a finite value in \[0\.01, 1\], got 0"),
        ("cosine,recognition=1.1", r"recognition: expected a finite value in \[0\.01, 1\], got 1\.1"),
        ("l2,recognition=nan", "recognition: expected .* got nan"),
        ("l2,recognition=high", "recognition: cannot read 'high'"),
        ("cosine,stretch=perhaps", "stretch: cannot read 'perhaps'"),
        ("paper,blur=1", "unknown TMM setting"),
        ("paper,blend=mixed", "unknown blend"),
    ],
)
def test_unknown_methods_are_refused(text: str, message: str):
    with pytest.raises(InputError, match=message):
        Method.parse(text)


def test_two_methods_of_one_name_are_refused(suite: Suite):
    with pytest.raises(InputError, match="different methods, got l2, l2"):
        suite.retrievers([Method.parse("l2"), Method.parse("l2")])


# --------------------------------------------------------------------------------------------- scores


def stretched(images: np.ndarray) -> np.ndarray:
    low, high = images.min(axis=(-3, -2, -1), keepdims=True), images.max(axis=(-3, -2, -1), keepdims=True)
    return (images - low) / (high - low)


def test_baselines_score_as_written_down(suite: Suite, query: np.ndarray):
    def features(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return suite.classifier.features(torch.tensor(pixels)).double().numpy()

    images, dark = suite.store.images(np.arange(N)) / np.float32(255), query * np.float32(0.5)
    l2, cosine, stretching = suite.retrievers([Method.parse(name) for name in ("l2", "cosine", "cosine,stretch=true")])
    distances = np.linalg.norm(features(images) - features(dark[None]), axis=1)
    np.testing.assert_allclose(l2.scores(dark), -distances, rtol=1e-4)
    for retriever, one, all_ in ((cosine, dark, images), (stretching, stretched(dark), stretched(images))):
        x, exemplars = features(one[None])[0], features(all_)
        expected = exemplars @ x / np.linalg.norm(exemplars, axis=1) / np.linalg.norm(x)
        np.testing.assert_allclose(retriever.scores(dark), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["l2", "cosine"])
@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize("recognition", [0.01, 0.5, 0.8, 1.0])
def test_baselines_with_recognition_are_the_engines(suite: Suite, query: np.ndarray, *, mode, stretch, recognition):
    [baseline] = suite.retrievers([Method.parse(f"{mode},stretch={stretch},recognition={recognition}")])
    [without] = suite.retrievers([Method.parse(f"{mode},stretch={stretch}")])
    images, ids = suite.store.images(np.arange(N)), suite.store.ids
    engine = Engine.from_arrays(
        images,
        suite.store.labels,
        suite.classifier,
        ids=ids.tolist(),
        views=0,  # what ranks recognises, as in the bench
        global_trigger=GlobalRecipe(
            view=View(stretch=True), trigger=QueryTrigger(steps=2), blending=Blending(intensity=0.1)
        ),
    )
    noise = np.random.default_rng(0).normal(scale=0.05, size=(2, *query.shape))
    copies = (images[[3, 7]] / 255 + noise).clip(0, 1).astype(np.float32)
    differences = []
    for image in (query, *copies):
        result = engine.search(image, k=N, mode=mode, stretch=stretch, recognition=recognition)
        scores = baseline.scores(image)
        by_id = {hit.id: hit.score for hit in result.hits}
        np.testing.assert_allclose(scores, [by_id[id_] for id_ in ids], rtol=1e-3, atol=2e-3)
        differences.append(np.abs(scores - without.scores(image)).max())
    assert (max(differences) > 1e-2) == (recognition > 0.01)


@pytest.mark.parametrize("mode", ["l2", "cosine"])
def test_of_duplicates_a_baseline_recognises_none(mode: str):
    images = np.repeat(tiny_arrays(1)[0][:20], 2, axis=0)
    source = ArraySource(images, np.zeros(40, dtype=np.int64), name="twice")
    twice = Suite.load(source, tiny_classifier(), exemplars=40, seed=0, data_set="twice")
    with_, without = twice.retrievers([Method.parse(name) for name in (f"{mode},recognition=0.8", mode)])
    noise = np.random.default_rng(0).normal(scale=0.05, size=images[0].shape)
    for image in (images[6] / 255, (images[6] / 255 + noise).clip(0, 1)):
        scores = without.scores(image.astype(np.float32))
        assert np.abs(with_.scores(image.astype(np.float32)) - scores).max() < 0.01 * np.ptp(scores)


def test_tmm_scores_are_the_rerankers_in_row_order(suite: Suite, query: np.ndarray):
    method = Method.parse(quick("paper"))
    [retriever] = suite.retrievers([method])
    assert method.config is not None
    ranking = TmmNN(suite.classifier, suite.store).rank(torch.tensor(query), k=N, config=method.config)
    np.testing.assert_array_equal(retriever.scores(query)[ranking.rows], ranking.scores)
    assert not np.array_equal(retriever.scores(query, seed=1), retriever.scores(query))


def test_scores_of_all_equal_each_ones_own(suite: Suite, query: np.ndarray):
    names = ["paper,score=logit", "l2", "paper", "fast,fusion=1", "paper,tuning=discriminant", "fast", "cosine"]
    methods = [Method.parse(name if name in ("l2", "cosine") else quick(name)) for name in names]
    retrievers = suite.retrievers(methods)
    together = {retriever.name: scores for retriever, scores in scores_of_all(retrievers, query)}
    assert together.keys() == {method.name for method in methods}
    for retriever in retrievers:
        np.testing.assert_array_equal(together[retriever.name], retriever.scores(query))
        assert together[retriever.name].shape == (N,)
        assert not np.isnan(together[retriever.name]).any()
    assert len({scores.tobytes() for scores in together.values()}) == len(methods)


def test_methods_with_the_same_global_trigger_share_it(suite: Suite):
    names = ["fast", "fast,fusion=0", "fast,intensity=0.2", "paper"]
    found = suite.retrievers([Method.parse(quick(name)) for name in names])
    one, same, other, own = (retriever.tmm for retriever in found if isinstance(retriever, TmmRetriever))
    assert one is same
    assert other is not one
    assert one.global_trigger is not None
    assert other.global_trigger is not None
    assert (one.global_trigger.intensity, other.global_trigger.intensity) == (0.1, 0.2)
    assert own.global_trigger is None
    assert isinstance(preset("fast").trigger, IndexTrigger)


def test_a_query_that_is_an_exemplar_finds_itself(suite: Suite):
    image = (suite.store.images(np.array([7]))[0] / np.float32(255)).astype(np.float32)
    for retriever in suite.retrievers([Method.parse(name) for name in ("l2", "cosine", quick("fast"))]):
        assert rank_of(retriever.scores(image), suite.store.ids, 7) == 0


@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.randoms(use_true_random=False), st.data())
def test_ranks_are_places_in_the_order_of_scores_then_ids(values, random, data):
    ids = np.array(random.sample([f"id {number:02}" for number in range(len(values))], len(values)), dtype=object)
    scores = np.array(values, dtype=np.float64)
    order = sorted(range(len(values)), key=lambda row: (-scores[row], ids[row]))
    assert top(scores, ids, len(values)).tolist() == order
    assert [rank_of(scores, ids, row) for row in order] == list(range(len(values)))
    out = data.draw(st.sampled_from(order))
    assert top(scores, ids, len(values) - 1, without=out).tolist() == [row for row in order if row != out]


# --------------------------------------------------------------------------------------------- suite


def test_a_suite_is_a_seeded_subset_with_its_features(suite: Suite):
    images, labels = tiny_arrays(1)
    rows = np.array([int(id_) for id_ in suite.store.ids])
    assert len(set(rows)) == N < len(images)
    np.testing.assert_array_equal(suite.store.images(np.arange(N)), images[rows])
    np.testing.assert_array_equal(suite.store.labels, labels[rows])
    with torch.inference_mode():
        features = suite.classifier.features(torch.tensor(images[rows]) / 255.0).numpy()
    np.testing.assert_allclose(suite.store.features(np.arange(N)), features, rtol=1e-4, atol=1e-5)
    assert make_suite().store.ids.tolist() == suite.store.ids.tolist()
    assert make_suite(seed=1).store.ids.tolist() != suite.store.ids.tolist()
    assert len(make_suite(exemplars=10_000).store) == len(images)


def test_queries_of_a_larger_run_begin_with_those_of_a_smaller(suite: Suite):
    five, nine = suite.queries(5), suite.queries(9)
    np.testing.assert_array_equal(nine[:5], five)
    np.testing.assert_array_equal(suite.queries(4, skip=5), nine[5:])
    assert sorted(suite.queries(N)) == list(range(N))
    with pytest.raises(InputError, match=f"at most {N} queries.*got 30 \\+ 11"):
        suite.queries(11, skip=30)


def test_a_suite_needs_labels(tmp_path: Path):
    images, _ = tiny_arrays(1)
    with pytest.raises(InputError, match="expected labelled images"):
        Suite.load(ArraySource(images, name="unlabelled"), tiny_classifier(), exemplars=10)
    broken = tmp_path / "photos" / "class" / "broken.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no picture")
    with pytest.raises(InputError, match="no image could be read"):
        Suite.load(FolderSource(tmp_path / "photos"), tiny_classifier(), exemplars=10)


def test_records_belong_to_exemplars_seed_and_model(suite: Suite, tmp_path: Path):
    methods = [Method.parse("l2")]
    with suite.records(tmp_path / "r.jsonl", "robustness", methods, ("query",), k=3) as records:
        records.append({"query": "a"})
    with suite.records(tmp_path / "r.jsonl", "robustness", [Method.parse("cosine")], ("query",), k=3) as records:
        assert records.done(query="a")
    for other, k, name in ((make_suite(seed=1), 3, "seed"), (make_suite(exemplars=9), 3, "exemplars"), (suite, 4, "k")):
        with pytest.raises(InputError, match=f"expected {name} "):
            other.records(tmp_path / "r.jsonl", "robustness", methods, ("query",), k=k)


def recorded(path: Path, suite: Suite, name: str, **changed: object) -> None:
    """A file that an earlier version of the code has begun: one method, its settings changed (None: left out)."""
    suite.records(path, "robustness", [Method.parse(name)], ("query",)).close()
    line = json.loads(path.read_text())
    settings = line["settings"]["methods"][name]
    for setting, value in changed.items():
        assert setting in settings
        settings.pop(setting) if value is None else settings.update({setting: value})
    path.write_text(json.dumps(line) + "\n")


def test_records_from_before_a_setting_was_there_go_on(suite: Suite, tmp_path: Path):
    for name in ("paper", "paper,fusion=2"):
        recorded(tmp_path / f"{name}.jsonl", suite, name, recognition=None)
        assert '"recognition"' not in (tmp_path / f"{name}.jsonl").read_text()
        with suite.records(tmp_path / f"{name}.jsonl", "robustness", [Method.parse(name)], ("query",)) as records:
            records.append({"query": "a"})
        assert '"recognition": null' in (tmp_path / f"{name}.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("fast", {"recognition": 0.123}),
        ("paper", {"recognition": 0.5}),
        ("paper,recognition=0.5", {"recognition": None}),
        ("cosine,recognition=0.5", {"recognition": 0.4}),
        ("cosine,recognition=0.5", {"recognition": None}),
        ("paper", {"trigger.lr": 0.5, "recognition": None}),
    ],
)
def test_records_of_a_preset_that_has_changed_are_refused(suite: Suite, tmp_path: Path, name: str, changed: dict):
    path = tmp_path / "r.jsonl"
    recorded(path, suite, name, **changed)
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"'{name}' was measured with .*, is now .*; write to another file"):
        suite.records(path, "robustness", [Method.parse("l2"), Method.parse(name)], ("query",))
    suite.records(path, "robustness", [Method.parse("l2")], ("query",)).close()  # others may join
    assert path.read_bytes() == before
