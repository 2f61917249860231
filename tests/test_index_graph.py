"""The graph of all exemplars is what brute force finds, whatever memory it has, and its cache is only ever itself."""

from pathlib import Path

import numpy as np
import pytest

from tmm_engine.index import InputError, Metric
from tmm_engine.index.neighbours import graph as module
from tmm_engine.index.neighbours.graph import (
    WORKING,
    GraphCache,
    NeighbourGraph,
    nearest_exemplars,
    neighbour_graph,
)
from tmm_engine.index.neighbours.search import exact_scores
from tmm_engine.index.store.memory import MemoryStore

N, D = 90, 8


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(N, D)).astype(np.float32)
    features[40] = features[7]  # a copy
    features[60:64] = features[20]  # and several
    images = np.zeros((N, 1, 2, 2), np.uint8)
    ids = [f"{number:03}" for number in rng.permutation(N)]
    return MemoryStore(images, {"feature": features}, np.zeros(N, np.int64), ids=ids)


def by_brute_force(store: MemoryStore, metric: Metric, k: int) -> NeighbourGraph:
    features = store.features(np.arange(N))
    rows, scores = [], []
    for row in range(N):
        own = np.round(exact_scores(features[row], features, metric), 6)
        order = [int(other) for other in np.lexsort((store.ids, -own)) if other != row][:k]
        rows.append(order)
        scores.append(own[order])
    return NeighbourGraph(np.array(rows), np.array(scores, np.float32), metric)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("tile", [16, 4096])
def test_it_is_what_brute_force_finds(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, metric: Metric, tile: int
) -> None:
    monkeypatch.setattr(module, "TILE", tile)  # 16: nothing fits, and blocks are read anew
    memory = WORKING + tile * (2 * 4 * D + 48 * 8) if tile == 16 else 1 << 30
    told: list[int] = []
    found = neighbour_graph(
        store, k=7, metric=metric, memory=memory, progress=lambda step, done, total: told.append(done)
    )
    expected = by_brute_force(store, metric, 7)
    np.testing.assert_allclose(found.scores, expected.scores, atol=2e-3 if metric is Metric.L2 else 1e-5)
    assert (np.diff(found.distances, axis=1) >= 0).all()
    assert not (found.rows == np.arange(N)[:, None]).any()
    if metric is Metric.COSINE:  # L2 of copies is the root of what rounding leaves
        np.testing.assert_array_equal(np.sort(found.rows), np.sort(expected.rows))
    assert found.rows[7, 0] == 40
    assert told[-1] == N


def test_what_is_not_among_the_exemplars_finds_them_too(store: MemoryStore) -> None:
    features = store.features(np.array([3, 40])) * 2
    rows, scores = nearest_exemplars(store, features, k=2)
    assert rows[0, 0] == 3
    assert set(rows[1].tolist()) == {7, 40}
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)
    assert nearest_exemplars(store, features, k=500)[0].shape == (2, N)


def test_few_exemplars_have_few_neighbours(store: MemoryStore) -> None:
    few = MemoryStore(
        np.zeros((2, 1, 2, 2), np.uint8),
        {"feature": store.features(np.arange(2))},
        np.zeros(2, np.int64),
        ids=["a", "b"],
    )
    assert neighbour_graph(few, k=9).rows.tolist() == [[1], [0]]
    with pytest.raises(InputError, match="at least 1 neighbour, got k=0"):
        neighbour_graph(store, k=0)
    with pytest.raises(InputError, match="a column among feature, got 'copy_feature'"):
        neighbour_graph(store, k=1, column="copy_feature")
    with pytest.raises(InputError, match=r"at least 64 MiB .* got 1 MiB \(`memory=…`\)"):
        neighbour_graph(store, k=1, memory=1 << 20)


def test_a_kept_graph_is_taken_and_anything_else_is_not(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = GraphCache(tmp_path / "cache", "content")
    first = neighbour_graph(store, k=7, cache=cache)
    assert cache.check(N) == []
    assert cache.check(N + 1) == [tmp_path / "cache" / "cosine-feature.graph"]
    with monkeypatch.context() as patched:
        patched.setattr(module, "_Columns", None)  # nothing can be computed
        again = neighbour_graph(store, k=5, cache=cache)
    np.testing.assert_array_equal(again.rows, first.rows[:, :5])
    assert neighbour_graph(store, k=9, cache=cache).k == 9
    assert neighbour_graph(store, k=2, cache=GraphCache(tmp_path / "cache", "other")).k == 2
    path = tmp_path / "cache" / "cosine-feature.graph"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert cache.check(N) == [path]
    assert cache.load("cosine feature", Metric.COSINE) is None
    unwritable = tmp_path / "file"
    unwritable.touch()
    assert neighbour_graph(store, k=2, cache=GraphCache(unwritable, "content")).k == 2


def test_of_one_exemplar_there_is_nothing() -> None:
    alone = MemoryStore(
        np.zeros((1, 1, 2, 2), np.uint8), {"feature": np.ones((1, D), np.float32)}, np.zeros(1, np.int64), ids=["a"]
    )
    assert neighbour_graph(alone, k=3).rows.shape == (1, 0)
