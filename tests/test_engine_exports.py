"""Answers as tables, Parquet, pictures and what a notebook shows."""

import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.digits import IMAGES, make_classifier, write_photos
from tests.made_results import HOSTILE, make_hit, make_result, make_wordy
from tests.page import Page
from tmm_engine import Engine, FailedQuery, Hit, SearchResults, build_index, write_parquet, write_png
from tmm_engine.cli.main import main
from tmm_engine.index.errors import InputError
from tmm_engine.views.notebook import MAX_HITS, MAX_RESULTS

FAILED = FailedQuery("broken\udcff.png", "expected an image")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    build_index(write_photos(folder / "photos", count=30), folder / "photos.idx", make_classifier(), views=0)
    return folder / "photos.idx"


# ---- tables


def test_a_row_says_of_its_hit_what_the_hit_says():
    result = replace(make_result(mode="tmm"), true_class="the 3", recognised_as="digit-0")
    rows = result.to_arrow().to_pylist()
    assert len(rows) == len(result.hits)
    for row, hit in zip(rows, result.hits, strict=True):
        told = {name: value for name, value in hit.to_json().items() if name != "metadata"}
        assert row == told | {
            "query": "q0", "mode": "tmm", "query_predicted_class": "the 2", "query_true_class": "the 3",
            "recognised_as": "digit-0",
        }  # fmt: skip


def test_no_attribute_of_a_hit_is_forgotten():
    exported = make_result().to_arrow().column_names
    assert [field.name for field in fields(Hit) if field.name not in exported] == ["metadata", "image"]


def test_metadata_follow_and_give_way():
    hits = (
        replace(make_hit(0), metadata={"path": "a", "rank": 7, "source_rank": 8, "page": 1}),
        replace(make_hit(1), metadata={"path": "b", "sharp": True}),
    )
    rows = replace(make_result(), hits=hits).to_arrow().to_pylist()
    assert [row["rank"] for row in rows] == [0, 1]
    names = ("source_source_rank", "source_rank", "page", "path", "sharp")
    assert [[row[name] for name in names] for row in rows] == [[7, 8, 1, "a", None], [None, None, None, "b", True]]


def test_metadata_on_whose_type_two_indexes_disagree_are_text():
    hits = [replace(make_hit(0), metadata={"page": page}) for page in (3, "iii", None)]
    results = SearchResults(replace(make_result(), hits=(hit,)) for hit in hits)
    assert results.to_arrow()["page"].to_pylist() == ["3", "iii", None]


def test_many_answers_are_one_table_in_which_a_query_that_failed_says_why():
    results = SearchResults([make_result("q0", k=2), FAILED, make_result("q1", mode="tmm", k=1)])
    table = results.to_arrow()
    assert table["query"].to_pylist() == ["q0", "q0", r"broken\udcff.png", "q1"]
    assert table["error"].to_pylist() == [None, None, "expected an image", None]
    assert {name for name, value in table.to_pylist()[2].items() if value is not None} == {"query", "error"}
    assert table.schema == SearchResults([FAILED]).to_arrow().schema
    assert SearchResults().to_arrow().schema == table.schema


def test_pandas_and_polars_have_what_arrow_has():
    results = SearchResults([make_result(mode="tmm", k=2), FAILED])
    table = results.to_arrow()
    frame = results.to_pandas()
    assert [*frame.columns] == results.to_polars().columns == table.column_names
    assert results.to_polars().rows(named=True) == table.to_pylist()
    assert [value for value in frame["label"] if value is not frame["label"].dtype.na_value] == [0, 2 - 1]
    assert str(frame["label"].dtype) == "Int64"  # also where one is missing
    assert make_result(k=3).to_pandas()["score"].tolist() == [-1.5, -2.5, -3.5]


@pytest.mark.parametrize("extra", ["pandas", "polars"])
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, extra: str):
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(InputError, match=rf"'{extra}' extra: pip install 'tmm-engine\[{extra}\]'"):
        getattr(make_result(), f"to_{extra}")()


def test_parquet_is_written_whole_or_not_at_all(tmp_path: Path):
    results = SearchResults([make_result(), FAILED])
    write_parquet(results, str(tmp_path / "answers.parquet"))
    assert pq.read_table(tmp_path / "answers.parquet") == results.to_arrow()
    assert pl.read_parquet(tmp_path / "answers.parquet").height == 5
    with pytest.raises(InputError, match="at least one"):
        write_parquet([], tmp_path / "answers.parquet")
    with pytest.raises(InputError, match="existing, writable folder"):
        write_parquet(results, tmp_path / "gone" / "answers.parquet")


def test_command_line_and_python_write_the_same(index: Path, tmp_path: Path):
    out, broken = tmp_path / "answers.parquet", tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    Image.fromarray(IMAGES[40]).save(tmp_path / "query.png")
    queries = [str(tmp_path / "query.png"), str(broken)]
    done = CliRunner().invoke(main, ["search", str(index), *queries, "--mode", "l2", "-k", "4", "--out", str(out)])
    assert done.exit_code == 1  # one of them is broken
    assert f"wrote {out}" in done.stderr
    with Engine.open(index) as engine:
        results = engine.search_each(queries, mode="l2", k=4)
    assert pq.read_table(out) == results.to_arrow()


