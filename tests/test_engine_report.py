"""The page and the sheet: complete, escaped, self-contained, and written whole or not at all."""

import base64
import io
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.digits import IMAGES as DIGITS
from tests.digits import LABELS
from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.rerank import TmmConfig
from tmm_engine.results import Hit, SearchResult
from tmm_engine.views.report import CELL, MAX_SHEET_PIXELS, MAX_TEXT, write_html, write_png

IMAGES = DIGITS[:, None]  # (1797, 1, 8, 8)
VOID = {"meta", "img", "link", "br", "hr", "input"}
HOSTILE = "<script>alert('x')</script>\" onmouseover=\"y & ü\n{{ 7*7 }}"


def make_hit(rank: int, *, mode: str = "l2", colour: bool = False) -> Hit:
    image = np.concatenate([IMAGES[rank], IMAGES[rank + 1], IMAGES[rank + 2]]) if colour else IMAGES[rank]
    label = int(LABELS[rank])
    confidence = 0.75 if mode == "tmm" else None
    return Hit(rank, f"digit-{rank}", label, f"the {label}", False, -1.5 - rank, confidence, {}, image)


def make_result(query: str = "q0", *, mode: str = "l2", k: int = 4, colour: bool = False) -> SearchResult:
    hits = tuple(make_hit(rank, mode=mode, colour=colour) for rank in range(k))
    trigger = np.linspace(-0.5, 0.25, hits[0].image.size, dtype=np.float32).reshape(hits[0].image.shape) if k else None
    tmm = mode == "tmm"
    return SearchResult(
        query=query,
        mode=mode,
        hits=hits,
        predicted_label=2,
        predicted_class="the 2",
        true_label=None,
        true_class=None,
        scored=1797,
        exemplars=1797,
        config=TmmConfig(seed=20).to_json() if tmm else None,
        backend="torch fp32 on cpu",
        timings={"features": 0.25, "search": 1.0},
        notes=("Only some were scored.",) if tmm else (),
        query_image=np.array(make_hit(9, colour=colour).image),
        trigger=trigger if tmm else None,
        triggered_query=make_hit(9, colour=colour).image / np.float32(200) if tmm else None,
    )


