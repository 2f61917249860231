"""Add, replace, delete, compact: against a plain dictionary as the model; refusals; what writers leave behind."""

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.builders import opened, reference_features, snapshot, tiny_arrays, tiny_build, tiny_classifier
from tests.conftest import CLASSES
from tmm_engine.index.columns import load_columns
from tmm_engine.index.errors import IndexStateError, InputError, ModelError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.records import ImageRecord
from tmm_engine.index.store import target as target_module
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.changes import add_exemplars, compact, delete_exemplars
from tmm_engine.index.store.commit import changing
from tmm_engine.index.store.lance_store import LanceStore
from tmm_engine.index.store.manifest import EXEMPLARS, MANIFEST, VERSIONS, Manifest, data_files, digest_files
from tmm_engine.index.store.target import locked
from tmm_engine.index.types import ImageShape
from tmm_engine.rerank.columns import GLOBAL_FEATURE, STRETCHED_FEATURE, global_columns
from tmm_engine.rerank.global_trigger import make_global_trigger
from tmm_engine.rerank.settings import GlobalRecipe, QueryTrigger

CLASSIFIER = tiny_classifier()
POOL, LABELS = tiny_arrays(77, 400)


def source(numbers: list[int], ids: list[str] | None = None, **options: Any) -> ArraySource:
    """Images of the pool, with their number as metadata."""
    return ArraySource(
        POOL[numbers],
        LABELS[numbers],
        ids=ids or [f"id {number}" for number in numbers],
        metadata={"number": numbers},
        name="pool",
        **options,
    )


def content(store: LanceStore) -> dict[str, int]:
    """Which image of the pool each id has, after checking image, label, metadata and features."""
    rows = np.arange(len(store))
    numbers = [row["number"] for row in store.metadata(rows)]
    np.testing.assert_array_equal(store.images(rows), POOL[numbers])
    np.testing.assert_array_equal(store.labels, LABELS[numbers])
    np.testing.assert_allclose(
        store.features(rows), reference_features(CLASSIFIER, POOL[numbers]), rtol=1e-4, atol=1e-5
    )
    assert len(set(store.ids)) == len(store)
    return dict(zip(store.ids.tolist(), numbers, strict=True))


def at(index: Path, version: int) -> LanceStore:
    manifest = Manifest.read(index, version=version)
    manifest.check_digests(index, exemplars=True)
    return LanceStore(
        index / EXEMPLARS,
        image_shape=manifest.image_shape,
        columns=manifest.columns,
        version=manifest.lance_version,
    )


@pytest.fixture
def index(tmp_path: Path) -> Path:
    path = tmp_path / "idx"
    write_index(source(list(range(20))), path, CLASSIFIER)
    return path


