"""`Engine` over the life of an index: versions, filters, threads, batches with errors in them."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import CLASSES, SHAPE, classifier_of, network
from tests.digits import IMAGES
from tests.digits import LABELS as DIGIT_LABELS
from tests.modes import MODES, in_mode, quick
from tmm_engine import Engine, FailedQuery, Query, SearchResult
from tmm_engine.index import ArraySource, Classifier, ImageError, IndexStateError, InputError
from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.manifest import EXEMPLARS, Manifest
from tmm_engine.rerank import PRESETS
from tmm_engine.rerank.columns import global_columns
from tmm_engine.rerank.global_trigger import make_global_trigger
from tmm_engine.snapshot import Snapshot

QUICK = quick(trigger_steps=10, head_steps=20)
N = 120
PIXELS = np.repeat(IMAGES[:, None], 3, axis=1)  # (1797, 3, 8, 8)
LABELS = (DIGIT_LABELS % CLASSES).astype(np.int64)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return classifier_of(network())


def digits(start: int, stop: int, **options) -> ArraySource:
    """Digits with their number as id and page."""
    numbers = list(range(start, stop))
    return ArraySource(
        PIXELS[start:stop], LABELS[start:stop], ids=[f"{n:04d}" for n in numbers], metadata={"page": numbers}, **options
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, classifier: Classifier) -> Path:
    path = tmp_path_factory.mktemp("living") / "digits.idx"
    write_index(digits(0, N), path, classifier)
    return path


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(built, tmp_path / "digits.idx"))


def opened(path: Path, **options) -> Engine:
    """The network of conftest is code of ours, so it has to be given again."""
    return Engine.open(path, model=network(), device="cpu", **options)


def answers(
    engine: Engine, *, numbers: tuple[int, ...] = (200, 201), mode: str = "tmm", **options
) -> list[list[tuple[str, float]]]:
    queries = [PIXELS[number] for number in numbers]
    found = engine.search([*queries], **{"k": 15} | in_mode(mode, QUICK) | options)
    return [[(hit.id, hit.score) for hit in result.hits] for result in found]


# ---- versions


def test_what_is_added_is_found_and_what_is_deleted_is_not(index: Path):
    with opened(index) as engine:
        report = engine.add(digits(N, N + 10))
        assert (report.version, report.added, len(engine)) == (2, 10, N + 10)
        assert answers(engine, numbers=(N + 3,), mode="l2", k=1)[0][0][0] == f"{N + 3:04d}"
        engine.delete(ids=[f"{N + 3:04d}"])
        assert f"{N + 3:04d}" not in dict(answers(engine, numbers=(N + 3,), mode="l2", k=N + 10)[0])
        changes = [(each.version, each.exemplars, each.change) for each in engine.versions()]
        assert changes == [
            (1, N, "built from arrays"), (2, N + 10, "added 10, replaced 0 from arrays"), (3, N + 9, "deleted 1 by id"),
        ]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_after_changes_answers_are_those_of_an_index_built_of_the_same_exemplars(
    index: Path, tmp_path: Path, classifier: Classifier, mode: str
):
    with opened(index) as engine:
        engine.add(digits(N, N + 20))
        engine.delete(where="page < 30 OR page = 77")
        kept = [number for number in range(30, N + 20) if number != 77]
        source = ArraySource(PIXELS[kept], LABELS[kept], ids=[f"{n:04d}" for n in kept], metadata={"page": kept})
        write_index(source, tmp_path / "fresh.idx", classifier)
        with opened(tmp_path / "fresh.idx") as fresh:
            expected = answers(fresh, mode=mode)
        found = answers(engine, mode=mode)
        assert [[id_ for id_, _ in one] for one in found] == [[id_ for id_, _ in one] for one in expected]
        np.testing.assert_allclose(
            [[score for _, score in one] for one in found],
            [[score for _, score in one] for one in expected],
            rtol=1e-3, atol=1e-3,  # features were made in other batches
        )  # fmt: skip
        engine.compact()
        assert answers(engine, mode=mode) == found


@pytest.mark.parametrize("mode", MODES)
def test_every_version_answers_as_it_did(index: Path, mode: str):
    expected = {}
    with opened(index) as engine:
        expected[1] = answers(engine, mode=mode)
        engine.delete(ids=[expected[1][0][0][0]])
        expected[2] = answers(engine, mode=mode)
        engine.add(digits(N, N + 5))
        expected[3] = answers(engine, mode=mode)
    assert len({str(each) for each in expected.values()}) >= 2
    for version in (3, 1, 2, 1):
        with opened(index, version=version) as engine:
            assert answers(engine, mode=mode) == expected[version]
            with pytest.raises(InputError, match="opened at version"):
                engine.delete(ids=["0005"])


def test_a_reader_keeps_its_version_until_it_refreshes(index: Path):
    reader, writer = opened(index), opened(index)
    before = {mode: answers(reader, mode=mode) for mode in MODES}
    gone = before["l2"][0][0][0]
    writer.delete(ids=[gone])
    writer.compact()
    assert {mode: answers(reader, mode=mode) for mode in MODES} == before
    assert reader.exemplar(gone).name == gone
    assert reader.refresh()
    assert not reader.refresh()
    for mode in MODES:
        assert answers(reader, mode=mode) == answers(writer, mode=mode)
        assert gone not in dict(answers(reader, mode=mode, k=N)[0])


def test_approximate_indexes_are_never_those_of_another_version(index: Path, tmp_path: Path, classifier: Classifier):
    path = tmp_path / "hnsw.idx"
    write_index(digits(0, N), path, classifier, neighbours="HNSW8")
    with opened(path) as engine:
        first = answers(engine, mode="l2", k=N)
        engine.delete(where="page < 60")
        found = {id_ for id_, _ in answers(engine, mode="l2", k=N)[0]}
        assert found <= {f"{n:04d}" for n in range(60, N)}
        assert len(found) > 20
    with opened(path, version=1) as engine:
        assert answers(engine, mode="l2", k=N) == first


def test_the_global_triggers_features_are_those_of_the_version(tmp_path: Path, classifier: Classifier):
    config = PRESETS["paper"].with_settings(["trigger.steps=10", "head.min_steps=20"])
    shared = make_global_trigger(digits(0, N), classifier, config)
    for name, stop in (("grown", 80), ("whole", N)):
        write_index(digits(0, stop), tmp_path / name, classifier, columns=global_columns(shared, classifier))
    options = {"config": config.with_settings(["trigger=global"]), "mode": "tmm"}
    with opened(tmp_path / "grown") as grown, opened(tmp_path / "whole") as whole:
        grown.add(digits(80, N))
        found, expected = answers(grown, **options), answers(whole, **options)
    assert [[id_ for id_, _ in one] for one in found] == [[id_ for id_, _ in one] for one in expected]


def test_an_index_replaced_by_another_build_is_an_error_for_old_readers_and_not_a_wrong_answer(
    index: Path, classifier: Classifier
):
    reader = opened(index, cache_bytes=0)
    write_index(digits(500, 500 + N), index, classifier, overwrite=True)
    with pytest.raises(IndexStateError, match="open the index again"):
        answers(reader)
    assert reader.refresh()
    assert answers(reader, mode="l2", numbers=(510,), k=1)[0][0][0] == "0510"


def test_exemplars_that_are_not_the_manifests_are_refused(index: Path, tmp_path: Path, classifier: Classifier):
    """As when an index is replaced between reading its manifest and opening its exemplars."""
    write_index(digits(500, 500 + N), tmp_path / "other", classifier)
    manifest = Manifest.read(index)
    with opened(tmp_path / "other") as other:
        own = {name.removeprefix(f"{EXEMPLARS}/") for name in manifest.files if "/data/" in name}
        manifest.check_exemplars(index, N, own)
        with pytest.raises(IndexStateError, match="replaced meanwhile"):
            manifest.check_exemplars(index, N, other.store.files)
        with pytest.raises(IndexStateError, match="replaced meanwhile"):
            manifest.check_exemplars(index, N - 1, set())


def test_sync_moves_the_engine_on_and_is_refused_where_changes_are(index: Path):
    with opened(index) as engine:
        planned = engine.sync(digits(5, N + 5), delete=True, dry_run=True)
        assert (planned.added, planned.deleted, planned.unchanged, len(engine)) == (5, 5, N - 5, N)
        report = engine.sync(digits(5, N + 5), delete=True)
        assert (report.version, report.embedded, len(engine)) == (2, 5, N)
        assert answers(engine, numbers=(N + 3,), mode="l2", k=1)[0][0][0] == f"{N + 3:04d}"
        for dry_run in (True, False):
            with pytest.raises(InputError, match="shows what 'page < 30' leaves"):
                engine.matching("page < 30").sync(digits(0, N), dry_run=dry_run)
    with opened(index, version=1) as engine, pytest.raises(InputError, match="opened at version 1"):
        engine.sync(digits(0, N))


def test_in_memory_there_are_no_versions(classifier: Classifier):
    engine = Engine.from_arrays(PIXELS[:20], LABELS[:20], classifier, global_trigger=None)
    for change in (
        engine.versions,
        engine.refresh,
        engine.compact,
        lambda: engine.delete(ids=["x"]),
        lambda: engine.sync(digits(0, 1)),
    ):
        with pytest.raises(InputError, match="in memory"):
            change()


# ---- filters


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize(
    ("where", "keep"),
    [
        ("label = 3 OR label = 1", lambda n: LABELS[n] in (3, 1)),
        ("page BETWEEN 20 AND 60 AND label <> 0", lambda n: 20 <= n <= 60 and LABELS[n] != 0),
        ("id IN ('0007', '0011', '0099', 'nothing')", lambda n: n in (7, 11, 99)),
        ("id LIKE '001%' AND NOT label_is_predicted", lambda n: 10 <= n < 20),
        ("page = 5", lambda n: n == 5),
    ],
)
def test_a_filters_answers_are_bit_for_bit_those_of_an_index_of_the_rest(
    built: Path, classifier: Classifier, where: str, keep: Callable[[int], bool], on_disk: bool, mode: str
):
    kept = [number for number in range(N) if keep(number)]
    with opened(built) as engine:
        features = engine.store.features(np.array(kept))
        whole = engine if on_disk else in_memory(engine)
        options = {"k": len(kept) + 5} | in_mode(mode, QUICK)
        if mode == "tmm" and len(kept) >= 5:
            options["candidates"] = len(kept) - 2
        [result] = whole.search([PIXELS[200]], where=where, **options)
    rest = in_memory_of(classifier, kept, features)
    [expected] = rest.search([PIXELS[200]], **options)
    assert [(hit.id, hit.score, hit.label, hit.metadata) for hit in result.hits] == [
        (hit.id, hit.score, hit.label, hit.metadata) for hit in expected.hits
    ]
    assert all(np.array_equal(hit.image, PIXELS[int(hit.id)]) for hit in result.hits)
    assert (result.scored, result.exemplars) == (expected.scored, N)
    assert f"restricted to the {len(kept)} of {N}" in result.notes[0]


def in_memory_of(classifier: Classifier, numbers: list[int], features: np.ndarray) -> Engine:
    """With these very features: in other batches they would be rounded otherwise."""
    from tmm_engine.index.columns import FEATURE
    from tmm_engine.index.store.memory import MemoryStore

    store = MemoryStore(
        PIXELS[numbers],
        {FEATURE: features},
        LABELS[numbers],
        ids=[f"{n:04d}" for n in numbers],
        metadata=[{"page": n} for n in numbers],
    )
    return Engine(Snapshot.of(classifier, store, vocabulary=Vocabulary(classifier.class_names)))


def in_memory(engine: Engine) -> Engine:
    return in_memory_of(engine.classifier, list(range(N)), engine.store.features(np.arange(N)))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("label = 99", "no exemplar matches 'label = 99'"),
        ("lable = 3", "over id, label, label_is_predicted, predicted, page, got 'lable = 3'"),
        ("label = 'x'", "no label is called 'x'"),
        ("label < 'x'", "expected label in a plain comparison"),
        ("label", "expected label in a plain comparison"),
        ("", "expected a condition in SQL"),
        ("label = 3; DROP TABLE x", "without ; comments"),
        ("label = 3 -- and more", "without ; comments"),
        ('"page" = 3', "without ; comments or double quotes"),
        ("length(Repeat ('x', 2000000000)) > 3", "repeat\\(…\\) is not allowed"),
        ("label = " + "1 + " * 5000 + "1", "at most 500 words"),
        ("label" + " is null" * 3000, "at most 500 words"),
        ("(" * 20_000 + "label = 1" + ")" * 20_000, "expected a condition in SQL"),
        ("id = '" + "x" * 200_000 + "'", "at most 100,000 characters"),
        ("id = 'a", "expected a condition in SQL"),
    ],
)
def test_filters_that_are_none(built: Path, where: str, message: str):
    with opened(built) as engine:
        for whole in (engine, in_memory(engine)):
            with pytest.raises(InputError, match=message) as refusal:
                whole.search(PIXELS[200], where=where, mode="l2")
            assert len(str(refusal.value)) < 1000
            assert "\n" not in str(refusal.value)


def test_long_lists_of_ids_are_filters(built: Path):
    with opened(built) as engine:
        ids = ", ".join(f"'{n:04d}'" for n in range(10, 5000))
        assert len(engine.matching(f"id IN ({ids})")) == N - 10
        assert len(engine.matching(f"page IN ({', '.join(map(str, range(-5000, 10)))})")) == 10
        assert len(engine.matching("label = 1").matching("page < 50")) == sum(LABELS[:50] == 1)


def test_a_filter_follows_the_version(index: Path):
    with opened(index) as engine:
        before = answers(engine, where="page < 50", mode="cosine", k=N)
        engine.delete(where="page >= 40 AND page < 50")
        after = answers(engine, where="page < 50", mode="cosine", k=N)
        assert [len(one) for one in before] == [50, 50]
        assert after == [[hit for hit in one if hit[0] < "0040"] for one in before]


# ---- several at once


@pytest.mark.parametrize("mode", MODES)
def test_eight_threads_find_what_one_finds(built: Path, mode: str):
    numbers = list(range(300, 316))
    with opened(built) as engine:
        expected = [answers(engine, numbers=(n,), mode=mode, where="page > 9" if n % 3 else None) for n in numbers]
    with opened(built) as engine, ThreadPoolExecutor(8) as pool:
        found = pool.map(
            lambda n: answers(engine, numbers=(n,), mode=mode, where="page > 9" if n % 3 else None), numbers
        )
        assert list(found) == expected


def test_searches_under_way_while_the_engine_moves_on_end_on_one_version(index: Path):
    engine = opened(index)
    allowed = [str(answers(engine, mode="l2", k=N))]
    for step in range(6):
        engine.delete(ids=[f"{step:04d}"])
        allowed.append(str(answers(engine, mode="l2", k=N)))
    reader, stop, seen, errors = opened(index, version=1), threading.Event(), [], []

    def search() -> None:
        while not stop.is_set():
            try:
                seen.append(str(answers(reader, mode="l2", k=N)))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(4):
        engine.add(digits(N + step, N + step + 1))
        allowed.append(str(answers(engine, mode="l2", k=N)))
        reader.refresh()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(seen) <= set(allowed)
    assert len(set(seen)) > 1


@pytest.mark.parametrize("mode", MODES)
def test_one_bad_image_among_others_has_an_error_in_its_place(built: Path, tmp_path: Path, mode: str):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    black = Query("black", np.zeros(SHAPE, dtype=np.float32))
    queries = [PIXELS[200], tmp_path / "bad.png", PIXELS[201], np.zeros((3, 9, 9), np.uint8), black, b""]
    with opened(built) as engine:
        found = engine.search_each(queries, k=15, **in_mode(mode, QUICK))
        kinds = [type(one) for one in found]
        failed = {1, 3, 5} | ({4} if mode == "tmm" else set())
        assert kinds == [FailedQuery if place in failed else SearchResult for place in range(6)]
        good = [one for one in found if isinstance(one, SearchResult)]
        assert [[(hit.id, hit.score) for hit in one.hits] for one in good[:2]] == answers(engine, mode=mode)
        assert isinstance(found[1], FailedQuery)
        assert found[1].query == str(tmp_path / "bad.png")
        assert "expected an image" in found[1].error
        if mode == "tmm":
            assert "is the image constant?" in found[4].to_json()["error"]
        with pytest.raises(ImageError):
            engine.search(queries, **in_mode(mode, QUICK))
        with pytest.raises(InputError, match="k: expected"):
            engine.search_each([PIXELS[200]], k=0)
        assert engine.search_each([]) == []
        assert all(isinstance(one, FailedQuery) for one in engine.search_each([b"", b"x"], mode=mode))
