"""Synchronising an index: against fresh builds, counting what the model sees; refusals; kills; memory."""

import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.builders import finished, opened, snapshot, start, tiny_arrays, tiny_classifier
from tests.conftest import CLASSES, SHAPE
from tmm_engine.index.errors import ImageError, IndexStateError, InputError, ModelError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.sources.records import ImageRecord, UnreadableImage
from tmm_engine.index.store import target as target_module
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.changes import add_exemplars
from tmm_engine.index.store.lance_store import ROW_DIGEST
from tmm_engine.index.store.manifest import Manifest
from tmm_engine.index.store.syncing import SyncReport, sync_index
from tmm_engine.index.store.target import locked
from tmm_engine.index.types import ImageShape

CLASSIFIER = tiny_classifier()
POOL, LABELS = tiny_arrays(78, 400)

State = dict[str, tuple[int, int, int]]
"""Id -> number of its image in the pool, label, page."""


def source(state: State, *, labelled: bool = True) -> ArraySource:
    numbers, labels, pages = zip(*state.values(), strict=True)
    return ArraySource(
        POOL[list(numbers)],
        labels if labelled else None,
        ids=list(state),
        metadata={"page": list(pages)},
        name="pool",
    )


def plain(*numbers: int) -> State:
    return {f"id {n}": (n, int(LABELS[n]), n) for n in numbers}


class Gaps(ArraySource):
    """Some images of it cannot be read."""

    broken: tuple[str, ...] = ()

    def read(self, shape: ImageShape) -> Iterator[ImageRecord | UnreadableImage]:
        for record in super().read(shape):
            assert isinstance(record, ImageRecord)
            yield UnreadableImage(record.id, "cut short") if record.id in self.broken else record


def with_gaps(state: State, *broken: str) -> Gaps:
    gaps = source(state)
    gaps.__class__, gaps.broken = Gaps, broken
    return gaps


def digests(index: Path) -> dict[str, bytes]:
    """The stored digest of every row, by id."""
    store = opened(index)[1]
    table = store._dataset.to_table(columns=["id", ROW_DIGEST])
    return dict(zip(table["id"].to_pylist(), table[ROW_DIGEST].to_pylist(), strict=True))


def features(index: Path) -> dict[str, np.ndarray]:
    store = opened(index)[1]
    return dict(zip(store.ids.tolist(), store.features(np.arange(len(store))), strict=True))


class Counting:
    """Counts the images that pass a classifier's network."""

    def __init__(self, classifier: Classifier) -> None:
        self.images = 0
        self._hook = classifier.backbone.register_forward_hook(self._count)

    def _count(self, module: Any, inputs: Any, output: Any) -> None:
        self.images += len(output)

    def __enter__(self) -> "Counting":
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


def synced(index: Path, images: Any, **options: Any) -> SyncReport:
    """After checking that the model saw as many images as the report says."""
    with Counting(CLASSIFIER) as counter:
        report = sync_index(index, images, CLASSIFIER, **options)
    assert counter.images == (0 if report.dry_run else report.embedded)
    return report


def check_fresh(index: Path, images: Any, folder: Path) -> None:
    """The index is one that is built of the source now."""
    write_index(images, folder / "fresh.idx", CLASSIFIER, overwrite=True)
    assert digests(index) == digests(folder / "fresh.idx")
    now, fresh = features(index), features(folder / "fresh.idx")
    for id_, feature in fresh.items():
        np.testing.assert_allclose(now[id_], feature, rtol=1e-4, atol=1e-5)
    assert Manifest.read(index).exemplars == len(fresh)
    assert Manifest.read(index).labels_predicted == Manifest.read(folder / "fresh.idx").labels_predicted
    manifest, store = opened(index)
    assert [wrong for _, wrong in store.check_digests(1000, manifest.vocabulary) if wrong] == []


@pytest.fixture
def index(tmp_path: Path) -> Path:
    write_index(source(plain(*range(20))), tmp_path / "idx", CLASSIFIER)
    return tmp_path / "idx"