class Life(RuleBasedStateMachine):
    """Any order of changes leaves what the same changes leave of a dictionary; every older version stays as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.index = self.folder / "idx"
        self.history: dict[int, dict[str, int]] = {}

    @initialize(n=st.integers(1, 12))
    def build(self, n: int) -> None:
        write_index(source(list(range(n))), self.index, CLASSIFIER)
        self.history[1] = {f"id {number}": number for number in range(n)}

    @property
    def now(self) -> dict[str, int]:
        return self.history[max(self.history)]

    def changed(self, version: int, now: dict[str, int]) -> None:
        assert version == max(self.history) + 1
        self.history[version] = now

    @rule(start=st.integers(0, 380), n=st.integers(1, 12), ids=st.integers(0, 30))
    def add(self, start: int, n: int, ids: int) -> None:
        numbers = list(range(start, start + n))
        given = dict(zip([f"id {ids + k}" for k in range(n)], numbers, strict=True))
        report = add_exemplars(self.index, source(numbers, list(given)), CLASSIFIER, replace_same=True)
        assert report.replaced == len(given.keys() & self.now.keys())
        self.changed(report.version, self.now | given)

    @precondition(lambda self: len(self.now) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        ids = data.draw(
            st.lists(st.sampled_from(sorted(self.now)), min_size=1, max_size=len(self.now) - 1, unique=True)
        )
        report = delete_exemplars(self.index, ids=ids)
        assert report.deleted == len(ids)
        self.changed(report.version, {id_: number for id_, number in self.now.items() if id_ not in ids})

    @precondition(lambda self: len(set(LABELS[list(self.now.values())])) > 1)
    @rule(label=st.integers(0, CLASSES - 1))
    def delete_a_class(self, label: int) -> None:
        gone = {id_ for id_, number in self.now.items() if LABELS[number] == label}
        if gone:
            report = delete_exemplars(self.index, where=f"label = {label} AND number >= 0")
            self.changed(report.version, {id_: number for id_, number in self.now.items() if id_ not in gone})

    @rule(discard=st.booleans())
    def compact(self, discard: bool) -> None:
        before = opened(self.index)[1]
        report = compact(self.index, discard_versions=discard)
        assert opened(self.index)[1].ids.tolist() == before.ids.tolist()
        self.changed(report.version, self.now)
        if discard:
            self.history = {report.version: self.now}
            manifest = Manifest.read(self.index)
            assert sorted(manifest.files) == sorted(data_files(self.index))
            assert len(list((self.index / EXEMPLARS / "data").iterdir())) == 1

    @invariant()
    def every_version_is_what_it_was(self) -> None:
        for version, expected in self.history.items():
            assert content(at(self.index, version)) == expected
        assert Manifest.read(self.index).exemplars == len(self.now)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


Life.TestCase.settings = settings(max_examples=5, stateful_step_count=7)
TestLife = Life.TestCase


# ---- ids


def test_ids_that_are_there_are_refused_or_replaced_or_prefixed(index):
    before = snapshot(index)
    with pytest.raises(InputError, match=r"'id 18', 'id 19'; nothing was changed.*`replace=True`"):
        add_exemplars(index, source(list(range(18, 30))), CLASSIFIER)
    assert snapshot(index) == before
    report = add_exemplars(index, source(list(range(18, 30))), CLASSIFIER, id_prefix="new/")
    assert (report.added, report.replaced, report.exemplars) == (12, 0, 32)
    swapped = source([100, 101], ["id 3", "id 30"])
    report = add_exemplars(index, swapped, CLASSIFIER, replace_same=True)
    assert (report.added, report.replaced, report.exemplars) == (1, 1, 33)
    found = content(opened(index)[1])
    assert (found["id 3"], found["id 30"], found["new/id 18"], found["id 18"]) == (100, 101, 18, 18)


class Twice(ArraySource):
    """Ids that repeat: a source of somebody else's may."""

    def read(self, shape: ImageShape) -> Any:
        for record in super().read(shape):
            yield ImageRecord("same", record.image, record.label, record.metadata)


def test_an_id_twice_in_a_source_is_refused(index):
    before = snapshot(index)
    twice = Twice(POOL[:3], LABELS[:3], metadata={"number": [0, 1, 2]})
    for replace_same in (False, True):
        with pytest.raises(InputError, match="got 'same' twice"):
            add_exemplars(index, twice, CLASSIFIER, replace_same=replace_same)
    assert snapshot(index) == before


def test_a_deleted_id_does_not_come_back_by_shifting(index):
    delete_exemplars(index, ids=["id 0", "id 7"])
    report = add_exemplars(index, source([50, 51]), CLASSIFIER)
    found = content(opened(index)[1])
    assert report.exemplars == len(found) == 20
    assert not {"id 0", "id 7"} & found.keys()
    assert all(found[f"id {number}"] == number for number in (*range(1, 7), *range(8, 20), 50, 51))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either ids or a filter"),
        ({"ids": ["id 1"], "where": "label = 1"}, "got both"),
        ({"ids": ["id 1", "id 99"]}, "'id 99'.*did you mean 'id"),
        ({"where": "label = 99"}, "no exemplar matches"),
        ({"where": "nonsense = 1"}, "over id, label, label_is_predicted, predicted, number, got 'nonsense = 1'"),
        ({"where": "label >= 0"}, "delete its folder instead"),
    ],
)
def test_deletions_that_are_refused_change_nothing(index, options, message):
    before = snapshot(index)
    with pytest.raises(InputError, match=message):
        delete_exemplars(index, **options)
    assert snapshot(index) == before


