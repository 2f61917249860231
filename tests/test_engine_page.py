"""The page: complete, escaped, self-contained."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.made_results import HOSTILE, make_result, make_wordy
from tests.page import Page
from tmm_engine.rerank import TmmConfig
from tmm_engine.results import FailedQuery, SearchResult
from tmm_engine.views.notebook import notebook_html
from tmm_engine.views.page import write_html
from tmm_engine.views.showing import MAX_TEXT
from tmm_engine.views.tiles import drawable


def html_of(results: Sequence[SearchResult | FailedQuery], folder: Path, **options: str) -> str:
    write_html(results, folder / "page.html", **options)
    return (folder / "page.html").read_text(encoding="utf-8")


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


def test_page_says_why_a_query_could_not_be_answered(tmp_path: Path) -> None:
    results = [make_result("a"), FailedQuery("b", f"broken: {HOSTILE}"), make_result("c", mode="cosine")]
    page = Page(html_of(results, tmp_path))
    assert page.of_class("error") == [f"Cannot be answered: broken: {HOSTILE}"]
    assert [tag for tag, _ in page.tags].count("article") == 3
    [lead] = page.of_class("lead")
    assert lead.split(" · ")[-1] == "1 could not be answered"
    assert "could not" not in html_of(results[::2], tmp_path)
    alone = Page(html_of(results[1:2], tmp_path))
    assert alone.of_class("error") == page.of_class("error")
    assert not alone.pictures()


def test_notes_are_seen_without_opening_details(tmp_path: Path) -> None:
    source = html_of([make_result(mode="tmm")], tmp_path)
    assert source.index("<li>Only some were scored.</li>") < source.index("<details>")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    source = html_of([make_wordy(HOSTILE)], tmp_path, title=HOSTILE, index_name=HOSTILE)
    page = Page(source)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.of_class("id") == [HOSTILE]
    assert any(attributes.get("title") == HOSTILE for _, attributes in page.tags)


def test_control_characters_in_names_are_spelled_out(tmp_path: Path) -> None:
    steering = "a \x1b[31mred\x07\x9b one & more"
    result = make_wordy(steering)
    page = html_of([result], tmp_path, title=steering, index_name=steering)
    for source in (page, notebook_html([result])):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", source)
        assert r"a \x1b[31mred\x07\x9b one &amp; more" in source
    assert r"\x1b[31mred\x07" in drawable(steering)


def test_page_reaches_for_nothing_outside(tmp_path: Path) -> None:
    source = html_of([make_result(mode=mode, colour=True) for mode in ("tmm", "l2", "cosine")], tmp_path)
    without_images = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", source)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<iframe", without_images)


def test_huge_texts_are_cut(tmp_path: Path) -> None:
    source = html_of([make_wordy("x" * 10_000_000)], tmp_path)
    assert len(source) < 30_000
    assert Page(source).of_class("id") == ["x" * (MAX_TEXT - 1) + "…"]


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
    assert page.count(f">{found.confidence_word} 0.75<") == len(found.hits)


def test_no_neighbours(tmp_path: Path) -> None:
    assert "0 of 0" in html_of([make_result(k=0)], tmp_path)
