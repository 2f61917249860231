"""Structural similarity, label agreement of neighbours, and the gallery, on handwritten digits."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tests.digits import IMAGES, LABELS
from tests.fakes import NotAttacked
from tmm_engine.bench.benchmarks.semantic import KEY, measure_semantic, neighbour_rows, read_neighbours
from tmm_engine.bench.gallery import SHOWN, draw_gallery
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.ssim import C1, C2, ssim
from tmm_engine.index.errors import InputError
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank.recognise import Recognised
from tmm_engine.views.tiles import OTHER, SAME

N, Q, K = 150, 5, 6
QUERIES = (IMAGES[N : N + Q, None] / np.float32(255)).astype(np.float32)
QUERY_LABELS = LABELS[N : N + Q]


def make_exemplars(*, labels: np.ndarray = LABELS[:N]) -> MemoryStore:
    images = IMAGES[: len(labels), None]
    features = images.reshape(len(images), -1).astype(np.float32)
    return MemoryStore(images, {"feature": features}, labels, ids=[f"digit {row:03}" for row in range(len(images))])


class ByPixels(NotAttacked):
    """Minus the distance between images, of order `p`; counts its searches and can break down."""

    def __init__(self, p: int, *, breaks_after: int = 1_000) -> None:
        self.name, self.p, self.searches, self.breaks_after = f"L{p}", p, 0, breaks_after

    def scores(self, query: np.ndarray, *, seed: int = 0) -> np.ndarray:
        if self.searches == self.breaks_after:
            raise KeyboardInterrupt
        self.searches += 1
        differences = IMAGES[:N, None] / np.float32(255) - query
        return -np.linalg.norm(differences.reshape(N, -1), ord=self.p, axis=1)


class Recognising(ByPixels):
    """Takes every query for a copy of the first exemplar, or none."""

    def __init__(self, name: str, share: float | None) -> None:
        super().__init__(1)
        self.name, self.share = name, share

    def recognised(self, query: np.ndarray) -> Recognised | None:
        return None if self.share is None else Recognised(0, 0.1, self.share)


class InOrder(NotAttacked):
    """The first row is nearest."""

    name = "in order"

    def scores(self, query: np.ndarray, *, seed: int = 0) -> np.ndarray:
        return -np.arange(N, dtype=np.float64)


def measure(path: Path, *retrievers: object, exemplars: MemoryStore | None = None, **options: object) -> list[dict]:
    with RecordFile.open(path, {"benchmark": "semantic"}, KEY, ("benchmark",)) as records:
        measure_semantic(retrievers, QUERIES, QUERY_LABELS, exemplars or make_exemplars(), records, **options)
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    measure(tmp_path / "semantic.jsonl", ByPixels(1), ByPixels(2), k=K)
    return tmp_path / "semantic.jsonl"


def test_a_record_says_whether_the_query_was_taken_for_a_copy(tmp_path: Path):
    methods = [Recognising(name, share) for name, share in (("yes", 0.5), ("no", 0.49), ("never", None))]
    records = measure(tmp_path / "semantic.jsonl", *methods, ByPixels(2), k=K)
    assert {(record["method"], record["recognised"]) for record in records} == {
        ("yes", True), ("no", False), ("never", None), ("L2", None)
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------- SSIM

pictures = arrays(np.float32, (1, 9, 7), elements=st.floats(0, 1, width=32))


@given(pictures, pictures)
def test_ssim_is_symmetric_bounded_and_1_for_the_image_itself(x, y):
    assert ssim(x, x[None]) == pytest.approx(1)
    assert ssim(x, y[None]) == pytest.approx(ssim(y, x[None]))
    assert abs(ssim(x, y[None])[0]) <= 1 + 1e-9


@given(pictures, pictures)
def test_ssim_does_not_care_how_both_images_are_turned(x, y):
    turned = ssim(np.rot90(x, axes=(1, 2)).copy(), np.rot90(y, axes=(1, 2)).copy()[None])
    assert turned == pytest.approx(ssim(x, y[None]))


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.7), (0.0, 1.0), (0.5, 0.5)])
def test_ssim_of_uniform_images_is_their_luminance_term(a, b):
    uniform = np.full((3, 12, 12), a, np.float32), np.full((1, 3, 12, 12), b, np.float32)
    assert ssim(*uniform)[0] == pytest.approx((2 * a * b + C1) / (a**2 + b**2 + C1), abs=1e-6)


def test_ssim_is_that_of_wangs_formulas_written_out():
    x, y = np.random.default_rng(0).random((2, 14, 13)).astype(np.float32)
    distance = np.arange(-5, 6)
    window = np.exp(-(distance[:, None] ** 2 + distance**2) / (2 * 1.5**2))
    window /= window.sum()
    padded_x, padded_y = np.pad(x, 5, mode="symmetric"), np.pad(y, 5, mode="symmetric")
    values = []
    for row, column in np.ndindex(x.shape):
        p, q = (padded[row : row + 11, column : column + 11] for padded in (padded_x, padded_y))
        mp, mq = (window * p).sum(), (window * q).sum()
        vp, vq, cov = ((window * u * v).sum() for u, v in ((p - mp, p - mp), (q - mq, q - mq), (p - mp, q - mq)))
        values.append((2 * mp * mq + C1) * (2 * cov + C2) / ((mp**2 + mq**2 + C1) * (vp + vq + C2)))
    assert ssim(x[None], y[None, None])[0] == pytest.approx(np.mean(values), abs=1e-8)


def test_ssim_falls_with_noise_and_is_negative_for_a_negative():
    image = QUERIES[0]
    noise = np.random.default_rng(0).standard_normal(image.shape).astype(np.float32)
    others = np.stack([image, image + 0.05 * noise, image + 0.2 * noise, 1 - image])
    values = ssim(image, others)
    assert values[0] > values[1] > values[2] > 0 > values[3]
    assert [ssim(image, other[None])[0] for other in others] == pytest.approx(values)  # one by one as together


# -------------------------------------------------------------------------------------------- records


def test_records_say_what_a_count_by_hand_says(tmp_path: Path):
    records = measure(tmp_path / "semantic.jsonl", ByPixels(1), ByPixels(2), k=K)
    assert [(record["query"], record["method"]) for record in records] == [
        (q, m) for q in range(Q) for m in ("L1", "L2")
    ]
    for record in records:
        query = QUERIES[record["query"]]
        scores = ByPixels(int(record["method"][1])).scores(query)
        rows = sorted(range(N), key=lambda row: (-scores[row], row))[:K]
        votes = [int(LABELS[row]) for row in rows]
        assert record["neighbours"] == [f"digit {row:03}" for row in rows]
        assert record["label"] == QUERY_LABELS[record["query"]]
        assert record["label_precision"] == pytest.approx(votes.count(record["label"]) / K)
        winner = max(votes, key=lambda label: (votes.count(label), -votes.index(label)))
        assert record["knn_correct"] is (winner == record["label"])
        nearest = [IMAGES[row, None].astype(np.float32) / 255 for row in rows[:SHOWN]]
        assert record["ssim"] == pytest.approx(np.mean([ssim(query, image[None])[0] for image in nearest]))
    assert len({record["label_precision"] for record in records}) > 1


@pytest.mark.parametrize(("nearest", "correct"), [(0, True), (1, False)])
def test_a_tied_vote_goes_to_the_nearest(tmp_path: Path, nearest: int, correct: bool):
    own = int(QUERY_LABELS[0])
    labels = np.array([own, own + 1] * (N // 2))
    exemplars = make_exemplars(labels=np.roll(labels, -nearest))
    record = measure(tmp_path / "semantic.jsonl", InOrder(), exemplars=exemplars, k=4)[0]
    assert record["label_precision"] == 0.5
    assert record["knn_correct"] is correct


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, measured: Path):
    path = tmp_path / "again.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measure(path, ByPixels(1), ByPixels(2, breaks_after=2), k=K)
    with pytest.raises(InputError, match="query 2 lacks methods"):
        read_neighbours(path)
    first, second = ByPixels(1), ByPixels(2)
    measure(path, first, second, k=K)
    assert (first.searches, second.searches) == (Q - 3, Q - 2)
    assert path.read_text() == measured.read_text()


def test_progress_ends_at_the_last_search_even_if_all_was_done(measured: Path):
    steps = []
    measure(measured, ByPixels(1), ByPixels(2), k=K, progress=lambda *step: steps.append(step))
    assert steps == [("searching", done, 2 * Q) for done in range(1, 2 * Q + 1)]


@pytest.mark.parametrize("k", [0, N + 1])
def test_k_must_be_possible(tmp_path: Path, k: int):
    with pytest.raises(InputError, match=f"k from 1 to {N}"):
        measure(tmp_path / "semantic.jsonl", InOrder(), k=k)


def test_methods_need_names_of_their_own(tmp_path: Path):
    with pytest.raises(InputError, match="names of their own, got L1, L1"):
        measure(tmp_path / "semantic.jsonl", ByPixels(1), ByPixels(1))


def test_other_records_are_not_taken_for_neighbours(tmp_path: Path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"settings": {}}\n{"query": 0, "method": "l2", "rank": 3}\n')
    with pytest.raises(InputError, match="semantic benchmark, got one without 'neighbours'"):
        read_neighbours(path)
    path.write_text('{"settings": {}}\n')
    with pytest.raises(InputError, match="there are none"):
        read_neighbours(path)


# -------------------------------------------------------------------------------------------- gallery


def frames(path: Path) -> dict[str, int]:
    """How many pixels a picture has of each frame colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return {
        colour: int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1).sum())
        for colour in (SAME, OTHER)
    }


