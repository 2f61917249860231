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
from tmm_engine.views.page import write_html
from tmm_engine.views.picture import write_png


@settings(max_examples=25, deadline=None)
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
