"""Held-out queries under noise: records are what they say, reruns go on, mode robust is measured as it searches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.digits import IMAGES, LABELS, make_classifier
from tmm_engine import Engine
from tmm_engine.bench.benchmarks.unseen import KEY, measure_unseen
from tmm_engine.bench.methods import Method
from tmm_engine.bench.noise import parse
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.report import write_report
from tmm_engine.bench.suite import Suite
from tmm_engine.index import ArraySource
from tmm_engine.index.errors import InputError

N, Q = 120, 3
NAMES = (
    "cosine",
    "cosine,stretch=true",
    "robust,views=1",
    "robust,views=2,recognition=none",
    "layer,recogniser=pixels",
)
NOISE = [parse("brightness 0.5"), parse("gaussian 1")]
QUERIES = (IMAGES[N : N + Q, None] / np.float32(255)).astype(np.float32)


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite.load(ArraySource(IMAGES[:N], LABELS[:N], name="digits"), make_classifier(), exemplars=N, seed=0)


def measure(suite: Suite, path: Path, *names: str, queries: int = Q, k: int = 5) -> list[dict]:
    methods = [Method.parse(name) for name in names]
    with suite.records(path, "unseen", methods, KEY, k=k) as file:
        measure_unseen(
            suite.retrievers(methods),
            QUERIES[:queries],
            LABELS[N : N + queries],
            suite.store,
            file,
            perturbations=NOISE,
            classifier=suite.classifier,
            k=k,
        )
        return [
            file.find(query=q, perturbation=p, method=m)
            for q in range(queries)
            for p in ("clean", "gaussian 1")
            for m in names
        ]


@pytest.fixture(scope="module")
def measured(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unseen") / "unseen.jsonl"
    measure(suite, path, *NAMES)
    return path


def test_a_record_for_every_query_perturbation_and_method(suite: Suite, measured: Path):
    found = measure(suite, measured, *NAMES)
    assert None not in found
    for record in found:
        assert record["overlap"] == 1.0 or record["family"] != "clean"
        assert 0.0 <= record["overlap"] <= 1.0
        assert 0.0 <= record["label_precision"] <= 1.0
        recognises = record["method"] == "robust,views=1"
        assert (record["recognised"] is None) != recognises
        assert ("neighbours" in record) == (record["family"] == "clean")


def test_overlap_and_labels_are_those_of_the_neighbours(suite: Suite, measured: Path):
    [clean, *_] = measure(suite, measured, "cosine", queries=1)
    rows = [int(np.flatnonzero(suite.store.ids == id_)[0]) for id_ in clean["neighbours"]]
    assert clean["label_precision"] == (suite.store.labels[rows] == LABELS[N]).mean()


def test_darkness_changes_nothing_for_those_who_stretch(suite: Suite, measured: Path):
    with RecordFile.open(measured, {}, KEY, ()) as file:
        for method in ("robust,views=1", "cosine,stretch=true"):
            overlaps = [file.find(query=q, perturbation="brightness 0.5", method=method)["overlap"] for q in range(Q)]
            assert np.mean(overlaps) > 0.95


def test_a_rerun_measures_nothing_again_and_another_method_joins(suite: Suite, measured: Path):
    before = measured.read_bytes()
    measure(suite, measured, *NAMES)
    assert measured.read_bytes() == before
    measure(suite, measured, *NAMES, "l2")
    assert measured.read_bytes().startswith(before.splitlines()[0])
    assert len(measured.read_bytes()) > len(before)


def test_it_is_reported(suite: Suite, measured: Path, tmp_path: Path):
    page, *_ = write_report(measured.parent, tmp_path)
    text = page.read_text()
    assert "## Held-out queries under noise: digits" in text
    assert "| robust,views=1 | 3 |" in text


@pytest.mark.parametrize("k", [0, N + 1])
def test_k_is_of_the_exemplars(suite: Suite, tmp_path: Path, k: int):
    with pytest.raises(InputError, match=f"expected k from 1 to {N}"):
        measure(suite, tmp_path / "u.jsonl", "cosine", k=k)


# ------------------------------------------------------------------------------------- the mode robust


def test_the_slow_scores_are_those_of_the_engine(suite: Suite):
    [retriever] = suite.retrievers([Method.parse("robust,views=2")])
    engine = Engine.from_arrays(IMAGES[:N], LABELS[:N], make_classifier(), views=2)
    for query in (QUERIES[0], (0.5 * IMAGES[7][None] / np.float32(255)).astype(np.float32)):
        found = engine.search(query, k=N)
        scores = retriever.scores(query)
        by_row = {int(hit.id): hit.score for hit in found.hits}
        others = np.delete(np.arange(N), int(found.hits[0].id))  # which may be first whatever its score
        assert int(found.hits[0].id) == int(scores.argmax())
        np.testing.assert_allclose([by_row[row] for row in others], scores[others], atol=1e-4)
        assert (retriever.recognised(query).share >= 0.5) == (found.recognised_as is not None)


def test_what_it_ranks_by_can_be_attacked(suite: Suite):
    [retriever] = suite.retrievers([Method.parse("robust,views=1")])
    pixels = torch.from_numpy(QUERIES[:1]).requires_grad_()
    (gradient,) = torch.autograd.grad(retriever.embedding(pixels).sum(), pixels)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("robust,stretch=true", "robust,stretch=true: expected views, recogniser and recognition, got stretch"),
        ("robust,views=11", "views: expected 1 to 10, got '11'"),
        ("robust,views=x", "views: expected 1 to 10, got 'x'"),
        ("robust,recognition=2", "recognition: expected a finite value"),
        ("layer,recogniser=a b", "expected a layer such as"),
        ("robst", r"unknown method 'robst' \(did you mean 'robust'\?\)"),
    ],
)
def test_other_names_are_refused(text: str, message: str):
    with pytest.raises(InputError, match=message):
        Method.parse(text)


def test_settings_go_into_the_records():
    assert Method.parse("robust").settings() == {"views": 4, "recogniser": None, "recognition": 0.7}
    assert Method.parse("layer,recogniser=pixels").settings() == {"views": 1, "recogniser": "pixels:8x8"}
