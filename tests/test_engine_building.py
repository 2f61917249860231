"""The Python way to an index that the default search works with, and what that search gives."""

from pathlib import Path

import numpy as np
import pytest

from tests.digits import IMAGES, LABELS, SHORTLY, make_classifier
from tests.modes import quick
from tmm_engine import Engine, SearchResult, build_index
from tmm_engine.index import ArraySource, Classifier, IndexStateError, InputError
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.manifest import Manifest
from tmm_engine.rerank import preset
from tmm_engine.rerank.columns import GLOBAL_TRIGGER
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.settings import Blend

N = 100
HALVES = IMAGES // 2 * 2  # what is darkened to a half of it is the same image, without rounding


def source() -> ArraySource:
    return ArraySource(HALVES[:N], LABELS[:N])


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return make_classifier()


@pytest.fixture(scope="module")
def memory(classifier: Classifier) -> Engine:
    return Engine.from_arrays(HALVES[:N], LABELS[:N], classifier, global_trigger=SHORTLY)


def answer(result: SearchResult) -> list[tuple[str, float]]:
    return [(hit.id, hit.score) for hit in result.hits]


def test_an_index_built_in_python_is_searched_as_one_in_memory(tmp_path: Path, classifier: Classifier, memory: Engine):
    told: list[tuple[str, int, int]] = []
    report = build_index(
        source(), tmp_path / "a.idx", classifier, global_trigger=SHORTLY, progress=lambda *step: told.append(step)
    )
    assert report.exemplars == N
    assert ("optimising the global trigger", 10, 10) in told
    with Engine.open(tmp_path / "a.idx", device="cpu") as opened:
        for options in ({}, {"candidates": 20}, {"candidates": 20, "prefilter": "global"}, {"where": "label < 5"}):
            plain, again = (engine.search(IMAGES[200], k=N, where=options.get("where")) for engine in (opened, memory))
            assert [(hit.id, round(hit.score, 4)) for hit in plain.hits] == [
                (hit.id, round(hit.score, 4)) for hit in again.hits
            ]
            ours = opened.search(IMAGES[200], k=N, config="fast", **options)
            theirs = memory.search(IMAGES[200], k=N, config="fast", **options)
            assert [hit.id for hit in ours.hits] == [hit.id for hit in theirs.hits]
            np.testing.assert_allclose([hit.score for hit in ours.hits], [hit.score for hit in theirs.hits], atol=1e-5)
            assert ours.config == preset("fast").to_json()


def test_the_global_trigger_may_be_another_or_none(tmp_path: Path, classifier: Classifier):
    other = preset("paper").with_settings(["blend=added", "trigger.steps=2"])
    build_index(source(), tmp_path / "added.idx", classifier, global_trigger=other)
    kept = GlobalTrigger.load(tmp_path / "added.idx" / GLOBAL_TRIGGER)
    assert (kept.blend, kept.stretch) == (Blend.ADDED, False)
    build_index(source(), tmp_path / "plain.idx", classifier, views=0, global_trigger=None)
    assert [*Manifest.read(tmp_path / "plain.idx").columns] == ["feature"]
    write_index(source(), tmp_path / "same.idx", classifier)
    every = np.arange(N)
    with Engine.open(tmp_path / "plain.idx", device="cpu") as plain, Engine.open(tmp_path / "same.idx") as same:
        np.testing.assert_array_equal(plain.store.features(every), same.store.features(every))
    with pytest.raises(InputError, match="did you mean 'fast'"):
        build_index(source(), tmp_path / "new.idx", classifier, global_trigger="fats")
    assert not (tmp_path / "new.idx").exists()


def test_what_cannot_be_built_is_refused_before_anything_is_optimised(tmp_path: Path, classifier: Classifier):
    told: list[object] = []
    build_index(source(), tmp_path / "a.idx", classifier, global_trigger=None)
    for options, message in (({}, "overwrite"), ({"overwrite": True, "neighbours": "HNW"}, "HNSW32")):
        with pytest.raises((InputError, IndexStateError), match=message):
            build_index(source(), tmp_path / "a.idx", classifier, progress=lambda *step: told.append(step), **options)
    assert told == []


def test_what_an_index_was_not_built_with_cannot_be_searched_by(classifier: Classifier):
    plain = Engine.from_arrays(HALVES[:20], LABELS[:20], classifier, views=0)
    with pytest.raises(InputError, match=r"no descriptors, which the mode 'robust' needs: build it again"):
        plain.search(IMAGES[200])
    with pytest.raises(
        InputError, match=r"no global trigger.* needs: build it with .*global_trigger=.*'paper', or trigger=query"
    ):
        plain.search(IMAGES[200], config="fast")
    for mode in ("l2", "cosine"):
        assert len(plain.search(IMAGES[200], mode=mode).hits) == 10
        with pytest.raises(
            InputError, match=r"contrast stretched: build it with .*\(global_trigger=…\), or search with stretch=False"
        ):
            plain.search(IMAGES[200], mode=mode, stretch=True)


@pytest.mark.parametrize("mode", ["tmm", "l2", "cosine"])
def test_stretched_a_query_may_be_dark_or_faded(memory: Engine, mode: str):
    for number in (3, 42, 200):
        pixels = HALVES[number].astype(np.float32) / np.float32(255)
        bright, dark, faded = memory.search([pixels, pixels / 2, pixels / 4 + 0.5], k=N, mode=mode, stretch=True)
        for other in (dark, faded):
            scores = dict(answer(other))
            np.testing.assert_allclose(
                [scores[id_] for id_, _ in answer(bright)], [s for _, s in answer(bright)], atol=1e-3
            )
            assert other.hits[0].id == bright.hits[0].id
        if number < N:
            assert bright.hits[0].id == f"{number:08d}"
        shown = np.rint(pixels / 2 * 255).astype(np.uint8)
        np.testing.assert_array_equal(dark.query_image[0], shown)  # as it was given


@pytest.mark.parametrize("mode", ["l2", "cosine"])
def test_l2_and_cosine_are_stretched_only_if_asked_to(memory: Engine, mode: str):
    faded = HALVES[3].astype(np.float32) / np.float32(1020) + np.float32(0.5)
    assert answer(memory.search(faded, mode=mode)) == answer(memory.search(faded, mode=mode, stretch=False))
    assert answer(memory.search(faded, mode=mode)) != answer(memory.search(faded, mode=mode, stretch=True))


def test_a_constant_query_is_answered_where_the_intensity_is_set(memory: Engine):
    for level in (0.0, 0.5, 1.0):
        result = memory.search(np.full((8, 8), level, np.float32), k=N)
        assert len({hit.id for hit in result.hits}) == N
        assert np.isfinite([hit.score for hit in result.hits]).all()


def test_the_configuration_that_was_searched_with_is_told(memory: Engine):
    assert memory.search(IMAGES[200], config="fast", stretch=True).config == preset("fast").to_json()
    shortly = quick(trigger_steps=2, head_steps=2)
    assert memory.search(IMAGES[200], config=shortly, stretch=True).config == shortly.to_json() | {"stretch": True}
