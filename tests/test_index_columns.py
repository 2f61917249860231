"""A third column of features, defined here alone, goes through everything that an index does."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.builders import opened, tiny_arrays, tiny_classifier
from tests.conftest import network
from tmm_engine.engine import Engine
from tmm_engine.index import columns as columns_module
from tmm_engine.index.columns import FeatureColumn, embed, is_column_name, load_columns, registered
from tmm_engine.index.errors import IndexStateError, InputError
from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import Neighbours
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.changes import add_exemplars, compact, delete_exemplars
from tmm_engine.index.store.exemplars import ExemplarStore, Subset
from tmm_engine.index.store.manifest import CACHE, MANIFEST, Manifest
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.info import describe_index
from tmm_engine.verify import repair_index, verify_index

CLASSIFIER = tiny_classifier()
N = 30


class HalvesColumn(FeatureColumn):
    """φ of the images times a factor that is stored beside them: its first 5 numbers."""

    name = "halves_feature"
    dimension = 5

    def __init__(self, classifier: Classifier, factor: float = 0.5) -> None:
        super().__init__(classifier)
        self.factor = factor

    def compute(self, images: np.ndarray) -> np.ndarray:
        return embed((images * self.factor).astype(np.uint8), self.classifier)[:, :5]

    def save(self, index: Path) -> None:
        (index / "factor.json").write_text(json.dumps(self.factor))

    @classmethod
    def load(cls, index: Path, classifier: Classifier) -> "HalvesColumn":
        return cls(classifier, json.loads((index / "factor.json").read_text()))


COLUMN = HalvesColumn(CLASSIFIER, 0.25)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The column is known to these tests alone."""
    monkeypatch.setattr(columns_module, "_registered", dict(columns_module._registered))
    registered(HalvesColumn)
    yield


def source(start: int, stop: int, *, ids: list[str] | None = None) -> ArraySource:
    images, labels = (array[start:stop] for array in tiny_arrays(1))
    names = ids or [f"id {n:02}" for n in range(start, stop)]
    return ArraySource(images, labels, ids=names, metadata={"page": list(range(start, stop))})


@pytest.fixture
def index(tmp_path: Path) -> Path:
    write_index(source(0, N), tmp_path / "idx", CLASSIFIER, columns=[COLUMN], neighbours="HNSW8")
    return tmp_path / "idx"


def check(store: ExemplarStore) -> None:
    """All of its features are those of its images."""
    rows = np.arange(len(store))
    images = store.images(rows).copy()
    assert store.feature_columns == {"feature": 12, "halves_feature": 5}
    for name, expected in (("feature", embed(images, CLASSIFIER)), ("halves_feature", COLUMN.compute(images))):
        np.testing.assert_allclose(store.features(rows, column=name), expected, rtol=1e-4, atol=1e-5)
        scanned = np.concatenate(list(store.scan_features(7, column=name)))
        np.testing.assert_array_equal(scanned, store.features(rows, column=name))


def test_it_is_built_added_replaced_deleted_compacted_and_read_in_every_version(index):
    add_exemplars(index, source(40, 43, ids=["id 04", "new", "id 06"]), CLASSIFIER, replace_same=True)
    delete_exemplars(index, ids=["id 09"])
    compact(index)
    for version, count in ((1, N), (2, N + 1), (3, N), (4, N)):
        manifest = Manifest.read(index, version=version)
        assert manifest.columns == {"feature": 12, "halves_feature": 5}
        assert "factor.json" in manifest.files
        assert manifest.exemplars == count
    check(opened(index)[1])
    with Engine.open(index, model=network(), version=1) as engine:
        check(engine.store)
    assert verify_index(index, model=network()).findings == []
    assert describe_index(index)["columns"] == {"feature": 12, "halves_feature": 5}


def test_features_that_are_not_of_their_images_are_found_and_repaired(tmp_path, monkeypatch):
    wrong = HalvesColumn(CLASSIFIER)
    right = wrong.compute

    def compute(images: np.ndarray) -> np.ndarray:
        features = right(images)
        features[3] += 0.5
        return features

    monkeypatch.setattr(wrong, "compute", compute)
    write_index(source(0, N), tmp_path / "idx", CLASSIFIER, columns=[wrong])
    done = verify_index(tmp_path / "idx", model=network())
    assert [finding.what for finding in done.findings] == [
        "the column 'halves_feature' of exemplar 'id 03' is not what its image gives"
    ]
    repair_index(tmp_path / "idx", model=network())
    assert verify_index(tmp_path / "idx", model=network()).findings == []
    assert Manifest.read(tmp_path / "idx").version == 2


