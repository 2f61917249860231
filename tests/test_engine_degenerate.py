"""Degenerate but legal input works, or says why not; ids and metadata may be any text."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import SHAPE, classifier_of, network
from tests.modes import MODES, in_mode, quick
from tmm_engine import Engine, Query, write_html
from tmm_engine.index import ArraySource, ImageError
from tmm_engine.index.store.building import write_index
from tmm_engine.rerank.backbone import specialised

QUICK = quick(trigger_steps=5, head_steps=10)
IMAGES = np.random.default_rng(0).integers(0, 256, (30, *SHAPE), dtype=np.uint8)
CLASSIFIER = classifier_of(network())


def memory(images: np.ndarray, labels: list[int], **options) -> Engine:
    return Engine.from_arrays(images, labels, CLASSIFIER, **options)


@pytest.mark.parametrize("mode", MODES)
def test_one_exemplar_and_more_wanted_than_there_are(mode: str):
    result = memory(IMAGES[:1], [2]).search(IMAGES[5], k=10, **in_mode(mode, QUICK))
    assert [hit.id for hit in result.hits] == ["00000000"]
    assert np.isfinite(result.hits[0].score)
    assert "k = 10 is more than the 1 exemplars" in result.notes[0]


@pytest.mark.parametrize("mode", MODES)
def test_all_exemplars_of_one_label(mode: str):
    result = memory(IMAGES, [1] * 30).search(IMAGES[5], k=30, **in_mode(mode, QUICK))
    assert len({hit.id for hit in result.hits}) == 30
    assert np.isfinite([hit.score for hit in result.hits]).all()


@pytest.mark.parametrize("mode", MODES)
def test_duplicates_rank_by_id(mode: str):
    ids = [f"id {n}" for n in np.random.default_rng(1).permutation(20)]
    result = memory(np.repeat(IMAGES[:1], 20, axis=0), [1] * 20, ids=ids).search(
        IMAGES[3], k=20, **in_mode(mode, QUICK)
    )
    assert len({hit.score for hit in result.hits}) == 1
    assert [hit.id for hit in result.hits] == sorted(ids)


@pytest.mark.parametrize("mode", ["l2", "cosine"])
def test_a_query_that_is_an_exemplar_finds_itself(mode: str):
    assert memory(IMAGES, [1] * 30).search(IMAGES[7], k=1, mode=mode).hits[0].id == "00000007"


def test_a_constant_query_is_refused_with_the_reason_and_a_nearly_black_one_is_answered():
    engine = memory(IMAGES, [1] * 30)
    for level in (0.0, 0.3, 1.0):
        with pytest.raises(ImageError, match="is the image constant"):
            engine.search(Query("flat", np.full(SHAPE, level, dtype=np.float32)), config=QUICK)
    black = np.zeros(SHAPE, dtype=np.uint8)
    black[0, 0, 0] = 1
    for mode in MODES:
        assert np.isfinite([hit.score for hit in engine.search(black, **in_mode(mode, QUICK)).hits]).all()


def test_a_model_in_float16_is_searched_with_in_float32():
    half = Engine.from_arrays(IMAGES, [1] * 30, classifier_of(network().half()))
    assert half.classifier.head.weight.dtype == torch.float32
    found = half.search(IMAGES[3], config=QUICK, k=30)
    expected = memory(IMAGES, [1] * 30).search(IMAGES[3], mode="l2")
    assert np.isfinite([hit.score for hit in found.hits]).all()
    assert half.search(IMAGES[3], mode="l2").hits[0].id == expected.hits[0].id == "00000003"


@pytest.mark.parametrize("text", ["a\nb", "<script>alert(1)</script>", "x" * 10_000_000, "\x00", "é日本", "'; --", ""])
def test_ids_and_metadata_of_any_text_are_kept_and_escaped(tmp_path: Path, text: str):
    ids = [f"{text}{n}" for n in range(3)]
    source = ArraySource(IMAGES[:3], [0, 1, 2], ids=ids, metadata={"note": [text] * 3})
    write_index(source, tmp_path / "idx", CLASSIFIER)
    with Engine.open(tmp_path / "idx", model=network(), device="cpu", verify=True) as engine:
        result = engine.search(IMAGES[1], k=3, mode="l2")
        assert result.hits[0].id == ids[1]
        assert result.hits[0].metadata["note"] == text
        write_html([result], tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert "<script>" not in page
        assert len(page) < 200_000
        engine.delete(ids=[ids[1]])
        assert len(engine) == 2


def test_opening_in_one_thread_leaves_the_models_of_others_alone():
    """PyTorch's tracer takes over the calls of every module in the process while it traces."""
    images, errors, stop = torch.rand(4, *SHAPE), [], threading.Event()
    expected = CLASSIFIER.features(images)

    def run() -> None:
        while not stop.is_set():
            try:
                assert torch.equal(CLASSIFIER.features(images), expected)
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    tracers = [threading.Thread(target=lambda: [specialised(CLASSIFIER) for _ in range(15)]) for _ in range(2)]
    for tracer in tracers:
        tracer.start()
    for tracer in tracers:
        tracer.join()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