states = st.dictionaries(
    st.integers(0, 15).map(lambda n: f"id {n}"),
    st.tuples(st.integers(0, 2), st.integers(0, CLASSES - 1), st.integers(0, 1)),
    min_size=1,
)


@settings(max_examples=8)
@given(st.lists(states, min_size=2, max_size=4), st.booleans())
def test_after_any_history_the_rows_are_those_of_a_fresh_build(history: list[State], labelled: bool):
    folder = Path(tempfile.mkdtemp())
    try:
        write_index(source(history[0], labelled=labelled), folder / "idx", CLASSIFIER)
        for before, now in pairwise(history):
            planned = synced(folder / "idx", source(now, labelled=labelled), delete=True, dry_run=True)
            report = synced(folder / "idx", source(now, labelled=labelled), delete=True)
            assert replace(planned, version=report.version, dry_run=False, agreement=report.agreement) == report
            both = before.keys() & now.keys()
            told = slice(None) if labelled else slice(0, None, 2)  # without labels only pixels and page count
            other = {id_ for id_ in both if before[id_][told] != now[id_][told]}
            assert set(report.replaced_ids) == other
            assert set(report.added_ids) == now.keys() - both
            assert set(report.missing_ids) == before.keys() - both
            assert (report.unchanged, report.deleted) == (len(both) - len(other), len(before.keys() - both))
            assert report.embedded == report.added + sum(before[id_][0] != now[id_][0] for id_ in both)
            check_fresh(folder / "idx", source(now, labelled=labelled), folder)
    finally:
        shutil.rmtree(folder)


def test_one_change_is_one_version_and_none_is_none(index):
    before = snapshot(index)
    report = synced(index, source(plain(*range(20))), delete=True)
    assert (report.version, report.unchanged, report.embedded) == (1, 20, 0)
    assert snapshot(index) == before
    now = plain(*range(2, 22)) | {"id 5": (99, 0, 5)}
    report = synced(index, source(now), delete=True)
    assert (report.version, report.added, report.replaced, report.deleted) == (2, 2, 1, 2)
    assert Manifest.read(index).change == "synchronised with pool: 2 added, 1 replaced, 2 deleted"
    assert len(opened(index)[1]) == report.exemplars == 20
    assert synced(index, source(now), delete=True).version == 2


def test_without_delete_what_is_missing_stays_and_is_said(index):
    report = synced(index, source(plain(3, 30)))
    assert (report.added_ids, report.deleted, report.exemplars) == (("id 30",), 0, 21)
    assert report.missing_ids == tuple(f"id {n}" for n in range(20) if n != 3)


def test_a_dry_run_changes_nothing_and_waits_for_nobody(index):
    before = snapshot(index)
    with locked(index):
        report = synced(index, source(plain(3, 30)), delete=True, dry_run=True)
    assert (report.added, report.deleted, report.embedded, report.exemplars, report.version) == (1, 19, 1, 2, 1)
    assert snapshot(index) == before


def test_where_only_label_or_metadata_change_the_features_are_kept_bit_for_bit(index):
    before = features(index)
    state = plain(*range(20))
    state |= {"id 3": (3, (state["id 3"][1] + 1) % CLASSES, 3), "id 4": (4, state["id 4"][1], 44)}
    report = synced(index, source(state), delete=True)
    assert (report.replaced_ids, report.embedded) == (("id 3", "id 4"), 0)
    assert all((features(index)[id_] == feature).all() for id_, feature in before.items())
    assert opened(index)[1].metadata(np.array([19])) == [{"page": 44}]


def test_a_source_without_labels_leaves_those_that_there_are_and_labels_that_come_replace_predictions(index, tmp_path):
    state = plain(*range(20))
    report = synced(index, source(state, labelled=False), delete=True)
    assert (report.replaced, report.unchanged, report.labels_predicted) == (0, 20, True)
    assert "20 exemplars keep the labels that they have" in report.remarks[-1]
    report = synced(index, source(state | plain(20), labelled=False))
    assert (report.added, report.replaced, report.embedded) == (1, 0, 1)
    moved = {id_: (image, label, page + 100) for id_, (image, label, page) in state.items()}
    assert synced(index, source(moved, labelled=False)).replaced == 20  # their metadata, not their labels
    report = synced(index, source(moved | plain(20)), delete=True)
    assert (report.replaced, report.embedded, report.labels_predicted) == (1, 0, False)
    check_fresh(index, source(moved | plain(20)), tmp_path)


