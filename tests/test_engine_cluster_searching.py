"""Searches over shards in workers of a Ray cluster answer as one machine does, or say what they did not see."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.conftest import SHAPE, classifier_of, network
from tmm_engine import Engine, build_index
from tmm_engine.cluster import shards
from tmm_engine.cluster.searching import cut
from tmm_engine.index import ArraySource
from tmm_engine.index.errors import IndexStateError, InputError
from tmm_engine.rerank.plan import Plan

COUNT = 1300

FAST = {"mode": "tmm", "config": "fast"}
SEARCHES: dict[str, dict[str, Any]] = {
    "robust": {"mode": "robust"},
    "l2": {"mode": "l2", "recognition": 0.8},
    "cosine": {"mode": "cosine", "stretch": True},
    "paper": {"mode": "tmm"},
    "candidates": {"mode": "tmm", "candidates": 40},
    "fast": FAST,
    "fast candidates": FAST | {"candidates": 700},
    "where": {"mode": "robust", "where": "page % 3 = 1"},
    "paper where": {"mode": "tmm", "where": "page % 3 = 1"},
    "explain": {"mode": "cosine", "explain": True},
}


def images_of(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    images[7::50] = images[0]  # ties, which ids break, in all shards
    return images


def test_shards_are_cut_where_batches_are() -> None:
    assert [*cut(1300, 2, 512)] == [(0, 1024), (1024, 1300)]
    assert [*cut(100, 4, 512)] == [(0, 100)]
    assert [*cut(3000, 3, 10)] == [(0, 1000), (1000, 2000), (2000, 3000)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded") / "x.idx"
    build_index(exemplars(), path, classifier_of(network()), views=2, global_trigger="fast")
    return path


def exemplars() -> ArraySource:
    return ArraySource(images_of(COUNT, 0), np.arange(COUNT) % 4, metadata={"page": [*range(COUNT)]})


@pytest.fixture(scope="module")
def alone(index: Path) -> Iterator[Engine]:
    with Engine.open(index, model=network()) as engine:
        yield engine


@pytest.fixture(scope="module")
def together(ray: ModuleType, index: Path) -> Iterator[Engine]:
    with Engine.open(index, model=network(), ray=True) as engine:
        yield engine


def hits(result: Any) -> list[tuple[str, float, float | None]]:
    return [(hit.id, hit.score, hit.confidence) for hit in result.hits]


def same(found: list[Any], expected: list[Any], *, exactly: bool) -> None:
    for one, two in zip(found, expected, strict=True):
        assert [hit[0] for hit in hits(one)] == [hit[0] for hit in hits(two)]
        if exactly:
            assert hits(one) == hits(two)
        np.testing.assert_allclose([hit[1] for hit in hits(one)], [hit[1] for hit in hits(two)], rtol=1e-4, atol=1e-5)
        assert one.complete
        assert (one.scored, one.exemplars, one.notes, one.recognised_as) == (
            two.scored,
            two.exemplars,
            two.notes,
            two.recognised_as,
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
def test_answers_are_those_of_one_machine(alone: Engine, together: Engine, name: str) -> None:
    queries = [*images_of(3, 1), images_of(COUNT, 0)[7], images_of(COUNT, 0)[1200]]
    expected = alone.search(queries, k=30, **SEARCHES[name])
    same(together.search(queries, k=30, **SEARCHES[name]), expected, exactly=not {"where", "fast"} & {*name.split()})


@pytest.mark.slow
@pytest.mark.parametrize("config", ["paper", "fast"])
def test_scores_of_more_than_can_be_held(
    alone: Engine, together: Engine, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Plan.draw
    monkeypatch.setattr(Plan, "draw", lambda *given: replace(draw(*given), streamed=True))
    told: list[tuple[str, int, int]] = []
    queries: list[Any] = [*images_of(2, 1)]
    options = {"k": 20, "mode": "tmm", "config": config}
    found = together.search(queries, **options, progress=lambda *given: told.append(given))
    same(found, alone.search(queries, **options), exactly=config == "paper")
    assert config == "fast" or ("triggering exemplars", COUNT, COUNT) in told


def processes(engine: Engine) -> list[int]:
    import ray

    held = engine._snapshot.searcher._view.shards._held
    return [ray.get(own.actor.process.remote()) for own in held]


@pytest.mark.slow
def test_a_lost_shard_is_loaded_again(alone: Engine, together: Engine) -> None:
    query = images_of(1, 1)[0]
    for process in processes(together):
        os.kill(process, signal.SIGKILL)
        same([together.search(query, mode="robust")], [alone.search(query, mode="robust")], exactly=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"mode": "robust"}, {"mode": "tmm"}])
def test_what_cannot_be_seen_is_said(
    index: Path, alone: Engine, together: Engine, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, first = images_of(1, 1)[0], 1024
    with monkeypatch.context() as patch:
        patch.setattr(shards, "RELOAD_SECONDS", 0.0)
        os.kill(processes(together)[0], signal.SIGKILL)
        found = together.search(query, k=20, **options)
        both, rest = (together.search(query, where=f"page >= {page}", **options) for page in (first - 9, first))
    assert not found.complete
    assert not both.complete
    assert both.notes[0].startswith("incomplete: 9 of 285")
    assert both.notes[1].startswith("restricted to the 285 of 1,300")
    same([rest], [alone.search(query, where=f"page >= {first}", **options)], exactly=options["mode"] != "tmm")
    assert found.to_json()["complete"] is False
    assert (found.scored, found.exemplars) == (COUNT - first, COUNT)
    assert "1,024 of 1,300 exemplars were not seen" in found.notes[0]
    assert "00000000 to 00001023 (no worker that could hold them was ready within 0 s)" in found.notes[0]
    expected = alone.search(query, k=20, where=f"id >= '{first:08}'", **options)
    assert [hit[0] for hit in hits(found)] == [hit[0] for hit in hits(expected)]
    with pytest.MonkeyPatch.context() as patch:
        view = together._snapshot.searcher._view
        for held in view.shards._held:
            view.shards._wait(held, 120.0)
        same([together.search(query, k=20, **options)], [alone.search(query, k=20, **options)], exactly=True)


@pytest.mark.slow
def test_a_shard_that_was_given_up_in_one_search_is_there_in_the_next(alone: Engine, together: Engine) -> None:
    held = together._snapshot.searcher._view.shards._held[0]
    assert held.starting is None
    held.missing = "its worker was lost 3 times in a search"
    query = images_of(1, 1)[0]
    same([together.search(query, mode="l2")], [alone.search(query, mode="l2")], exactly=True)


@pytest.mark.slow
def test_tuning_is_for_an_engine_without_workers(together: Engine) -> None:
    with pytest.raises(InputError, match="without Ray"):
        together.tune_neighbours()


@pytest.mark.slow
def test_shards_keep_the_version_that_was_asked_for(ray: ModuleType, together: Engine, tmp_path: Path) -> None:
    together.close()  # whose workers hold the CPUs
    path, query = tmp_path / "x.idx", images_of(1, 1)[0]
    source = ArraySource(images_of(COUNT, 0), np.arange(COUNT) % 4)
    build_index(source, path, classifier_of(network()), views=0)
    with Engine.open(path, model=network(), ray=True) as engine:
        before = hits(engine.search(query, mode="l2"))
        with Engine.open(path, model=network()) as other:
            other.add(ArraySource(query[None], [1], ids=["new"]))
        os.kill(processes(engine)[0], signal.SIGKILL)
        assert hits(engine.search(query, mode="l2")) == before
        assert engine.refresh()
        assert engine.search(query, mode="l2").hits[0].id == "new"
        build_index(source, path, classifier_of(network()), views=0, overwrite=True)
        for process in processes(engine):
            os.kill(process, signal.SIGKILL)
        with pytest.raises(IndexStateError, match="no exemplar can be seen"):
            engine.search(query, mode="l2")