class Page(HTMLParser):
    """Checks that tags balance and gathers attributes and the text of every element by class."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute is given twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1][1] if self.open else "", data.strip()))

    def of_class(self, name: str) -> list[str]:
        return [text for classes, text in self.texts if name in classes.split()]

    def pictures(self) -> list[tuple[str, np.ndarray]]:
        """The alternative text and the pixels, (h, w) or (h, w, c), of every image."""
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                head, content = (attributes["src"] or "").split(",")
                assert head == "data:image/png;base64"
                pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))
                found.append((attributes["alt"] or "", pixels))
        return found


def html_of(results: list[SearchResult], folder: Path, **options: str) -> str:
    write_html(results, folder / "page.html", **options)
    return (folder / "page.html").read_text(encoding="utf-8")


def size_of(results: list[SearchResult], folder: Path, **options: int) -> tuple[int, int]:
    write_png(results, folder / "sheet.png", **options)
    with Image.open(folder / "sheet.png") as sheet:
        sheet.load()
        return sheet.size


def test_page_shows_every_hit_once_and_groups_by_query(tmp_path: Path) -> None:
    results = [make_result("a", mode="tmm"), make_result("a", mode="cosine"), make_result("b")]
    page = Page(html_of(results, tmp_path, title="Digits", index_name="digits.idx"))
    assert Counter(page.of_class("id")) == {f"digit-{rank}": 3 for rank in range(4)}
    assert [tag for tag, _ in page.tags].count("article") == 2
    assert [tag for tag, _ in page.tags].count("section") == 3
    texts = [text for _, text in page.texts]
    for expected in (
        "Digits",
        "digits.idx",
        "trigger ±0.5",
        "Only some were scored.",
        "seed",
        "20",
        "1.25 s",
        "250.0 ms",
    ):
        assert expected in texts, expected


@pytest.mark.parametrize("colour", [False, True])
def test_images_decode_to_the_very_pixels(tmp_path: Path, colour: bool) -> None:
    result = make_result(mode="tmm", colour=colour)
    query, trigger, triggered, *neighbours = [
        pixels if colour else pixels[..., None] for _, pixels in Page(html_of([result], tmp_path)).pictures()
    ]
    assert np.array_equal(query, result.query_image.transpose(1, 2, 0))
    for hit, shown in zip(result.hits, neighbours, strict=True):
        assert np.array_equal(shown, hit.image.transpose(1, 2, 0))
    assert result.triggered_query is not None
    clipped = np.minimum(result.triggered_query, 1).transpose(1, 2, 0)  # the fixture exceeds 1
    assert result.triggered_query.max() > 1
    assert np.abs(triggered / 255 - clipped).max() <= 0.5 / 255 + 1e-6
    assert trigger.min() == 0  # -0.5, the larger end
    assert trigger.max() == round(127.5 + 127.5 / 2)  # +0.25


def test_a_trigger_of_zeros_is_mid_grey(tmp_path: Path) -> None:
    result = replace(make_result(mode="tmm"), trigger=np.zeros((1, 8, 8), np.float32))
    _, (_, trigger), *_ = Page(html_of([result], tmp_path)).pictures()
    assert (trigger == 128).all()


@pytest.mark.parametrize(("true_label", "same"), [(None, 2), (3, 3), (7, None)])
def test_marks_follow_the_true_label_or_else_the_prediction(
    tmp_path: Path, true_label: int | None, same: int | None
) -> None:
    true_class = None if true_label is None else f"class {true_label}"
    result = replace(make_result(), true_label=true_label, true_class=true_class)
    page = Page(html_of([result], tmp_path))
    assert page.of_class("mark") == ["✓" if hit.label == same else "✗" for hit in result.hits]
    assert [alt.endswith("the query’s class") for alt, _ in page.pictures()[1:]] == [
        hit.label == same for hit in result.hits
    ]
    shown = {text for _, text in page.texts}
    assert ("true label" in shown) == (true_label is not None)
    assert ("class 7" in shown) == (true_label == 7)


def test_predicted_labels_are_marked(tmp_path: Path) -> None:
    result = make_result()
    guessed = replace(result, hits=(replace(result.hits[0], label_is_predicted=True), *result.hits[1:]))
    given_only, one_guess = (Page(html_of([each], tmp_path)).of_class("tag") for each in (result, guessed))
    assert len(one_guess) == len(given_only) + 1  # the legend has one always


def test_page_says_in_a_rows_heading_what_was_recognised(tmp_path: Path) -> None:
    results = [make_result("a"), make_result("a", mode="cosine"), make_result("b")]
    results[1] = replace(results[1], recognised_as="digit-7", recognised_share=0.9)
    results[2] = replace(results[2], recognised_share=0.4)  # not far enough
    headings = [text for text in Page(html_of(results, tmp_path)).of_class("faint") if "scored" in text]
    assert [heading.endswith(" · recognised as digit-7") for heading in headings] == [False, True, False]
    assert [heading.count("recognised") for heading in headings] == [0, 1, 0]


def test_sheet_says_in_a_rows_heading_what_was_recognised(tmp_path: Path) -> None:
    def sheet(recognised_as: str | None) -> np.ndarray:
        results = [replace(make_result(mode="cosine"), recognised_as=recognised_as), make_result(mode="l2")]
        write_png(results, tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as picture:
            return np.asarray(picture.convert("RGB")).astype(int)

    def rows(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.abs(one - other).any(axis=(1, 2)))

    without, seven, nine = (sheet(name) for name in (None, "digit-7", "digit-9"))
    assert without.shape == seven.shape == nine.shape
    heading = rows(without, seven)
    assert 0 < np.ptp(heading) < CELL / 4  # one line
    assert 0 < len(rows(seven, nine)) <= len(heading)
    assert sheet(HOSTILE).shape == without.shape


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hit = replace(make_hit(0), id=HOSTILE, class_name=HOSTILE, metadata={HOSTILE: HOSTILE, "n": None})
    result = replace(
        make_result(HOSTILE, mode="tmm"),
        hits=(hit,),
        predicted_class=HOSTILE,
        notes=(HOSTILE,),
        recognised_as=HOSTILE,
        config=TmmConfig().to_json() | {HOSTILE: HOSTILE},
        backend="torch fp32 on cpu",
        timings={HOSTILE: 1.0},
    )
    source = html_of([result], tmp_path, title=HOSTILE, index_name=HOSTILE)
    page = Page(source)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.of_class("id") == [HOSTILE]
    assert any(attributes.get("title") == HOSTILE for _, attributes in page.tags)
    size_of([result], tmp_path)


@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(codec=None, exclude_categories=()), min_size=1, max_size=40))
def test_any_text_can_be_reported(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    result = replace(make_result(text, k=1), hits=(replace(make_hit(0), id=text, class_name=text),))
    Page(html_of([result], folder, title=text))
    size_of([result], folder)


def test_page_reaches_for_nothing_outside(tmp_path: Path) -> None:
    source = html_of([make_result(mode=mode, colour=True) for mode in ("tmm", "l2", "cosine")], tmp_path)
    without_images = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", source)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<iframe", without_images)


def test_huge_texts_are_cut(tmp_path: Path) -> None:
    huge = "x" * 10_000_000
    hit = replace(make_hit(0), id=huge, class_name=huge, metadata={huge: huge})
    result = replace(make_result(k=1), query=huge, hits=(hit,), predicted_class=huge, notes=(huge,), recognised_as=huge)
    source = html_of([result], tmp_path)
    assert len(source) < 30_000
    assert Page(source).of_class("id") == ["x" * (MAX_TEXT - 1) + "…"]
    size_of([result], tmp_path)


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
    nothing = make_result(k=0)
    size_of([nothing], tmp_path)
    assert "0 of 0" in html_of([nothing], tmp_path)


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


def test_sheet_refuses_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1 column, got 0"):
        write_png([make_result()], tmp_path / "a", columns=0)
    rows = MAX_SHEET_PIXELS // (5 * CELL) // CELL
    with pytest.raises(InputError, match="write an HTML page instead"):
        write_png([make_result(str(i), k=1) for i in range(rows)], tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "score", "confidence"),
    [
        ([], "log-odds of the dummy class", "P: the probability"),
        (["head.score=logit"], "logit of the dummy class", "P: the probability"),
        (["fusion=2"], "P + 2 · cosine similarity", "P: the probability"),
        (["head=discriminant"], "similarity to the triggered query, decorrelated", "alike: decorrelated similarity"),
        (["head=discriminant", "fusion=4"], "alike + 4 · cosine similarity", "alike: decorrelated similarity"),
    ],
)
def test_page_and_result_say_what_the_numbers_are(tmp_path, settings, score, confidence):
    found = replace(make_result(mode="tmm"), config=TmmConfig().with_settings(settings).to_json())
    assert score in found.score_meaning
    assert found.confidence_meaning is not None
    assert found.confidence_meaning.startswith(confidence)
    write_html([found], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert score in page
    assert confidence in page
    assert f"{found.confidence_word} 0." in page or f"{found.confidence_word} 1" in page