def test_ids_of_any_text_are_deleted_exactly(tmp_path):
    ids = ["'", '"', "a'b", "--", "\n", "%", "id = id", "é", "x" * 5000, "_rowaddr", "keep"]
    write_index(source(list(range(len(ids))), ids), tmp_path / "idx", CLASSIFIER)
    for gone in range(len(ids) - 1):
        delete_exemplars(tmp_path / "idx", ids=[ids[gone]])
        assert content(opened(tmp_path / "idx")[1]) == {ids[n]: n for n in range(gone + 1, len(ids))}


# ---- classes and columns


def named(names: tuple[str, ...], numbers: list[int], labels: list[int], **metadata: list[Any]) -> ArraySource:
    return ArraySource(
        POOL[numbers], labels, ids=[f"n{n}" for n in numbers], class_names=names, metadata=metadata, name="named"
    )


def test_classes_are_matched_by_name(tmp_path):
    names = ("ant", "bee", "cat", "dog")
    write_index(named(names, [0, 1, 2, 3], [0, 1, 2, 3]), tmp_path / "idx", CLASSIFIER)
    add_exemplars(tmp_path / "idx", named(("bee", "dog"), [4, 5, 6], [0, 1, 0]), CLASSIFIER)
    store = opened(tmp_path / "idx")[1]
    assert dict(zip(store.ids, store.labels, strict=True)) == dict(
        zip([f"n{n}" for n in range(7)], [0, 1, 2, 3, 1, 3, 1], strict=True)
    )
    report = add_exemplars(tmp_path / "idx", named(("bee", "dogs"), [7], [1]), CLASSIFIER)
    assert "1 of the 2 labels of named are no class of the model's: 'dogs'" in report.remarks[0]
    assert "'dogs' (nearest: 'dog')" in report.remarks[1]
    manifest, store = opened(tmp_path / "idx")
    assert manifest.vocabulary.names[store.labels[-1]] == "dogs"


def test_without_labels_the_models_predictions_stand_in(index):
    add_exemplars(index, ArraySource(POOL[30:33], ids=["a", "b", "c"], name="unlabelled"), CLASSIFIER)
    manifest, store = opened(index)
    assert store.label_is_predicted.tolist() == [False] * 20 + [True] * 3
    predicted = CLASSIFIER.logits(torch.from_numpy(reference_features(CLASSIFIER, POOL[30:33]))).argmax(1)
    assert store.labels.tolist() == [*LABELS[:20], *predicted.tolist()]
    assert manifest.labels_predicted
    assert store.metadata(np.array([19, 20])) == [{"number": 19}, {"number": None}]


def test_columns_of_the_index_decide(tmp_path):
    types = {"note": ["x"], "size": [1.5], "page": [3]}
    write_index(named(("a", "b", "c", "d"), [0], [0], **types), tmp_path / "idx", CLASSIFIER)
    add_exemplars(tmp_path / "idx", named(("a", "b"), [1], [1], size=[2]), CLASSIFIER)
    [row] = opened(tmp_path / "idx")[1].metadata(np.array([1]))
    assert row == {"note": None, "size": 2.0, "page": None}
    assert isinstance(row["size"], float)
    for metadata, message in (
        ({"pages": [1]}, "no metadata column 'pages'.*'page'"),
        ({"page": ["x"]}, "expected int"),
    ):
        with pytest.raises(InputError, match=message):
            add_exemplars(tmp_path / "idx", named(("a", "b"), [2], [1], **metadata), CLASSIFIER)