def test_what_can_no_longer_be_read_stays_as_it_was(index):
    before = digests(index)
    state = {id_: row for id_, row in plain(*range(21)).items() if id_ != "id 7"}
    gaps = with_gaps(state, "id 3", "id 20")
    report = synced(index, gaps, delete=True)
    assert (report.unreadable_ids, report.skipped_count, report.missing_ids) == (("id 3",), 2, ("id 7",))
    assert report.skipped[1] == UnreadableImage("id 20", "cut short")
    assert digests(index) == {id_: digest for id_, digest in before.items() if id_ != "id 7"}
    assert Manifest.read(index).skipped == 2
    before_strict = snapshot(index)
    with pytest.raises(ImageError, match="id 3: cut short"):
        synced(index, gaps, delete=True, strict=True)
    with pytest.raises(InputError, match=r"no image could be read; nothing was changed\n  id 3: cut short"):
        synced(index, with_gaps(plain(3), "id 3"), delete=True)
    assert snapshot(index) == before_strict


def test_a_shard_that_cannot_be_read_is_no_reason_to_delete_what_it_held(index):
    class OneShard(ArraySource):
        def read(self, shape):
            yield UnreadableImage("train-00000.parquet", "not Parquet", is_shard=True)
            yield from super().read(shape)

    before = snapshot(index)
    with pytest.raises(InputError, match=r"train-00000\.parquet: not Parquet; nothing was changed"):
        sync_index(index, OneShard(POOL[:1], LABELS[:1], metadata={"page": [0]}), CLASSIFIER, delete=True)
    assert snapshot(index) == before


def test_a_prefix_leaves_the_ids_of_others_alone(index):
    add_exemplars(index, source(plain(30, 31, 32)), CLASSIFIER, id_prefix="more/")
    report = synced(index, source(plain(31, 33)), delete=True, id_prefix="more/")
    assert report.added_ids == ("more/id 33",)
    assert report.missing_ids == ("more/id 30", "more/id 32")
    assert (report.unchanged, report.deleted, report.exemplars) == (1, 2, 22)


class Twice(ArraySource):
    """Ids that repeat: a source of somebody else's may."""

    def read(self, shape: ImageShape) -> Any:
        for record in super().read(shape):
            yield replace(record, id="id 3")


def test_what_is_refused_changes_nothing(index, monkeypatch):
    before = snapshot(index)
    with pytest.raises(ModelError, match="with the same model"):
        sync_index(index, source(plain(1)), tiny_classifier(seed=1))
    twice = Twice(POOL[[3, 4]], LABELS[[3, 4]], metadata={"page": [3, 4]})
    with pytest.raises(InputError, match="got 'id 3' twice"):
        synced(index, twice)
    with pytest.raises(InputError, match="no metadata column 'pages'"):
        synced(index, ArraySource(POOL[:1], [0], metadata={"pages": [1]}))
    with pytest.raises(InputError, match="label 9"):
        synced(index, source({"id 1": (1, 9, 1)}))
    with pytest.raises(IndexStateError, match="does not exist"):
        synced(index.parent / "nothing", source(plain(1)), dry_run=True)
    monkeypatch.setattr(target_module, "WRITER_SECONDS", 0.1)
    with locked(index), pytest.raises(IndexStateError, match="another process is writing"):
        synced(index, source(plain(1)))
    assert snapshot(index) == before


SYNC_AND_DIE = """
from tests.test_index_syncing import *
from tests.builders import die_before
index = Path(sys.argv[1])
die_before(index, sys.argv[2], int(sys.argv[3]))
sync_index(index, source(plain(*range(40, 80)) | plain(3, 4) | {"id 5": (99, 0, 5)}), CLASSIFIER, delete=True)
say("survived")
"""


