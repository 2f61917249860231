"""Sets of classes and what is trusted, measured: records are what the engine answers, figures are what records say."""

from pathlib import Path

import numpy as np
import pytest

from tests.digits import IMAGES, LABELS, make_classifier
from tmm_engine import Engine
from tmm_engine.bench.benchmarks.classify import KEY, OURS, OWN, SOFTMAX, VOTES, figures, measure_classify
from tmm_engine.bench.loading import HeldOut
from tmm_engine.bench.noise import parse
from tmm_engine.bench.records import Record
from tmm_engine.bench.report import write_report
from tmm_engine.bench.selective import binomial_bounds, selective
from tmm_engine.bench.suite import Suite
from tmm_engine.index import ArraySource
from tmm_engine.index.errors import InputError

N, QUERIES, HELD = 60, 6, 30


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    path = tmp_path_factory.mktemp("classify") / "classify.jsonl"
    suite = Suite.load(ArraySource(IMAGES[:N], LABELS[:N], name="digits"), make_classifier(), exemplars=N)
    images = (IMAGES[N : N + QUERIES + HELD, None] / np.float32(255)).astype(np.float32)
    held = HeldOut(suite, "more digits", None, images, LABELS[N : N + QUERIES + HELD])
    for _ in range(2):  # the second finds all that there is to measure
        with suite.records(path, "classify", [], KEY, k=3) as records:
            measure_classify(held, records, perturbations=[parse("blur 1")], queries=QUERIES, noisy=4, k=3)
            found = records.records
    return path, found


def test_every_query_has_a_record_of_every_method(measured: tuple[Path, list[Record]]):
    _, records = measured
    for method in (OURS, OWN, "cosine", VOTES, SOFTMAX):
        own = [(record["perturbation"], record["query"]) for record in records if record["method"] == method]
        assert own == [("clean", query) for query in range(QUERIES)] + [("blur 1", query) for query in range(4)]
    sets = [record for record in records if record["p_right"] is not None]
    assert all(0 <= record["p_right"] <= 1 for record in sets)
    assert all(record["size_01"] >= record["size_05"] >= record["size_10"] for record in sets)
    assert {record["method"] for record in sets} == {OURS, OWN, "cosine"}


def test_mode_robust_is_measured_as_it_answers(measured: tuple[Path, list[Record]]):
    _, records = measured
    with Engine.from_arrays(IMAGES[:N, None], LABELS[:N], make_classifier()) as engine:
        held = ArraySource(IMAGES[N + QUERIES :][:HELD, None], LABELS[N + QUERIES :][:HELD])
        for method in (OURS, "cosine"):
            engine.calibrate(held, mode=method, k=3)
            answers = engine.classify([*IMAGES[N : N + QUERIES, None]], mode=method, k=3)
            own = [record for record in records if record["method"] == method and record["family"] == "clean"]
            assert [record["trust"] for record in own] == pytest.approx([one.credibility for one in answers])
            right = LABELS[N : N + QUERIES].tolist()
            assert [record["correct"] for record in own] == [
                one.label == label for one, label in zip(answers, right, strict=True)
            ]


def test_figures_are_counts_of_records(measured: tuple[Path, list[Record]], tmp_path: Path):
    path, records = measured
    found = figures(records)
    clean = [record for record in records if record["method"] == OURS and record["family"] == "clean"]
    assert found["coverage_10"] == np.mean([record["p_right"] > 0.1 for record in clean])
    assert {"coverage_01", "coverage_05", "accuracy_90", "accuracy_90_softmax"} <= set(found)
    assert found["coverage_05_interval"][0] <= found["coverage_05"] <= found["coverage_05_interval"][1]
    page = write_report(path.parent, tmp_path / "report")[0].read_text()
    assert "Classes with a measure of doubt" in page
    assert "robust, leave-one-out" in page


def test_selective_keeps_what_is_trusted_most():
    trust, correct = np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, True, False, False])
    assert selective(trust, correct, np.arange(4), coverage=0.5).estimate == 1.0
    assert selective(trust, correct, np.arange(4), coverage=1.0).estimate == 0.5
    assert selective(np.ones(4), correct, np.arange(4), coverage=0.5).estimate == 0.5  # ties count in parts
    with pytest.raises(InputError, match="coverage above 0"):
        selective(trust, correct, np.arange(4), coverage=0.0)


def test_bounds_hold_most_of_a_binomial():
    low, high = binomial_bounds(0.9, 500)
    shares = np.random.default_rng(0).binomial(500, 0.9, 20_000) / 500
    assert 0.985 < ((shares >= low) & (shares <= high)).mean() < 0.996