def test_another_model_or_labels_beyond_its_classes_are_refused(index):
    before = snapshot(index)
    with pytest.raises(ModelError, match="add with the same model"):
        add_exemplars(index, source([30]), tiny_classifier(seed=1))
    with pytest.raises(InputError, match="label 9"):
        add_exemplars(index, ArraySource(POOL[:1], [9], ids=["x"], metadata={"number": [0]}), CLASSIFIER)
    assert snapshot(index) == before


# ---- writers and readers


def test_readers_keep_their_version_while_writers_go_on(index):
    reader, images = opened(index)[1], {}
    for number in range(30, 34):
        add_exemplars(index, source([number]), CLASSIFIER)
        compact(index)
        images[number] = reader.images(np.arange(20))
    assert content(reader) == {f"id {number}": number for number in range(20)}
    assert all((seen == POOL[:20]).all() for seen in images.values())


def test_writers_at_once_lose_nothing(index):
    """The lock makes each wait until no other is writing."""
    errors: list[BaseException] = []

    def write(start: int) -> None:
        try:
            for number in range(start, start + 5):
                add_exemplars(index, source([number]), CLASSIFIER)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(start,)) for start in (100, 200, 300)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == []
    numbers = [*range(20), *range(100, 105), *range(200, 205), *range(300, 305)]
    assert content(opened(index)[1]) == {f"id {number}": number for number in numbers}
    assert Manifest.read(index).version == 16


def test_a_writer_that_goes_on_for_long_is_a_clear_conflict(index, monkeypatch):
    monkeypatch.setattr(target_module, "WRITER_SECONDS", 0.1)
    with locked(index), pytest.raises(IndexStateError, match="another process is writing"):
        delete_exemplars(index, ids=["id 1"])
    delete_exemplars(index, ids=["id 1"])


def test_what_killed_writers_left_is_removed_by_the_next_one(index):
    """A commit to Lance that `index.json` never named, a manifest of it, files of no commit, temporaries."""
    before = set(data_files(index))
    ahead = index.parent / "ahead"
    shutil.copytree(index, ahead)
    add_exemplars(ahead, source([300, 301]), CLASSIFIER)
    Manifest.read(ahead).keep(ahead)
    (ahead / MANIFEST).write_bytes((index / MANIFEST).read_bytes())
    (ahead / EXEMPLARS / "data" / "half.lance").write_bytes(b"half")
    (ahead / VERSIONS / ".writing-x").write_bytes(b"half")
    (ahead / ".writing-y").write_bytes(b"half")
    assert set(data_files(ahead)) > before
    assert content(opened(ahead)[1]) == {f"id {number}": number for number in range(20)}
    report = add_exemplars(ahead, source([40]), CLASSIFIER)
    assert (report.version, report.exemplars) == (2, 21)
    assert content(opened(ahead)[1]) == {f"id {number}": number for number in (*range(20), 40)}
    kept = {*Manifest.read(ahead).files, *Manifest.read(ahead, version=1).files}
    assert kept == set(data_files(ahead))
    assert [path.name for path in ahead.rglob(".writing*")] == []
    assert [path.name for path in (ahead / VERSIONS).iterdir()] == ["1.json"]


