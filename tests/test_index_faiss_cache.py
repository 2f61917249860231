"""The FAISS cache: what is kept is what is loaded, and nothing else ever is."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.builders import opened
from tests.digits import IMAGES, LABELS, make_classifier
from tmm_engine import Engine
from tmm_engine.index import ArraySource, Metric, Neighbours
from tmm_engine.index.neighbours import approximate
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.store.building import write_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faiss") / "digits.idx"
    write_index(ArraySource(IMAGES[:200], LABELS[:200]), path, make_classifier(), neighbours="HNSW16")
    return path


def answers(index: Path) -> list[list[tuple[str, float]]]:
    with Engine.open(index, device="cpu") as engine:
        results = [engine.search(IMAGES[300], k=5, mode=mode) for mode in ("l2", "cosine")]
    return [[(hit.id, hit.score) for hit in result.hits] for result in results]


def built(monkeypatch: pytest.MonkeyPatch) -> list[Metric]:
    """Notes each time that an index is built instead of loaded."""
    noted: list[Metric] = []
    build = approximate.built
    monkeypatch.setattr(approximate, "built", lambda *given, **how: noted.append(given[1]) or build(*given, **how))
    return noted


def test_the_second_process_loads_what_the_first_built(index: Path, monkeypatch: pytest.MonkeyPatch):
    noted = built(monkeypatch)
    first = answers(index)
    assert noted == [Metric.L2, Metric.COSINE]
    assert answers(index) == first
    assert noted == [Metric.L2, Metric.COSINE]
    assert {path.name for path in (index / "cache").glob("*.faiss*")} == {
        "l2-HNSW16.faiss", "l2-HNSW16.faiss.json", "cosine-HNSW16.faiss", "cosine-HNSW16.faiss.json",
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "not JSON", "other content", "swapped"])
def test_anything_else_is_built_anew(index: Path, monkeypatch: pytest.MonkeyPatch, damage: str):
    expected = answers(index)
    path = index / "cache" / "l2-HNSW16.faiss"
    about = path.with_name(path.name + ".json")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "not JSON":
        about.write_text("{")
    elif damage == "other content":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"content": "another", "runs": []}))
    else:
        path.write_bytes((index / "cache" / "cosine-HNSW16.faiss").read_bytes())
    noted = built(monkeypatch)
    assert answers(index) == expected
    assert noted == [Metric.L2]
    assert answers(index) == expected
    assert noted == [Metric.L2]


def test_a_cache_that_cannot_be_written_is_done_without(index: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    _, store = opened(index)
    cache = FaissCache(tmp_path / "file", "content")
    query = store.features(np.array([3]))
    with_cache = Neighbours(store, Metric.L2, factory="HNSW16", cache=cache).search(query, k=3)
    without = Neighbours(store, Metric.L2, factory="HNSW16").search(query, k=3)
    assert with_cache[0][0].tolist() == without[0][0].tolist()
