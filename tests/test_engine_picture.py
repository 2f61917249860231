"""The sheet: its size, its pixels, its frames."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.made_results import HOSTILE, make_hit, make_result, make_wordy
from tmm_engine.index.errors import InputError
from tmm_engine.rerank import TmmConfig
from tmm_engine.results import FailedQuery, SearchResult
from tmm_engine.views.picture import CELL, MAX_SHEET_PIXELS, write_png


def size_of(results: Sequence[SearchResult | FailedQuery], folder: Path, **options: int) -> tuple[int, int]:
    write_png(results, folder / "sheet.png", **options)
    with Image.open(folder / "sheet.png") as sheet:
        sheet.load()
        return sheet.size


def pixels_of(results: Sequence[SearchResult | FailedQuery], folder: Path) -> np.ndarray:
    write_png(results, folder / "sheet.png")
    with Image.open(folder / "sheet.png") as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_sheet_says_in_a_rows_heading_what_was_recognised(tmp_path: Path) -> None:
    def sheet(recognised_as: str | None) -> np.ndarray:
        results = [replace(make_result(mode="cosine"), recognised_as=recognised_as), make_result(mode="l2")]
        return pixels_of(results, tmp_path)

    def rows(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.abs(one - other).any(axis=(1, 2)))

    without, seven, nine = (sheet(name) for name in (None, "digit-7", "digit-9"))
    assert without.shape == seven.shape == nine.shape
    heading = rows(without, seven)
    assert 0 < np.ptp(heading) < CELL / 4  # one line
    assert 0 < len(rows(seven, nine)) <= len(heading)
    assert sheet(HOSTILE).shape == without.shape


def test_notes_and_errors_take_the_lines_they_need(tmp_path: Path) -> None:
    def height(*results: SearchResult | FailedQuery) -> int:
        return size_of(results, tmp_path)[1]

    plain, note = make_result(), "An answer with a note."
    one, two, long = (
        height(replace(plain, notes=notes)) - height(plain) for notes in ((note,), (note, note), (note * 12,))
    )
    assert 0 < one < CELL / 4
    assert two == 2 * one
    assert 2 * one < long < CELL
    failed = height(plain, FailedQuery("b", "broken")) - height(plain)
    assert 0 < failed < CELL
    assert height(plain, FailedQuery("b", "broken " * 40)) - height(plain) > failed
    reds = (pixels_of([FailedQuery("b", "broken")], tmp_path) == (0xC4, 0x34, 0x2D)).all(-1)
    assert reds.any()


def test_legend_says_what_the_numbers_are(tmp_path: Path) -> None:
    found = make_result(mode="tmm")
    sheets = [
        pixels_of([replace(found, config=TmmConfig().with_settings(settings).to_json())], tmp_path)
        for settings in ([], ["head.score=logit"], [])
    ]
    assert np.array_equal(sheets[0], sheets[2])
    differing = np.flatnonzero((sheets[0] != sheets[1]).any(axis=(1, 2)))
    assert 0 < np.ptp(differing) < CELL / 4  # one line …
    assert differing.max() < CELL  # … of the legend


def test_signs_that_the_font_lacks_are_replaced(tmp_path: Path) -> None:
    dashes, plain = (pixels_of([FailedQuery("q", text)], tmp_path) for text in ("8 × 8 − 1–2—3 ß", "8 x 8 - 1-2-3 ss"))
    assert np.array_equal(dashes, plain)


def test_sheet_grows_with_neighbours_modes_and_queries(tmp_path: Path) -> None:
    width, height = size_of([make_result(k=5)], tmp_path)
    assert width > 5 * CELL
    assert height > CELL
    wider, same_height = size_of([make_result(k=8)], tmp_path)
    assert wider - width >= 3 * CELL
    assert same_height == height
    assert size_of([make_result(k=5), make_result(k=5, mode="cosine")], tmp_path)[1] - height >= CELL
    assert size_of([make_result(k=5), make_result("q1", k=5)], tmp_path)[1] - height >= CELL
    narrow, wrapped = size_of([make_result(k=8)], tmp_path, columns=4)
    assert narrow < wider
    assert wrapped - height >= CELL


def test_sheet_shows_the_neighbours_pixels_enlarged(tmp_path: Path) -> None:
    result = make_result(k=1, colour=True)
    write_png([result], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    block = np.kron(result.hits[0].image.transpose(1, 2, 0), np.ones((CELL // 8, CELL // 8, 1), np.uint8))
    corner = block[-40:, :40]  # the top right carries the mark; the search below is for a part, to stay quick
    windows = np.lib.stride_tricks.sliding_window_view(sheet, corner.shape)[:, :, 0]
    firsts = np.argwhere((windows[..., 0, 0, :] == corner[0, 0]).all(-1))
    assert any(np.array_equal(windows[y, x], corner) for y, x in firsts)


def test_frames_differ_in_colour_and_in_shape(tmp_path: Path) -> None:
    one = make_result(k=1)  # the digit 0
    greens, reds = [], []
    for true_label in (0, 1):
        write_png([replace(one, true_label=true_label)], tmp_path / "sheet.png")
        sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).reshape(-1, 3)
        greens.append(int((sheet == (0x1A, 0x7F, 0x4B)).all(1).sum()))
        reds.append(int((sheet == (0xC4, 0x34, 0x2D)).all(1).sum()))
    assert greens[0] > 1.5 * reds[1] > 0  # solid has more of its colour than dashed
    assert greens[1] == reds[0] == 0


def test_sheet_handles_single_large_and_absent_images(tmp_path: Path) -> None:
    large = np.full((3, 300, 200), 90, np.uint8)
    hit = replace(make_hit(0), image=large)
    size_of([replace(make_result(k=1), query_image=large, hits=(hit,))], tmp_path)
    size_of([make_result(k=0)], tmp_path)


def test_sheet_refuses_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1 column, got 0"):
        write_png([make_result()], tmp_path / "a", columns=0)
    rows = MAX_SHEET_PIXELS // (5 * CELL) // CELL
    with pytest.raises(InputError, match="write an HTML page instead"):
        write_png([make_result(str(i), k=1) for i in range(rows)], tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [HOSTILE, "x" * 10_000_000])
def test_any_text_is_cut_to_the_sheet(tmp_path: Path, text: str) -> None:
    assert size_of([make_wordy(text)], tmp_path) == size_of([make_wordy("short")], tmp_path)