def test_an_exception_in_the_middle_leaves_the_old_version_and_nothing_else(index):
    before = snapshot(index)

    def stop(step: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_exemplars(index, source([40, 41]), CLASSIFIER, progress=stop)
    with pytest.raises(ZeroDivisionError), changing(index) as change:
        change.deletion(np.array([change.ids()["id 3"]], dtype=np.uint64))  # writes a deletion file
        raise ZeroDivisionError
    assert snapshot(index) == before


def test_damage_is_found_before_a_change(index):
    [data] = (index / EXEMPLARS / "data").iterdir()
    whole = data.read_bytes()
    data.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(IndexStateError, match=f"{data.name} is not what was written"):
        compact(index)
    data.write_bytes(whole)
    [version] = (index / EXEMPLARS / "_versions").glob("*.manifest")
    version.write_bytes(version.read_bytes()[::-1])
    with pytest.raises(IndexStateError, match=f"{version.name} is not what was written"):
        delete_exemplars(index, ids=["id 1"])


def test_what_is_no_index_gets_no_lock_beside_it(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(IndexStateError, match="is not an index"):
        delete_exemplars(tmp_path / "photos", ids=["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_digests_of_a_new_version_are_those_of_its_files(index):
    add_exemplars(index, source([40]), CLASSIFIER)
    delete_exemplars(index, ids=["id 2"])
    manifest = Manifest.read(index)
    every = digest_files(index)
    assert manifest.files.items() <= every.items()
    assert {name for name in every.keys() - manifest.files.keys() if "/data/" in name} == set()


def test_discarding_versions_frees_what_only_they_needed(index):
    add_exemplars(index, source([40]), CLASSIFIER)
    delete_exemplars(index, ids=["id 2"])
    assert compact(index).version == 4
    assert len(at(index, 2)) == 21
    compact(index, discard_versions=True)
    kinds = sorted(name.split("/")[1] for name in data_files(index) if "/" in name)
    assert kinds == ["_transactions", "_versions", "data"]
    assert sorted(Manifest.read(index).files) == sorted(data_files(index))
    assert list((index / VERSIONS).iterdir()) == []


def test_an_index_moved_with_its_versions_stays_whole(index, tmp_path):
    add_exemplars(index, source([40]), CLASSIFIER)
    shutil.move(index, tmp_path / "moved here")
    assert len(at(tmp_path / "moved here", 1)) == 20
    assert len(at(tmp_path / "moved here", 2)) == 21
    assert add_exemplars(tmp_path / "moved here", source([41]), CLASSIFIER).exemplars == 22


def test_the_classifier_read_from_the_index_adds_too(tmp_path):
    tiny_build(tmp_path / "idx")
    from tests.conftest import network

    loaded = Classifier.load(tmp_path / "idx" / "model.safetensors", model=network())
    images, labels = tiny_arrays(3, 2)
    more = ArraySource(images, labels, ids=["x", "y"], metadata={"seed": [3, 3]})
    assert add_exemplars(tmp_path / "idx", more, loaded).exemplars == 98


def test_every_column_of_features_goes_through_every_change(tmp_path):
    """Added, replaced, deleted, compacted: in every version each column is that of the images."""
    config, index = GlobalRecipe(trigger=QueryTrigger(steps=5)), tmp_path / "idx"
    columns = global_columns(make_global_trigger(source(list(range(20))), CLASSIFIER, config), CLASSIFIER)
    write_index(source(list(range(20))), index, CLASSIFIER, columns=columns)
    add_exemplars(index, source([60, 61], ["id 4", "new"]), CLASSIFIER, replace_same=True)
    delete_exemplars(index, ids=["id 9"])
    compact(index)
    for version in range(1, 5):
        manifest = Manifest.read(index, version=version)
        store = LanceStore(
            index / EXEMPLARS,
            image_shape=manifest.image_shape,
            columns=manifest.columns,
            version=manifest.lance_version,
        )
        rows = np.arange(len(store))
        assert [*manifest.columns] == ["feature", GLOBAL_FEATURE, STRETCHED_FEATURE]
        for column in load_columns(index, manifest.columns, CLASSIFIER):
            features = column.compute(store.images(rows).copy())
            np.testing.assert_allclose(store.features(rows, column=column.name), features, rtol=1e-4, atol=1e-5)
    assert sorted(store.ids) == sorted({*(f"id {n}" for n in range(20)), "new"} - {"id 9"})