def killed_before(index: Path, event: str, number: int) -> bool:
    """A synchronisation that dies there leaves the old version or the new one whole, and the next one works."""
    write_index(source(plain(*range(20))), index, CLASSIFIER)
    before = digests(index)
    process = start(SYNC_AND_DIE, index, event, number)
    survived = process.communicate()[0] == "survived\n"
    now = plain(*range(40, 80)) | plain(3, 4) | {"id 5": (99, 0, 5)}
    write_index(source(now), index.parent / "fresh.idx", CLASSIFIER)
    after = digests(index.parent / "fresh.idx")
    assert digests(index) in ((after,) if survived else (before, after))
    sync_index(index, source(now), CLASSIFIER, delete=True)
    assert digests(index) == after
    manifest = Manifest.read(index)
    manifest.check_digests(index, exemplars=True)
    return not survived


@pytest.mark.parametrize(("event", "number"), [("os.rename", 1), ("os.rename", 2)])
def test_a_synchronisation_killed_before_each_rename(tmp_path, event, number):
    assert killed_before(tmp_path / "idx", event, number)


@pytest.mark.slow
@pytest.mark.parametrize("event", ["os.rename", "os.remove", "os.mkdir", "open"])
def test_a_synchronisation_killed_before_each_operation_on_the_file_system(tmp_path, event):
    for number in range(1, 17):
        (tmp_path / str(number)).mkdir()
        if not killed_before(tmp_path / str(number) / "idx", event, number):
            return


MEASURE = """
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.syncing import sync_index
batches.MAX_IMAGES, lance_store.FRAGMENT_BYTES = 1024, 16 << 20
model = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.Linear(16, 4))
classifier = Classifier.from_module(model, image_shape=(3, 32, 32))
index, n = Path(sys.argv[1]), int(sys.argv[2])
write_index(EndlessSource(n // 2), index, classifier)
say(sync_index(index, EndlessSource(n), classifier).added)
say(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_peak_memory_grows_only_with_the_ids(tmp_path):
    """Of 368 MB of images more, a tenth is tolerated, and 600 bytes for each id more."""
    peaks = []
    for n in (40_000, 160_000):
        added, peak = finished(start(MEASURE, tmp_path / str(n), n)).split()
        assert int(added) == n // 2
        peaks.append(int(peak) * 1024)
    assert peaks[1] - peaks[0] < 37e6 + 600 * 120_000


def test_ids_in_another_unicode_form_are_the_same(tmp_path):
    images = np.random.default_rng(4).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    names = ["caf\u00e9", "na\u00efve", "plain"]
    write_index(ArraySource(images, [0, 1, 2], ids=names), tmp_path / "idx", CLASSIFIER)
    written = ArraySource(images, [0, 1, 3], ids=[unicodedata.normalize("NFD", name) for name in names])
    report = synced(tmp_path / "idx", written, delete=True)
    assert (report.added, report.replaced_ids, report.missing_ids, report.unchanged) == (0, ("plain",), (), 2)
    with pytest.raises(InputError, match="the index has exemplars of these ids: 'caf\u00e9', 'na\u00efve', 'plain'"):
        add_exemplars(tmp_path / "idx", written, CLASSIFIER)


def test_what_lies_beyond_a_limit_is_not_missing(index, tmp_path):
    for number in range(3):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8) + number).save(tmp_path / f"{number}.png")
    (tmp_path / "list.csv").write_text("file_name\n0.png\n1.png\n2.png\n")
    with pytest.raises(InputError, match="got one with a limit"):
        sync_index(index, open_source(tmp_path / "list.csv", limit=2), CLASSIFIER, delete=True, dry_run=True)


def test_what_was_written_is_compared_with_the_predictions(index):
    report = synced(index, source(plain(*range(22))))
    assert report.agreement is not None
    assert report.agreement.labelled == 2
    assert synced(index, source(plain(*range(22)))).agreement is None