def test_what_it_needs_is_a_file_of_the_index(index):
    (index / "factor.json").write_text("9999")
    assert any("factor.json" in finding.what for finding in verify_index(index, model=network()).findings)
    with pytest.raises(IndexStateError, match=r"factor\.json"):
        Manifest.read(index).check_digests(index)


def test_memory_and_a_filter_have_it_too(index):
    memory = MemoryStore.of(source(0, N), CLASSIFIER, columns=[COLUMN])
    disk = opened(index)[1]
    check(memory)
    rows = np.arange(N)
    for name in ("feature", "halves_feature"):
        np.testing.assert_array_equal(memory.features(rows, column=name), disk.features(rows, column=name))
    for store in (memory, disk):
        check(Subset(store, np.array([3, 5, 8])))


def test_it_is_searched_and_its_graph_is_cached(index):
    manifest, store = opened(index)
    cache = FaissCache(index / CACHE, manifest.content)
    query = store.features(np.array([7]), column="halves_feature")
    for factory in ("Flat", "HNSW8"):
        search = Neighbours(store, Metric.L2, column="halves_feature", factory=factory, cache=cache)
        ((rows, scores),) = search.search(query, k=3)
        assert (rows[0], scores[0]) == (7, 0.0)
    assert [path.name for path in (index / CACHE).glob("*.faiss")] == ["l2-HNSW8-halves_feature.faiss"]
    assert cache.load("l2 HNSW8 halves_feature").index.d == 5
    assert verify_index(index, model=network()).findings == []


def test_no_filter_can_name_it_and_no_metadata_has_its_name(index):
    store = opened(index)[1]
    with pytest.raises(InputError, match=r"over id, label, label_is_predicted, predicted, page, got"):
        store.matching("nothing = 1", Vocabulary(("a", "b", "c", "d")))
    images, labels = tiny_arrays(1, 2)
    named = ArraySource(images, labels, metadata={"halves_feature": [1, 2], "feature": [3, 4]})
    assert named.metadata_types == {"source_halves_feature": int, "source_feature": int}


def test_an_index_with_a_column_that_is_not_known_is_searched_but_not_changed(index, monkeypatch):
    columns_module._registered.pop("halves_feature")
    with Engine.open(index, model=network()) as engine:
        assert engine.search(tiny_arrays(1)[0][3], mode="l2", k=1).hits[0].id == "id 03"
        with pytest.raises(IndexStateError, match=r"among feature.*, got 'halves_feature', which this program cannot"):
            engine.add(source(40, 42))
    assert Manifest.read(index).version == 1
    done = verify_index(index, model=network())
    assert done.sound
    assert done.recomputed == N
    assert done.notes == ["not computed again, because this program does not know how: halves_feature"]


def test_columns_are_loaded_in_order_with_what_was_saved(index):
    plain, halves = load_columns(index, Manifest.read(index).columns, CLASSIFIER)
    assert (plain.name, halves.name) == ("feature", "halves_feature")
    assert isinstance(halves, HalvesColumn)
    assert halves.factor == 0.25
    assert json.loads((index / MANIFEST).read_text())["columns"] == {"feature": 12, "halves_feature": 5}


@pytest.mark.parametrize("name", ["halves", "feature_halves", "source_feature", "features", "", "halvesfeature"])
def test_other_names_are_refused(name):
    assert not is_column_name(name)
    with pytest.raises(ValueError, match="expected a name such as"):
        registered(type("Named", (HalvesColumn,), {"name": name}))


def test_a_name_has_one_class():
    with pytest.raises(ValueError, match="expected one class for the column 'halves_feature'"):
        registered(type("Another", (HalvesColumn,), {}))


@pytest.mark.parametrize("module", ["verify", "engine", "building"])
def test_who_computes_columns_knows_those_of_the_rerank(module):
    """In a process that has imported nothing else."""
    code = f"""
import tmm_engine.{module}
from tmm_engine.index.columns import is_registered
assert all(map(is_registered, ("feature", "global_feature", "stretched_feature")))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