@pytest.mark.parametrize(("name", "code"), [("answers.csv", 2), ("gone/answers.parquet", 1)])
def test_where_no_answers_can_go_is_said_before_the_search(tmp_path: Path, name: str, code: int):
    done = CliRunner().invoke(main, ["search", "gone.idx", "--id", "x", "--out", str(tmp_path / name)])
    assert done.exit_code == code
    assert "gone.idx" not in done.stderr


def test_a_list_of_queries_has_a_list_of_answers_that_can_be_exported(index: Path):
    with Engine.open(index) as engine:
        found = engine.search([IMAGES[40], IMAGES[41]], mode="l2", k=2)
        alone = engine.search(IMAGES[40], mode="l2", k=2)
        assert isinstance(found, SearchResults)
        assert engine.search([], mode="l2") == []
    assert [hit.id for hit in found[0].hits] == [hit.id for hit in alone.hits]
    assert found.to_arrow().drop_columns("error").slice(0, 2) == found[0].to_arrow()


def test_exemplars_are_a_table_too():
    images, numbers = np.repeat(IMAGES[:12, None], 1, axis=1), [*range(12)]
    classifier = make_classifier()
    engine = Engine.from_arrays(images, numbers % np.int64(10), classifier, metadata={"page": numbers}, views=0)
    table = engine.to_arrow(columns=["feature", "image"])
    assert [*table.column_names][:4] == ["id", "label", "class_name", "label_is_predicted"]
    assert (table["page"].to_pylist(), table["class_name"].to_pylist()[9:]) == (numbers, ["9", "0", "1"])
    assert np.array_equal(np.array(table["image"].to_pylist(), np.uint8).reshape(images.shape), images)
    assert np.array_equal(np.array(table["feature"].to_pylist(), np.float32), engine.store.features(np.arange(12)))
    assert engine.matching("page < 3").to_arrow() == engine.to_arrow().slice(0, 3)
    with pytest.raises(InputError, match=r"'features' \(did you mean 'feature'\?\); there are image, feature"):
        engine.to_arrow(columns=["features"])


def test_exemplars_on_disk_have_their_metadata(index: Path):
    with Engine.open(index) as engine:
        table = engine.to_arrow()
        assert table["id"].to_pylist() == [*engine.store.ids]
        assert table["path"].to_pylist() == [row["path"] for row in engine.store.metadata(np.arange(len(engine)))]


# ---- pictures


def test_what_is_printed_is_short_and_has_no_pixels():
    assert repr(make_result()) == (
        "<SearchResult of 'q0' by l2, predicted the 2: digit-0 (the 0, -1.5), digit-1 (the 1, -2.5), "
        "digit-2 (the 2, -3.5), and 1 more>"
    )
    assert "array" not in repr(make_hit(0))


def test_plot_is_the_sheet(tmp_path: Path):
    results = SearchResults([make_result(k=3), FAILED])
    write_png(results, tmp_path / "sheet.png", columns=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(results.plot(columns=2)))
    assert make_result().plot().size[0] > 500
    with pytest.raises(InputError, match="at least one"):
        SearchResults().plot()


def test_a_notebook_shows_the_query_and_its_neighbours():
    result = make_result(k=3)
    page = Page(result._repr_html_())
    pictures = dict(page.pictures())
    assert [*pictures] == ["the query", "neighbour 1", "neighbour 2", "neighbour 3"]
    assert np.array_equal(pictures["the query"], result.query_image[0])
    for hit in result.hits:
        assert np.array_equal(pictures[f"neighbour {hit.rank + 1}"], hit.image[0])
    told = " ".join(text for _, text in page.texts)
    for words in ("q0", "predicted the 2", "digit-2", "-3.500", "✓ the 2", "✗ the 0", "minus the Euclidean distance"):
        assert words in told


def test_a_large_image_is_reduced_and_much_is_counted():
    large = np.zeros((3, 300, 200), dtype=np.uint8)
    hits = tuple(replace(make_hit(0), image=large, rank=rank) for rank in range(MAX_HITS + 2))
    page = Page(replace(make_result(), hits=hits)._repr_html_())
    pictures = dict(page.pictures())
    assert len(pictures) == MAX_HITS + 1
    assert max(pictures["neighbour 1"].shape) == 128
    assert "2 more neighbours" in " ".join(text for _, text in page.texts)
    many = SearchResults([make_result(f"q{number}", k=1) for number in range(MAX_RESULTS + 1)])
    assert "and 1 more result" in many._repr_html_()


def test_texts_cannot_break_a_notebook():
    page = Page(make_wordy(HOSTILE)._repr_html_())
    assert not any(tag == "script" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert Page(SearchResults([FailedQuery(HOSTILE, HOSTILE)])._repr_html_()).texts
    assert Page(SearchResults()._repr_html_()).texts == []


def test_a_part_of_the_answers_can_be_turned_into_what_they_can():
    results = SearchResults([make_result("q0", k=2), FAILED, make_result("q1", k=1)])
    assert isinstance(results[:2], SearchResults)
    assert results[::2].to_arrow()["query"].to_pylist() == ["q0", "q0", "q1"]
    assert results[-1].query == "q1"
