"""Attacks aimed at the gate: towards a wrong exemplar, within their bound, through all that a method looks at."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.digits import IMAGES, LABELS, make_classifier
from tmm_engine.bench.attack import pgd
from tmm_engine.bench.benchmarks.gate import KEY, UNSEEN, VERY_IMAGE, Query, measure_gate
from tmm_engine.bench.methods import Method
from tmm_engine.bench.records import Record, RecordFile, read_records
from tmm_engine.bench.report import write_report
from tmm_engine.bench.retrievers import Retriever
from tmm_engine.bench.suite import Suite
from tmm_engine.index import ArraySource
from tmm_engine.index.errors import InputError

N, K = 60, 5
METHODS = ("cosine", "robust,views=1")
BOUNDS = (0.5, 8.0)  # the second is as far as the wrong exemplar itself


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite.load(ArraySource(IMAGES[:N], LABELS[:N], name="digits"), make_classifier(), exemplars=N, seed=0)


@pytest.fixture(scope="module")
def retrievers(suite: Suite) -> list[Retriever]:
    return suite.retrievers([Method.parse(name) for name in METHODS])


def image_of(number: int) -> np.ndarray:
    return (IMAGES[number][None] / np.float32(255)).astype(np.float32)


def queries(suite: Suite) -> list[Query]:
    rows = suite.queries(1)
    pixels = suite.store.images(rows).astype(np.float32) / np.float32(255)
    own = [
        Query(VERY_IMAGE, str(suite.store.ids[row]), image, int(suite.store.labels[row]), int(row))
        for row, image in zip(rows, pixels, strict=True)
    ]
    return [*own, Query(UNSEEN, "other", image_of(N), int(LABELS[N]))]


@pytest.fixture(scope="module")
def measured(suite: Suite, retrievers: list[Retriever], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate") / "gate.jsonl"
    with suite.records(path, "gate", [Method.parse(name) for name in METHODS], KEY, k=K) as file:
        measure_gate(retrievers, queries(suite), suite.store, file, bounds=BOUNDS, k=K)
    return path


def records_of(path: Path) -> list[Record]:
    return read_records(path).records


def test_every_query_meets_every_bound_and_none_first(measured: Path) -> None:
    found = records_of(measured)
    assert len(found) == 2 * len(METHODS) * (1 + len(BOUNDS))
    for record in found:
        if record["bound"] == 0:
            assert record["first"] and record["overlap"] == 1.0
            assert not record["taken"]
        assert (record["taken"] is None) == (record["method"] == "cosine")
        assert not record["taken"] or record["mistaken"]


def test_the_target_is_of_another_class_and_comes_nearer(suite: Suite, measured: Path) -> None:
    classes = dict(zip(suite.store.ids.tolist(), suite.store.labels.tolist(), strict=True))
    labels = {query.name: query.label for query in queries(suite)}
    found = records_of(measured)
    assert all(classes[record["target"]] != labels[record["query"]] for record in found)
    before = [record["rank"] for record in found if record["bound"] == 0]
    after = [record["rank"] for record in found if record["bound"] == max(BOUNDS)]
    assert min(before) > 0
    assert np.mean(np.array(after) == 0) > 0.5


def test_it_stays_within_its_bound_and_lessens_the_distance(retrievers: list[Retriever]) -> None:
    image, goal = image_of(0), torch.from_numpy(image_of(1))[None]
    for retriever in retrievers:
        with torch.no_grad():
            towards = retriever.embedding(goal)
        moved = pgd(image, np.random.default_rng(0), retriever.embedding, bound=1.0, towards=towards)
        assert np.linalg.norm(moved - image) <= 1.0 + 1e-5
        assert moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6
        with torch.no_grad():
            both = retriever.embedding(torch.from_numpy(np.stack([image, moved])))
        before, after = (both - towards).norm(dim=1).tolist()
        assert after < before


def test_a_rerun_goes_on_and_is_the_same(
    suite: Suite, retrievers: list[Retriever], measured: Path, tmp_path: Path
) -> None:
    again = tmp_path / "gate.jsonl"
    lines = measured.read_bytes().splitlines(keepends=True)
    again.write_bytes(b"".join(lines[:-2]))
    with RecordFile.open(again, read_records(measured).settings, KEY, ()) as file:
        measure_gate(retrievers, queries(suite), suite.store, file, bounds=BOUNDS, k=K)
    assert again.read_bytes() == measured.read_bytes()


def test_without_a_wrong_exemplar_there_is_nothing_to_move_to(
    suite: Suite, retrievers: list[Retriever], tmp_path: Path
) -> None:
    same = Suite.load(ArraySource(IMAGES[:N], np.zeros(N, int)), make_classifier(), exemplars=N)
    with (
        RecordFile.open(tmp_path / "none.jsonl", {}, KEY, ()) as file,
        pytest.raises(InputError, match="another class"),
    ):
        measure_gate(retrievers, [Query(UNSEEN, "other", image_of(N), 0)], same.store, file, bounds=BOUNDS, k=K)


def test_the_report_shows_both_jobs(measured: Path, tmp_path: Path) -> None:
    write_report(measured.parent, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert VERY_IMAGE in text and UNSEEN in text and "passed off" in text
