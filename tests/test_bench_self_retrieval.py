"""Self-retrieval: ranks, overlap and labels against values worked out by hand, and resuming."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.builders import tiny_arrays, tiny_classifier
from tests.fakes import NotAttacked
from tmm_engine.bench.noise import Family, Perturbation
from tmm_engine.bench.records import RecordFile, read_records
from tmm_engine.bench.retrievers import Retriever
from tmm_engine.bench.self_retrieval import KEY, measure_self_retrieval
from tmm_engine.bench.suite import Suite
from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.memory import MemoryStore

GREYS = (200, 190, 100, 60, 55)  # exemplars of one grey level each
LABELS = (0, 0, 1, 1, 2)
HALF, THIRD = Perturbation(Family.BRIGHTNESS, 0.5), Perturbation(Family.BRIGHTNESS, 0.3)


class ByBrightness(NotAttacked):
    """The nearest in mean brightness comes first; counts its searches and can break down."""

    def __init__(self, *, name: str = "brightness", breaks_after: int = 10_000) -> None:
        self.name, self.breaks_after, self.searches = name, breaks_after, 0

    def scores(self, query: np.ndarray, *, seed: int = 0) -> np.ndarray:
        if self.searches == self.breaks_after:
            raise KeyboardInterrupt
        self.searches += 1
        return -np.abs(np.array(GREYS) / 255 - query.mean())


@pytest.fixture(scope="module")
def greys() -> MemoryStore:
    images = np.array(GREYS, np.uint8)[:, None, None, None] * np.ones((1, 3, 8, 8), np.uint8)
    ids = [f"grey {grey}" for grey in GREYS]
    return MemoryStore(images, {"feature": np.zeros((5, 2), np.float32)}, np.array(LABELS), ids=ids)


def measure(
    path: Path,
    store: MemoryStore,
    *retrievers: Retriever,
    queries: tuple[int, ...] = (0, 2),
    perturbations: tuple[Perturbation, ...] = (HALF, THIRD),
    **options: object,
) -> list[dict]:
    with RecordFile.open(path, {"benchmark": "robustness"}, KEY, ("benchmark",)) as records:
        classifier = tiny_classifier()
        measure_self_retrieval(
            retrievers, np.array(queries), store, perturbations, records, classifier=classifier, **{"k": 2, **options}
        )
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_records_say_what_can_be_worked_out_by_hand(greys: MemoryStore, tmp_path: Path):
    extra = {"brightness": {"setting": "none"}}
    found = measure(tmp_path / "r.jsonl", greys, ByBrightness(), extra=extra)
    # grey 200: alone 200, 190, 100, …; at half, as 100: 100, 60, 55, 190, 200; at 0.3, as 60: 60, 55, 100, 190, 200
    # grey 100: alone 100, 60, 55, 190, 200; at half, as 50: 55, 60, 100, 190, 200; at 0.3, as 30: the same
    expected = [
        ("grey 200", "clean", "clean", 0.0, 0, 1.0, 0.5),  # the best others: 190 (0), 100 (1)
        ("grey 200", "brightness 0.5", "brightness", 0.5, 4, 0.0, 0.0),
        ("grey 200", "brightness 0.3", "brightness", 0.3, 4, 0.0, 0.0),
        ("grey 100", "clean", "clean", 0.0, 0, 1.0, 0.5),  # 60 (1), 55 (2)
        ("grey 100", "brightness 0.5", "brightness", 0.5, 2, 0.5, 0.5),
        ("grey 100", "brightness 0.3", "brightness", 0.3, 2, 0.5, 0.5),
    ]
    assert [r.get("neighbours") for r in found if r["query"] == "grey 100"] == [["grey 100", "grey 60"], None, None]
    names = ("query", "perturbation", "family", "level", "rank", "overlap", "label_precision")
    assert [tuple(record[name] for name in names) for record in found] == expected
    assert [record["reciprocal_rank"] for record in found] == pytest.approx([1, 1 / 5, 1 / 5, 1, 1 / 3, 1 / 3])
    assert {record["setting"] for record in found} == {"none"}


def test_ties_are_broken_by_id(greys: MemoryStore, tmp_path: Path):
    class Indifferent(NotAttacked):
        name = "indifferent"

        def scores(self, query: np.ndarray, *, seed: int = 0) -> np.ndarray:
            return np.zeros(len(GREYS))

    ranks = {r["query"]: r["rank"] for r in measure(tmp_path / "r.jsonl", greys, Indifferent(), queries=(0, 1, 2, 3))}
    assert ranks == {"grey 100": 0, "grey 190": 1, "grey 200": 2, "grey 60": 4}


def test_a_rerun_adds_nothing_and_searches_nothing(greys: MemoryStore, tmp_path: Path):
    measure(tmp_path / "r.jsonl", greys, ByBrightness())
    before, again = (tmp_path / "r.jsonl").read_bytes(), ByBrightness()
    measure(tmp_path / "r.jsonl", greys, again)
    assert again.searches == 0
    assert (tmp_path / "r.jsonl").read_bytes() == before


@pytest.mark.parametrize("breaks_after", range(6))
def test_interrupted_and_resumed_equals_uninterrupted(greys: MemoryStore, tmp_path: Path, breaks_after: int):
    whole = measure(tmp_path / "whole.jsonl", greys, ByBrightness())
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "r.jsonl", greys, ByBrightness(breaks_after=breaks_after))
    assert len(read_records(tmp_path / "r.jsonl").records) == breaks_after
    assert measure(tmp_path / "r.jsonl", greys, ByBrightness()) == whole


def test_a_method_and_a_level_that_join_later_get_the_same_records(greys: MemoryStore, tmp_path: Path):
    both = (ByBrightness(name="a"), ByBrightness(name="b"))
    whole = measure(tmp_path / "whole.jsonl", greys, *both)
    measure(tmp_path / "r.jsonl", greys, both[0], perturbations=(HALF,))
    parts = measure(tmp_path / "r.jsonl", greys, *both)
    assert sorted(map(str, parts)) == sorted(map(str, whole))


@pytest.mark.parametrize("old", [False, True], ids=["with neighbours", "without, as older files"])
def test_what_joins_later_searches_for_clean_answers_only_where_the_file_lacks_them(
    greys: MemoryStore, tmp_path: Path, old: bool
):
    path, whole = tmp_path / "r.jsonl", measure(tmp_path / "whole.jsonl", greys, ByBrightness())
    measure(path, greys, ByBrightness(), perturbations=(HALF,))
    if old:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{name: value for name, value in line.items() if name != "neighbours"} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    again, new = ByBrightness(), ByBrightness(name="new")
    found = measure(path, greys, again, new)
    assert again.searches == 2 * (1 + old)  # HALF is there
    assert new.searches == 2 * 3
    third = [record for record in whole if record["perturbation"] == THIRD.name]
    assert [r for r in found if (r["method"], r["perturbation"]) == (again.name, THIRD.name)] == third
    assert {tuple(r["neighbours"]) for r in found if "neighbours" in r} == {
        ("grey 200", "grey 190"),
        ("grey 100", "grey 60"),
    }


def test_all_methods_see_the_same_noise_and_every_query_its_own(greys: MemoryStore, tmp_path: Path):
    seen: dict[str, list[np.ndarray]] = {}

    class Watching(ByBrightness):
        def scores(self, query: np.ndarray, *, seed: int = 0) -> np.ndarray:
            seen.setdefault(self.name, []).append(query)
            return super().scores(query)

    noise = (Perturbation(Family.GAUSSIAN, 0.5),)
    for seed in (0, 1):
        methods = [Watching(name=f"{name} {seed}") for name in "ab"]
        measure(tmp_path / f"{seed}.jsonl", greys, *methods, perturbations=noise, seed=seed)
    np.testing.assert_array_equal(seen["a 0"], seen["b 0"])
    clean, noisy, _, other = seen["a 0"]
    assert np.abs(noisy - clean).max() > 0
    assert not np.allclose(other - 100 / 255, noisy - 200 / 255, atol=1e-4)
    assert not np.array_equal(seen["a 1"][1], noisy)


def test_tmm_and_baselines_together(tmp_path: Path):
    from tmm_engine.bench.methods import Method

    images, labels = tiny_arrays(1)
    suite = Suite.load(ArraySource(images, labels, name="tiny"), tiny_classifier(), exemplars=30)
    methods = [Method.parse(name) for name in ("l2", "paper,trigger_steps=2,tuning_min_steps=2", "fast")]
    chosen = suite.queries(3)
    found = measure(tmp_path / "r.jsonl", suite.store, *suite.retrievers(methods), queries=tuple(chosen.tolist()))
    assert len(found) == 3 * 3 * len(methods)
    assert {record["query"] for record in found} == set(suite.store.ids[chosen])
    for record in found:
        assert 0 <= record["rank"] < 30
        assert 0 <= record["overlap"] <= 1
        if (record["method"], record["perturbation"]) == ("l2", "clean"):
            assert record["rank"] == 0


@pytest.mark.parametrize("k", [0, 5])
def test_k_is_below_the_number_of_exemplars(greys: MemoryStore, tmp_path: Path, k: int):
    with pytest.raises(InputError, match=f"k in \\[1, 4\\].*got {k}"):
        measure(tmp_path / "r.jsonl", greys, ByBrightness(), k=k)