def gallery(measured: Path, *, labels: np.ndarray = LABELS[:N], **options: object) -> Path:
    out = measured.with_suffix(".png")
    exemplars = make_exemplars(labels=labels)
    draw_gallery(neighbour_rows(measured, QUERIES, exemplars), QUERIES, QUERY_LABELS, exemplars, out, **options)
    return out


def test_frames_tell_agreement(measured: Path):
    shown = [
        LABELS[int(name.removeprefix("digit "))] == QUERY_LABELS[query]
        for query, sets in read_neighbours(measured).items()
        for ids in sets.values()
        for name in ids[:SHOWN]
    ]
    drawn = frames(gallery(measured))
    assert 0 < sum(shown) < len(shown)
    assert drawn[SAME] / sum(drawn.values()) == pytest.approx(np.mean(shown), abs=0.05)
    other = frames(gallery(measured, labels=np.full(N, 10), class_names=[*"0123456789", "a very long name of a class"]))
    assert other[SAME] == 0 < other[OTHER]


def test_a_gallery_has_a_row_for_each_query_asked_for(measured: Path):
    sizes = []
    for rows in (1, 3):
        with Image.open(gallery(measured, rows=rows)) as picture:
            sizes.append(picture.size)
    (width, low), (same_width, high) = sizes
    assert width == same_width
    assert high > 2 * low


def test_a_gallery_shows_fewer_than_three_neighbours_where_there_are_no_more(tmp_path: Path):
    measure(tmp_path / "semantic.jsonl", InOrder(), k=1)
    assert sum(frames(gallery(tmp_path / "semantic.jsonl")).values()) > 0


def test_a_gallery_needs_the_queries_and_exemplars_of_the_records(measured: Path):
    with pytest.raises(InputError, match="query 4 and there are only 3"):
        neighbour_rows(measured, QUERIES[:3], make_exemplars())
    with pytest.raises(InputError, match="no exemplar has the id 'digit"):
        neighbour_rows(measured, QUERIES, make_exemplars(labels=LABELS[:20]))
