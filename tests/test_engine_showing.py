"""What page and picture have in common: any text, unchanged inputs, files written whole or not at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.made_results import make_hit, make_result
from tests.page import Page
from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.rerank import TmmConfig
from tmm_engine.results import FailedQuery
from tmm_engine.views.page import write_html
from tmm_engine.views.picture import write_png
from tmm_engine.views.showing import Block, by_query, confidence, facts, meanings


def test_the_same_querys_results_share_a_block_with_its_errors_once() -> None:
    a, b = make_result("a"), make_result("b", mode="cosine")
    failed = FailedQuery("b", "broken")
    assert by_query([a, a, failed, b, failed, a]) == [
        Block("a", [a, a], []),
        Block("b", [b], ["broken"]),
        Block("a", [a], []),
    ]


def test_a_row_says_what_its_querys_heading_does_not() -> None:
    first = make_result(mode="tmm")  # predicted 2; its neighbours are 0, 1, 2, 3
    stretched = replace(first, predicted_label=3, predicted_class="the 3")
    block = Block("q0", [first, stretched], [])
    assert facts(first, block) == "1 of 4 in the query’s class · 1,797 of 1,797 scored · 1.25 s"
    assert facts(stretched, block).startswith("here predicted the 3 · 1 of 4 in that class · 1,797")
    labelled = replace(stretched, true_label=7, true_class="the 7")
    assert facts(labelled, block).startswith("here predicted the 3 · 0 of 4 in the query’s class · 1,797")


def test_recognition_is_said_once() -> None:
    silent = replace(make_result(), recognised_as="digit-7")
    noted = replace(silent, notes=("recognised as digit-7: ranked by what is like that exemplar",))
    assert [facts(each, Block("q0", [each], [])).endswith(" · recognised as digit-7") for each in (silent, noted)] == [
        True,
        False,
    ]


def test_meanings_are_those_of_each_mode_and_setting() -> None:
    tuned, baseline = make_result(mode="tmm"), make_result(mode="l2")
    fused = replace(tuned, config=TmmConfig().with_settings(["head=discriminant", "fusion=4"]).to_json())
    blocks = [Block("a", [tuned, baseline, fused], []), Block("b", [tuned], []), Block("c", [], ["broken"])]
    assert meanings(blocks) == {
        "tmm": [
            f"score: {tuned.score_meaning}",
            tuned.confidence_meaning,
            f"or, by a row’s own settings, score: {fused.score_meaning}",
            fused.confidence_meaning,
        ],
        "l2": [f"score: {baseline.score_meaning}"],
    }


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.00"), (1e-9, "<0.01"), (0.00499, "<0.01"), (0.005, "0.01"), (0.5, "0.50"), (1.0, "1.00")],
)
def test_a_small_confidence_is_not_zero(value: float, shown: str) -> None:
    assert confidence(value) == shown


@settings(max_examples=25)
@given(text=st.text(st.characters(codec=None, exclude_categories=()), min_size=1, max_size=40))
def test_any_text_can_be_reported(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    result = replace(make_result(text, k=1), hits=(replace(make_hit(0), id=text, class_name=text),))
    write_html([result], folder / "page.html", title=text)
    Page((folder / "page.html").read_text(encoding="utf-8"))
    write_png([result], folder / "sheet.png")


@pytest.mark.parametrize("write", [write_html, write_png])
class TestBoth:
    def test_same_results_same_bytes_and_no_leftovers(self, write, tmp_path: Path) -> None:
        results = [make_result(mode="tmm", colour=True)]
        write(results, tmp_path / "a")
        (tmp_path / "b").write_text("older")
        write(results, tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]

    def test_a_path_may_be_text(self, write, tmp_path: Path) -> None:
        write([make_result()], str(tmp_path / "answer"))
        assert (tmp_path / "answer").stat().st_size > 0

    def test_inputs_are_not_changed(self, write, tmp_path: Path) -> None:
        result = make_result(mode="tmm")
        arrays = (result.query_image, result.trigger, result.triggered_query, result.hits[0].image)
        before = [np.array(array) for array in arrays]
        write([result], tmp_path / "a")
        for array, old in zip(arrays, before, strict=True):
            assert np.array_equal(array, old)

    def test_existing_file_survives_a_bad_image(self, write, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("older")
        bad = replace(make_result("q1"), query_image=np.zeros((2, 8, 8), np.uint8))
        with pytest.raises(ImageError, match="expected an image of 1 or 3 channels, got 2"):
            write([make_result(), bad], tmp_path / "a")
        assert (tmp_path / "a").read_text() == "older"

    def test_existing_file_survives_a_full_disk(self, write, tmp_path: Path) -> None:
        resource = pytest.importorskip("resource")
        (tmp_path / "a").write_text("older")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # Python ignores SIGXFSZ: write fails with EFBIG
        try:
            with pytest.raises(InputError, match="File too large"):
                write([make_result()], tmp_path / "a")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert (tmp_path / "a").read_text() == "older"

    def test_unwritable_targets(self, write, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("older")
        for target in (tmp_path / "none" / "a", tmp_path / "file" / "a", tmp_path / ("n" * 300)):
            with pytest.raises(InputError, match="expected a file name in an existing, writable folder, got"):
                write([make_result()], target)
        with pytest.raises(InputError, match="folder or a device"):
            write([make_result()], tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_link_keeps_pointing(self, write, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "real")
        write([make_result()], tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").stat().st_size > 0

    def test_no_results(self, write, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="at least one search result"):
            write([], tmp_path / "a")
