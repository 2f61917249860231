"""`Engine` as a handle on a snapshot: closed, refreshed under a search, narrowed by a filter."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.digits import IMAGES, LABELS, make_classifier
from tests.modes import MODES, in_mode, quick
from tmm_engine import Engine, build_index
from tmm_engine.index import ArraySource, Classifier, InputError, MemoryStore
from tmm_engine.index.labels import Vocabulary
from tmm_engine.snapshot import Snapshot

N = 60
QUICK = quick(trigger_steps=3, head_steps=5)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return make_classifier()


def digits(start: int, stop: int) -> ArraySource:
    numbers = list(range(start, stop))
    return ArraySource(IMAGES[start:stop], LABELS[start:stop], ids=[f"{n:04d}" for n in numbers])


@pytest.fixture
def index(tmp_path: Path, classifier: Classifier) -> Path:
    build_index(digits(0, N), tmp_path / "digits.idx", classifier, global_trigger=None)
    return tmp_path / "digits.idx"


def ids(engine: Engine, **options) -> list[str]:
    return [hit.id for hit in engine.search(IMAGES[200], **{"mode": "l2", "k": 2 * N} | options).hits]


# ---- closed

USES: dict[str, Callable[[Engine], object]] = {
    "search": lambda engine: engine.search(IMAGES[200], mode="l2"),
    "search a list": lambda engine: engine.search([IMAGES[200]], mode="l2"),
    "search each": lambda engine: engine.search_each([IMAGES[200]], mode="l2"),
    "search none": lambda engine: engine.search_each([]),
    "filtered": lambda engine: engine.search(IMAGES[200], mode="l2", where="label = 3"),
    "matching": lambda engine: engine.matching("label = 3"),
    "exemplar": lambda engine: engine.exemplar("0003"),
    "add": lambda engine: engine.add(digits(N, N + 1)),
    "delete": lambda engine: engine.delete(ids=["0003"]),
    "compact": lambda engine: engine.compact(),
    "versions": lambda engine: engine.versions(),
    "refresh": lambda engine: engine.refresh(),
    "compare": lambda engine: engine.compare_backends(),
    "len": len,
    **{
        name: lambda engine, name=name: getattr(engine, name)
        for name in ("classifier", "store", "class_names", "manifest", "path", "backend")
    },
}


def test_a_closed_engine_says_that_the_index_has_to_be_opened_again(index: Path):
    engine = Engine.open(index, device="cpu")
    assert ids(engine, where="label = 3")
    engine.close()
    engine.close()
    for name, use in USES.items():
        with pytest.raises(InputError, match="this engine is closed; open the index again"):
            pytest.fail(f"{name}: {use(engine)!r}")
    with Engine.open(index, device="cpu") as again:
        assert (len(again), len(again.versions())) == (N, 1), "nothing was changed"


def test_a_with_block_closes_even_when_it_fails(index: Path):
    with Engine.open(index, device="cpu") as engine:
        assert len(engine) == N
    with pytest.raises(InputError, match="closed"):
        len(engine)
    with pytest.raises(ZeroDivisionError), Engine.open(index, device="cpu") as other:
        raise ZeroDivisionError
    with pytest.raises(InputError, match="closed"):
        len(other)


def test_what_was_narrowed_outlives_the_engine_that_it_came_from(index: Path):
    with Engine.open(index, device="cpu") as engine:
        threes = engine.matching("label = 3")
        expected = ids(threes)
    assert ids(threes) == expected != []


# ---- refreshed


@pytest.mark.parametrize("where", [None, "id >= '0010'"])
def test_a_search_under_way_ends_on_the_version_it_began_on(index: Path, where: str | None):
    reader, writer = Engine.open(index, device="cpu"), Engine.open(index, device="cpu")
    before = ids(reader, mode="tmm", config=QUICK, where=where)
    gone, moved = before[0], []

    def refresh(*step: object) -> None:
        if not moved:
            writer.delete(ids=[gone])
            moved.append(reader.refresh())

    assert ids(reader, mode="tmm", config=QUICK, where=where, progress=refresh) == before
    assert moved == [True]
    assert len(reader) == N - 1
    assert gone not in ids(reader, mode="tmm", config=QUICK, where=where)


def test_an_engine_at_an_older_version_moves_on_when_it_is_told_to(index: Path):
    with Engine.open(index, device="cpu") as writer:
        writer.delete(ids=["0003"])
    with Engine.open(index, device="cpu", version=1) as engine:
        assert len(engine) == N
        with pytest.raises(InputError, match="opened at version 1, which stays as it is"):
            engine.delete(ids=["0004"])
        assert engine.refresh()
        assert len(engine) == N - 1
        engine.delete(ids=["0004"])
        assert len(engine) == N - 2
        assert not engine.refresh()


# ---- narrowed


@pytest.mark.parametrize("mode", MODES)
def test_what_matches_answers_as_an_index_of_it(index: Path, classifier: Classifier, mode: str):
    kept = [number for number in range(N) if LABELS[number] in (1, 3, 8)]
    with Engine.open(index, device="cpu") as engine:
        narrowed = engine.matching("label IN (1, 3, 8)")
        features = engine.store.features(np.array(kept))
        found = narrowed.search(IMAGES[200], k=N, **in_mode(mode, QUICK))
        assert len(narrowed) == len(kept)
        assert [narrowed.exemplar(f"{n:04d}").name for n in kept] == [f"{n:04d}" for n in kept]
        with pytest.raises(InputError, match="no exemplar has the id '0000'"):
            narrowed.exemplar("0000")
    store = MemoryStore(IMAGES[kept][:, None], {"feature": features}, LABELS[kept], ids=[f"{n:04d}" for n in kept])
    alone = Engine(Snapshot.of(classifier, store, vocabulary=Vocabulary(classifier.class_names)))
    expected = alone.search(IMAGES[200], k=N, **in_mode(mode, QUICK))
    assert [(hit.id, hit.score) for hit in found.hits] == [(hit.id, hit.score) for hit in expected.hits]
    assert (found.scored, found.exemplars, found.notes) == (len(kept), len(kept), expected.notes)


def test_the_last_filter_is_kept_and_never_another_versions(index: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []
    matching = Snapshot.matching

    def counted(snapshot: Snapshot, where: str) -> Snapshot:
        made.append(where)
        return matching(snapshot, where)

    monkeypatch.setattr(Snapshot, "matching", counted)
    with Engine.open(index, device="cpu") as engine:
        first = ids(engine, where="id < '0010'")
        assert ids(engine, where="id < '0010'") == first
        assert len(engine.matching("id < '0010'")) == len(first) == 10
        assert made == ["id < '0010'"]
        assert len(ids(engine, where="id >= '0010'")) == N - 10
        assert ids(engine, where="id < '0010'") == first
        assert made == ["id < '0010'", "id >= '0010'", "id < '0010'"], "only the last is kept"
        engine.delete(ids=["0003"])
        assert ids(engine, where="id < '0010'") == [id_ for id_ in first if id_ != "0003"]
        assert made[3:] == ["id < '0010'"]


def test_what_a_filter_left_cannot_be_changed_or_refreshed(index: Path):
    with Engine.open(index, device="cpu") as engine:
        narrowed = engine.matching("label = 3")
        for change in (narrowed.refresh, narrowed.compact, narrowed.versions, lambda: narrowed.delete(ids=["0000"])):
            with pytest.raises(InputError, match="'label = 3' leaves of an index"):
                change()
        assert len(engine) == N


def test_an_empty_list_has_an_empty_answer(index: Path):
    with Engine.open(index, device="cpu") as engine:
        assert engine.search([]) == engine.search([], mode="l2") == engine.search_each([]) == []
