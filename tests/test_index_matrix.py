"""Columns as mapped matrices: the same answers in any amount of memory; a cache that is never believed blindly."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.builders import tiny_arrays, tiny_classifier
from tests.conftest import network
from tests.test_index_neighbours import store_of
from tmm_engine import Engine, build_index
from tmm_engine.index import ArraySource
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours import matrix as module
from tmm_engine.index.neighbours.budget import BLOCK, Budget
from tmm_engine.index.neighbours.matrix import ALIGNED, Chosen, MatrixCache
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import Neighbours, exact_scores
from tmm_engine.index.neighbours.vectors import comparable
from tmm_engine.index.sizes import parse_size
from tmm_engine.index.store.manifest import Manifest

IMAGES, LABELS = tiny_arrays(0, 300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matrix") / "tiny.idx"
    build_index(ArraySource(IMAGES[:200], LABELS[:200]), path, tiny_classifier(), views=2)
    return path


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "tiny.idx"))


def answers(index: Path) -> list[list[tuple[str, float]]]:
    found = []
    with Engine.open(index, model=network(), device="cpu") as engine:
        for mode in ("robust", "l2", "cosine"):
            results = engine.search(list(IMAGES[250:256]), k=5, mode=mode)
            found += [[(hit.id, hit.score) for hit in result.hits] for result in results]
    return found


@pytest.mark.parametrize("queries", [1, 2, 3, module.FEW, module.FEW + 1])
@pytest.mark.parametrize("rows", [1, 1000])
def test_products_from_either_side_are_those_of_numpy(queries: int, rows: int):
    drawn = np.random.default_rng(0)
    values, xq = (drawn.normal(size=(count, 70)).astype(np.float32) for count in (rows, queries))
    products = module._products(torch.from_numpy(values), torch.from_numpy(xq), torch.empty(queries * rows + 1))
    assert products.is_contiguous()
    np.testing.assert_allclose(products.numpy(), xq.astype(float) @ values.T.astype(float), atol=1e-4)


def nearest_rows(values: np.ndarray, queries: np.ndarray, metric: Metric, count: int) -> np.ndarray:
    scores = np.stack([exact_scores(query, values, metric) for query in queries])
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("stays", [None, 0, 1, 5000])
def test_a_matrix_finds_the_same_whatever_stays_in_memory(
    tmp_path: Path, metric: Metric, stays: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "BLOCK", 4 * 8 * ALIGNED)  # of so many rows
    values = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float32)
    values[17] = 0
    cache = MatrixCache(tmp_path, "content", Budget(None if stays is None else stays * 32))
    cache.save("some_feature", iter(np.split(values, [7, 3000])), size=values.nbytes)
    mapped = cache.load("some_feature", rows=5000, dimension=8)
    assert mapped is not None
    queries = comparable(values[20:40] + np.float32(0.01), metric)
    for asked in (queries, queries[:1]):
        expected = nearest_rows(values, asked, metric, 12)
        np.testing.assert_array_equal(mapped.nearest(asked, fetch=12, metric=metric)[:, :12], expected)
    assert mapped.nearest(queries, fetch=9000, metric=metric).shape == (20, 5000)
    np.testing.assert_array_equal(mapped.take(np.array([4999, 0, 3])), values[[4999, 0, 3]])
    rows = np.flatnonzero(np.arange(5000) % 3)
    some = Chosen(mapped, rows)
    expected = nearest_rows(values[rows], queries, metric, 12)
    np.testing.assert_array_equal(some.nearest(queries, fetch=12, metric=metric)[:, :12], expected)
    np.testing.assert_array_equal(some.take(np.array([9, 1])), values[rows[[9, 1]]])


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("scale", [1e-42, 1e-34, 1e-20, 1e20, 1e34])
def test_features_whose_squares_float32_cannot_hold_are_ranked_all_the_same(metric: Metric, scale: float):
    values = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    values[::5] *= np.float32(scale)
    store = store_of(values)
    for query in (values[3], values[5], values[10] * np.float32(0.5)):
        [(rows, scores)] = Neighbours(store, metric).search(query[None], k=6)
        exact = exact_scores(query, values, metric)
        np.testing.assert_array_equal(scores, np.sort(exact)[::-1][:6])
        np.testing.assert_array_equal(exact[rows], scores)


def test_searches_are_the_same_with_and_without_the_cache(index: Path):
    (index / "cache").touch()  # a file: nothing can be kept
    without = answers(index)
    (index / "cache").unlink()
    assert answers(index) == without
    names = {path.name for path in (index / "cache").iterdir()}
    assert names >= {"copy_feature.f32", "robust_feature.f32", "feature.f32", "feature.f32.json"}
    assert answers(index) == without


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "not JSON", "other content"])
def test_anything_else_is_written_anew(index: Path, damage: str):
    expected = answers(index)
    path = index / "cache" / "robust_feature.f32"
    about, content = path.with_name(path.name + ".json"), path.read_bytes()
    if damage == "flipped":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "truncated":
        path.write_bytes(content[:-4])
    elif damage == "missing":
        path.unlink()
    elif damage == "not JSON":
        about.write_text("{")
    else:
        about.write_text(json.dumps(json.loads(about.read_text()) | {"content": "another"}))
    damaged = MatrixCache(index / "cache", Manifest.read(index).content).check(200)
    assert damaged == ([] if damage in ("missing", "other content") else [path])
    assert answers(index) == expected
    assert path.read_bytes() == content


def test_a_change_makes_other_matrices(index: Path):
    answers(index)
    with Engine.open(index, model=network(), device="cpu") as engine:
        engine.delete(ids=["00000007"])
    fresh = index.parent / "without.idx"
    shutil.copytree(index, fresh)
    shutil.rmtree(fresh / "cache")
    assert answers(index) == answers(fresh)


def test_an_index_that_changes_before_its_matrices_are_made_is_searched_as_it_was_opened(index: Path):
    def found(engine: Engine) -> list[str]:
        return [hit.id for hit in engine.search(IMAGES[7], k=5, mode="cosine").hits]

    with Engine.open(index, model=network(), device="cpu") as opened:
        with Engine.open(index, model=network(), device="cpu") as other:
            before = found(other)
            other.delete(ids=["00000007"])
            after = found(other)
        assert found(opened) == before
        with Engine.open(index, model=network(), device="cpu") as again:
            assert found(again) == after
        assert found(opened) == before
    assert "00000007" in set(before) - set(after)


# ---- memory


def test_what_is_left_beside_what_the_process_holds():
    budget = Budget.beside(4 << 30, held=1 << 30, images=1 << 30)
    assert budget.left == (2 << 30) - 2 * BLOCK
    assert [budget.take(1 << 30), budget.take(1 << 30), budget.take(1)] == [1 << 30, (1 << 30) - 2 * BLOCK, 0]
    assert Budget().take(1 << 40) == 1 << 40
    with pytest.raises(InputError, match=r"memory: the index takes 3 MiB, and 2\.0 MiB of the bound are left"):
        Budget(2 << 20).claim(3 << 20, "the index")
    with pytest.raises(InputError, match=r"memory: expected at least 1,536 MiB.*got 1,024 MiB"):
        Budget.beside(1 << 30, held=1 << 30, images=1 << 28)


def test_an_approximate_index_takes_what_pages_of_matrices_were_lent(tmp_path: Path):
    values = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float32)
    budget = Budget(values.nbytes + 1000)
    cache = MatrixCache(tmp_path, "content", budget)
    for column in ("first_feature", "second_feature"):
        cache.save(column, [values], size=values.nbytes)
    first, second = (cache.load(column, rows=5000, dimension=8) for column in ("first_feature", "second_feature"))
    assert (first.stays, second.stays, budget.left) == (5000, 0, 0)
    with pytest.raises(InputError, match=r"takes 1 MiB, and 0\.2 MiB of the bound are left"):
        budget.claim(1 << 20, "the index")
    assert (first.stays, second.stays) == (5000, 0), "what cannot be had takes nothing"
    budget.claim(values.nbytes // 2, "the index")
    assert 0 < first.stays <= 2500
    assert budget.left == 0
    claim = budget.claim(1, "another")
    claim.release()
    claim.release()
    budget.give_back(values.nbytes // 2)
    assert first.stays == 5000, "what is given back is lent again"
    budget.end(first.lease)
    assert second.stays == 5000
    expected = nearest_rows(values, comparable(values[20:40], Metric.COSINE), Metric.COSINE, 12)
    found = first.nearest(comparable(values[20:40], Metric.COSINE), fetch=12, metric=Metric.COSINE)
    np.testing.assert_array_equal(found[:, :12], expected)


def test_an_engine_answers_the_same_under_a_bound(index: Path):
    expected = answers(index)
    with Engine.open(index, model=network(), device="cpu", memory="64GiB") as engine:
        results = engine.search(list(IMAGES[250:256]), k=5)
    assert [[(hit.id, hit.score) for hit in result.hits] for result in results] == expected[:6]
    for memory, why in (("1MiB", "memory: expected at least"), ("much", "expected a size like")):
        with pytest.raises(InputError, match=why):
            Engine.open(index, model=network(), device="cpu", memory=memory)


@pytest.mark.parametrize("full", [False, True])
def test_what_neither_fits_nor_can_be_kept_is_read_by_every_search(
    index: Path, monkeypatch: pytest.MonkeyPatch, full: bool
):
    expected = answers(index)
    with Engine.open(index, model=network(), device="cpu") as engine:
        filtered = [hit.id for hit in engine.search(IMAGES[250], k=5, where="label > 0").hits]
    shutil.rmtree(index / "cache")
    if full:
        monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=module.SPARE + 100))
    else:
        (index / "cache").touch()
    monkeypatch.setattr(Budget, "beside", lambda *_, **__: Budget(100))
    with Engine.open(index, model=network(), device="cpu", memory="2GiB") as engine:
        for place, mode in enumerate(("robust", "l2", "cosine")):
            results = engine.search(list(IMAGES[250:256]), k=5, mode=mode)
            found = [[(hit.id, hit.score) for hit in result.hits] for result in results]
            assert found == expected[6 * place : 6 * place + 6]
        assert results[0].backend == "matrix products, fp32, features read from the index by every search"
        narrowed = engine.search(IMAGES[250], k=5, where="label > 0")
        assert [hit.id for hit in narrowed.hits] == filtered
        assert "read from the index by every search" in narrowed.backend
    if full:
        assert not list((index / "cache").glob("*.f32*"))


def test_what_an_engine_holds_of_features_leaves_as_much_for_the_next_version(
    index: Path, monkeypatch: pytest.MonkeyPatch
):
    held = iter([500 << 20, *[1900 << 20] * 9])
    monkeypatch.setattr("tmm_engine.snapshot.held_memory", lambda: next(held))
    with Engine.open(index, model=network(), device="cpu", memory="2GiB") as engine:
        engine.search(IMAGES[250], k=5, where="label >= 0")
        engine.delete(ids=[str(engine.store.ids[0])])
        assert len(engine) == 199
        assert engine.search(IMAGES[250], k=5).exemplars == 199


def test_sizes():
    assert [parse_size(text) for text in ("4GiB", "512 MB", "1.5kib", "17", 3)] == [4 << 30, 512 * 10**6, 1536, 17, 3]
    for bad in ("", "GiB", "4 parsecs", "-1"):
        with pytest.raises(InputError, match="expected a size like"):
            parse_size(bad)


# ---- precision


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_fewer_bits_find_the_same_and_say_how_far_they_agree(index: Path, precision: str):
    expected = answers(index)
    with Engine.open(index, model=network(), device="cpu", search_precision=precision) as engine:
        for mode, exact in zip(("robust", "l2", "cosine"), np.reshape(expected, (3, 6, 5, 2)), strict=True):
            results = engine.search(list(IMAGES[250:256]), k=5, mode=mode)
            assert [[hit.id for hit in result.hits] for result in results] == exact[:, :, 0].tolist()
            assert {result.backend for result in results} == {f"FAISS {'SQfp16' if precision == 'fp16' else 'SQ8'}"}
            for result in results:
                assert any(f"looked for in {precision}" in note and "% of hits" in note for note in result.notes)
        [filtered] = engine.search([IMAGES[250]], k=5, where="id < '00000050'")
        assert filtered.backend == "matrix products, fp32"
        assert not any("looked for" in note for note in filtered.notes)
    with pytest.raises(InputError, match="fp64"):
        Engine.open(index, model=network(), device="cpu", search_precision="fp64")


def test_agreement_is_of_what_was_first_before():
    values = np.array([[100.0, 0], [100.01, 0], [0, 50]], np.float32)
    [found] = Neighbours(store_of(np.repeat(values, 100, axis=0)), Metric.L2, factory="SQ8").ranked(values[:1], k=150)
    assert found.agreement == 1.0
    rows = np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32)
    ranked = Neighbours(store_of(rows), Metric.L2, factory="SQ4").ranked(rows[:50], k=10)
    assert 0.1 < np.mean([own.agreement for own in ranked]) < 0.95


def test_fp16_refuses_what_it_cannot_hold():
    with pytest.raises(InputError, match="fp16 holds numbers up to 65,504"):
        Neighbours(store_of(np.full((20, 4), 1e5)), Metric.L2, factory="SQfp16")
