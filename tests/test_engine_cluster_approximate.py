"""Shards in workers of a Ray cluster have approximate indexes of their own: apart, since these take all workers."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.conftest import classifier_of, network
from tests.test_engine_cluster_searching import COUNT, exemplars, images_of, same
from tmm_engine import Engine, build_index


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["IVF1,Flat", "HNSW32", "IVF16,SQ8"])
def test_approximate_indexes_of_shards(ray: ModuleType, tmp_path: Path, factory: str) -> None:
    """One cluster is all, as exact search; of the others scores are exact, and as many are found as by one index."""
    path, queries, plain = tmp_path / "x.idx", [*images_of(12, 1)], {"recognition": False}
    build_index(exemplars(), path, classifier_of(network()), views=2, neighbours=factory)
    build_index(exemplars(), tmp_path / "exact.idx", classifier_of(network()), views=2)
    with Engine.open(tmp_path / "exact.idx", model=network()) as alone:
        every, recognised = alone.search(queries, k=COUNT, **plain), alone.search(queries, k=10)
    with Engine.open(path, model=network()) as single:
        singly = single.search(queries, k=10, **plain)
    with Engine.open(path, model=network(), ray=True) as engine:
        recognising, found = engine.search(queries, k=10), engine.search(queries, k=10, **plain)
        filtered = engine.search(queries, k=10, where="page % 3 = 1", **plain)
    if factory == "IVF1,Flat":
        same(recognising, recognised, exactly=True)
    for results, pages in ((found, range(COUNT)), (filtered, range(1, COUNT, 3))):
        for result, whole in zip(results, every, strict=True):
            scores = {hit.id: hit.score for hit in whole.hits if int(hit.id) in pages}
            assert len(result.hits) == 10
            assert [hit.score for hit in result.hits] == [scores[hit.id] for hit in result.hits]
    assert recall(found, every) >= recall(singly, every) - 0.05


@pytest.mark.slow
def test_shards_too_small_for_their_clusters_are_searched_exactly(ray: ModuleType, tmp_path: Path) -> None:
    path, queries = tmp_path / "x.idx", [*images_of(4, 1)]
    build_index(exemplars(), path, classifier_of(network()), views=2, neighbours="IVF1100,Flat")  # one shard has 1,024
    build_index(exemplars(), tmp_path / "exact.idx", classifier_of(network()), views=2)
    with Engine.open(tmp_path / "exact.idx", model=network()) as alone:
        expected = alone.search(queries, k=10)
    with Engine.open(path, model=network(), ray=True) as engine:
        found = engine.search(queries, k=10)
        assert found[0].backend.startswith("matrix products, fp32")
    same(found, expected, exactly=True)


def recall(found: list[Any], expected: list[Any]) -> float:
    """Share of the exact ten that are among the ten found."""
    shares = [
        len({hit.id for hit in one.hits} & {hit.id for hit in every.hits[:10]}) / 10
        for one, every in zip(found, expected, strict=True)
    ]
    return float(np.mean(shares))
