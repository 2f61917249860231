"""Approximate search for every mode: tuned on the index itself, and kept usable by adds and deletes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import tiny_arrays, tiny_classifier
from tests.conftest import network
from tests.test_engine_cli import answers, run
from tmm_engine import Engine, build_index
from tmm_engine.index import ArraySource
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours import approximate
from tmm_engine.index.neighbours.budget import Budget
from tmm_engine.index.progress import silent
from tmm_engine.index.store.manifest import Manifest
from tmm_engine.info import describe_index
from tmm_engine.options import SearchOptions
from tmm_engine.rerank.settings import preset
from tmm_engine.tuning import efforts, usual_factories

IMAGES, LABELS = tiny_arrays(0, 600)
CODE = ("--model", "tests.conftest:network", "--device", "cpu")
TUNED_HEAD = preset("paper").with_settings(["trigger=fixed-patch", "tuning=discriminant"])
MODES: tuple[dict[str, Any], ...] = (
    {},
    {"mode": "robust", "recognition": False},
    {"mode": "cosine", "stretch": True, "recognition": 0.8},
    {"mode": "l2"},
    *({"mode": "tmm", "candidates": 20, "prefilter": name, "config": TUNED_HEAD} for name in ("robust", "union")),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuning") / "digits.idx"
    build_index(ArraySource(IMAGES[:300], LABELS[:300]), path, tiny_classifier(), views=2)
    return path


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "digits.idx"))


def opened(index: Path, **options: Any) -> Engine:
    return Engine.open(index, model=network(), device="cpu", **options)


def searched(index: Path, factory: str) -> None:
    """Let an index be searched so, thoroughly enough to find all; as tuning does it."""
    manifest = Manifest.read(index)
    with opened(index) as engine:
        tuned = engine.tune_neighbours(recall=1.0, factories=[], sample=4)
    effort = [*efforts(factory)][-1]
    tuned = replace(tuned, factory=factory, ef_search=effort.ef_search, nprobe=effort.nprobe, rerank=30)
    replace(manifest, neighbours=factory, tuned=tuned).write(index)
    for kept in (index / "cache").glob("*.faiss*"):  # of what tuning chose, which depends on the machine
        kept.unlink()


def found(index: Path, *modes: dict[str, Any]) -> list[list[list[tuple[str, float]]]]:
    """Ids and scores, in every mode."""
    with opened(index) as engine:
        results = [engine.search(list(IMAGES[400:408]), k=5, **options) for options in modes]
    return [[[(hit.id, hit.score) for hit in result.hits] for result in found] for found in results]


@pytest.mark.parametrize("factory", ["IVF4,SQ8", "HNSW16", pytest.param("IVF4,PQ8", marks=pytest.mark.slow)])
def test_a_thorough_search_answers_in_every_mode_as_the_exact_one(index: Path, factory: str):
    exact = found(index, *MODES)
    searched(index, factory)
    assert found(index, *MODES) == exact
    assert {path.name for path in (index / "cache").glob("*.faiss")} >= {
        f"cosine-{factory.replace(',', '-')}-{column}.faiss" for column in ("copy_feature", "robust_feature")
    }


@pytest.mark.parametrize("factory", ["IVF4,SQ8", "HNSW16"])
def test_rows_that_come_later_are_searched_exactly_beside_it_until_compact(
    index: Path, factory: str, monkeypatch: pytest.MonkeyPatch
):
    noted: list[str] = []
    build = approximate.built
    monkeypatch.setattr(approximate, "built", lambda *given, **how: noted.append(how["column"]) or build(*given, **how))
    searched(index, factory)
    noted.clear()
    found(index, {})
    assert sorted(noted) == ["copy_feature", "robust_feature"]
    with opened(index) as engine:
        engine.add(ArraySource(IMAGES[300:340], LABELS[300:340], ids=[f"later {i}" for i in range(40)]))
        engine.delete(ids=["00000003", "00000007", "00000299", "later 5"])
    noted.clear()
    later = found(index, {})
    assert noted == []
    with opened(index) as engine:
        assert found_by(engine, "later 7") == "later 7"
        assert engine.search(IMAGES[3], k=1).hits[0].id != "00000003"
    fresh = index.parent / "flat.idx"
    shutil.copytree(index, fresh)
    replace(Manifest.read(fresh), neighbours="Flat", tuned=None).write(fresh)
    assert later == found(fresh, {})
    with opened(index) as engine:
        engine.compact()
    noted.clear()
    assert found(index, {}) == later
    assert noted == ["robust_feature", "copy_feature"]


def found_by(engine: Engine, id_: str) -> str:
    return engine.search(engine.exemplar(id_), k=1).hits[0].id


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "PQ4"])
def test_an_index_too_small_for_its_clusters_after_deletions_is_searched_exactly(tmp_path: Path, factory: str):
    path = tmp_path / "x.idx"
    build_index(ArraySource(IMAGES[:300], LABELS[:300]), path, tiny_classifier(), views=1, neighbours=factory)
    with Engine.open(path, model=network(), device="cpu") as engine:
        engine.delete(ids=[str(each) for each in engine.store.ids[12:]])
        for mode in ("robust", "l2", "cosine"):
            result = engine.search(IMAGES[400], k=12, mode=mode)
            assert (len(result.hits), result.backend) == (12, "matrix products, fp32")
    shutil.rmtree(path / "cache")
    with Engine.open(path, model=network(), device="cpu") as engine:
        assert len(engine.search(IMAGES[400], k=12).hits) == 12
    assert describe_index(path)["neighbours"] == f"{factory}, which 12 exemplars cannot train: search is exact"


def test_what_is_tried_and_not_taken_gives_its_memory_back(index: Path, monkeypatch: pytest.MonkeyPatch):
    budget = Budget(1 << 22)
    monkeypatch.setattr(Budget, "beside", lambda *_, **__: budget)
    with Engine.open(index, model=network(), device="cpu", memory="64GiB") as engine:
        engine.search(IMAGES[400], k=1)
        left = budget.left
        factories = ("HNSW32", "HNSW16", "IVF4,Flat")
        _, search = engine._snapshot.tuned(recall=0.5, k=5, factories=factories, sample=20, progress=silent)
        search.drop()
        assert budget.left == left


def test_an_older_version_is_served_by_the_index_of_a_newer(index: Path, monkeypatch: pytest.MonkeyPatch):
    replace(Manifest.read(index), neighbours="HNSW16").write(index)
    with opened(index) as engine:
        engine.delete(ids=["00000003", "00000007"])
    found(index, {})
    monkeypatch.setattr(approximate, "built", lambda *given, **how: pytest.fail("built anew"))
    with opened(index, version=1) as engine:
        assert found_by(engine, "00000003") == "00000003"


def test_the_command_chooses_stores_and_says_what_it_measured(index: Path):
    done = run("tune-neighbours", index, *CODE, "--recall", 0.95, "--sample", 20)
    assert done.exit_code == 0, done.stderr
    tuned = Manifest.read(index).tuned
    assert tuned is not None
    assert tuned.recall_clean >= 0.95
    assert tuned.recall_noise >= 0.95
    assert (tuned.mode, tuned.k, tuned.queries, tuned.exemplars) == ("robust", 10, 20, 300)
    assert done.stdout.strip() == f"{index}: {tuned.sentence()}"
    [said] = answers(run("info", index, "--json"))
    assert (said["neighbours"], said["tuned"]) == (tuned.factory, tuned.sentence())
    [again] = answers(run("tune-neighbours", index, *CODE, "--factory", "HNSW16", "--sample", 20, "--json"))
    assert again["factory"] in ("HNSW16", "Flat")


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"recall": 0.0}, "recall: expected a share"),
        ({"recall": 1.5}, "recall: expected a share"),
        ({"k": 0}, "k: expected a whole number"),
        ({"sample": 0}, "sample: expected a whole number"),
        ({"factories": ["IVF4096,SQ8"]}, "cannot use 'IVF4096,SQ8' for 300 exemplars: it needs 4,096 or more"),
        ({"factories": ["OPQ8"]}, "expected a FAISS factory string"),
    ],
)
def test_what_cannot_be_tuned_changes_nothing(index: Path, asked: dict[str, Any], why: str):
    before = (index / "index.json").read_bytes()
    with opened(index) as engine, pytest.raises(InputError, match=why):
        engine.tune_neighbours(**asked)
    assert (index / "index.json").read_bytes() == before


def test_an_index_in_memory_has_nothing_to_store_it_in():
    engine = Engine.from_arrays(IMAGES[:20], LABELS[:20], tiny_classifier(), views=0)
    with pytest.raises(InputError, match="in memory"):
        engine.tune_neighbours()


@pytest.mark.parametrize(("neighbours", "needed"), [("IVF64,Flat", "64"), ("IVF4,PQ8", "256")])
def test_clusters_that_so_few_cannot_train_are_refused_before_any_work(tmp_path: Path, neighbours: str, needed: str):
    with pytest.raises(InputError, match=f"for 30 exemplars: it needs {needed} or more to train on"):
        build_index(
            ArraySource(IMAGES[:30], LABELS[:30]), tmp_path / "few.idx", tiny_classifier(), neighbours=neighbours
        )
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("exemplars", [1, 100, 1000, 60_000, 1_000_000, 10_000_000])
def test_usual_factories_can_be_trained_without_a_warning(exemplars: int):
    for factory in usual_factories(exemplars):
        if factory.startswith("IVF"):
            assert 39 * int(factory[3:].split(",")[0]) <= exemplars
    assert len(usual_factories(exemplars)) == (1 if exemplars < 156 else 3)


# ---- lists of queries pass the network together


@pytest.mark.parametrize("mode", ["robust", "l2", "cosine"])
def test_an_answer_depends_on_the_others_by_rounding_and_alone_not_at_all(index: Path, mode: str):
    queries = list(IMAGES[500:540])
    with opened(index) as engine:
        single = [engine.search(query, k=5, mode=mode) for query in queries]
        alone = engine.search(queries, k=5, mode=mode, alone=True)
        together = engine.search(queries, k=5, mode=mode)
    for one, same, batched in zip(single, alone, together, strict=True):
        assert [(hit.id, hit.score) for hit in one.hits] == [(hit.id, hit.score) for hit in same.hits]
        scores, others = (np.array([hit.score for hit in own.hits]) for own in (one, batched))
        np.testing.assert_allclose(others, scores, atol=1e-5 * max(1.0, np.abs(scores).max()))
        assert one.predicted_label == batched.predicted_label


def test_alone_is_refused_where_it_changes_nothing(index: Path):
    refused = run("search", index, *CODE, "--id", "00000003", "--mode", "tmm", "--alone")
    assert refused.exit_code == 2
    assert "--alone has no effect with --mode tmm" in refused.stderr
    with pytest.raises(InputError, match="alone has no effect in mode 'tmm'"):
        SearchOptions(mode="tmm", alone=True)
    asked = ("search", index, *CODE, "--id", "00000003", "--id", "00000005", "--json")
    both = [answers(run(*asked, *more)) for more in ((), ("--alone",))]
    one, other = ([[hit["id"] for hit in answer["hits"]] for answer in own] for own in both)
    assert one == other
