"""The page of `engine serve` in a real browser: what a person does there, by mouse and by keyboard, and axe."""

import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.browser import PHONE, TABLET, browser, move, page_of, paste
from tests.digits import IMAGES, make_classifier, write_photos
from tests.serving import running
from tmm_engine import Engine, build_index
from tmm_engine.bench.serving.page import drop, serious
from tmm_engine.serving.keys import Keys, Right
from tmm_engine.serving.settings import Settings

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=20_000)

KNOWN = "digit-3/0003.png"
HITS = "#mode-{} .hits:not(.empty) > li:not(.beyond)"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    photos = write_photos(folder / "photos", count=60)
    shutil.copy(photos / KNOWN, photos / "digit-5" / "copy.png")
    build_index(folder / "photos", folder / "photos.idx", make_classifier(), views=2)
    return folder / "photos.idx"


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    with browser() as own:
        yield own


@pytest.fixture(scope="module")
def client(index: Path, chromium) -> Iterator[httpx.Client]:
    with running({"photos": index, "same": index}) as client:
        yield client


@pytest.fixture
def page(client: httpx.Client, chromium) -> Iterator:
    with page_of(chromium, str(client.base_url)) as page:
        yield page


@pytest.fixture(scope="module")
def engine(index: Path) -> Iterator[Engine]:
    with Engine.open(index, device="cpu") as engine:
        yield engine


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(IMAGES[number]).save(content, "PNG")
    return content.getvalue()


def found(page, mode: str = "robust", count: int = 10) -> list[str]:
    """The ids of a mode's neighbours, once they are there."""
    tiles = page.locator(HITS.format(mode))
    expect(tiles).to_have_count(count)
    expect(page.locator(f"#mode-{mode}[aria-busy]")).to_have_count(0)
    return [tile.get_attribute("data-id") for tile in page.locator(f"{HITS.format(mode)} > a").all()]


def test_a_dropped_picture_has_the_neighbours_that_the_engine_finds(page, engine: Engine):
    page.goto("/")
    expect(page.get_by_role("heading", name="Which known pictures")).to_be_visible()
    drop(page, "seven.png", png(70))
    for mode in ("robust", "cosine", "l2"):
        assert found(page, mode) == [hit.id for hit in engine.search(png(70), mode=mode, k=10).hits]
    expect(page.locator("#query-name")).to_have_text("seven.png")
    expect(page.locator("#status")).to_contain_text(re.compile(r"robust: \d+ of 10 in class"))


@pytest.mark.slow
def test_a_pasted_and_a_chosen_picture_are_searched_for(page, engine: Engine, tmp_path: Path):
    page.goto("/")
    paste(page, "pasted.png", png(71))
    assert found(page) == [hit.id for hit in engine.search(png(71), k=10).hits]
    (tmp_path / "chosen.png").write_bytes(png(72))
    page.locator("#file").set_input_files(tmp_path / "chosen.png")
    expect(page.locator("#query-name")).to_have_text("chosen.png")
    assert found(page) == [hit.id for hit in engine.search(png(72), k=10).hits]
    page.go_back()
    expect(page.locator("#query-name")).to_have_text("pasted.png")
    page.reload()
    expect(page.get_by_text("drop it again")).to_be_visible()


@pytest.mark.slow
def test_neighbours_are_links_and_history_goes_back(page, engine: Engine):
    page.goto("/")
    page.locator("#exemplars a").first.click()
    first = found(page)
    assert page.url.endswith(f"?collection=photos&id={first[0].replace('/', '%2F')}")
    page.locator(f"{HITS.format('robust')} > a").nth(3).click()
    expect(page.locator("#query-name")).to_have_text(first[3])
    expect(page.locator("#query-name")).to_be_focused()
    assert found(page) == [hit.id for hit in engine.search(engine.exemplar(first[3]), k=10).hits]
    page.go_back()
    expect(page.locator("#query-name")).to_have_text(first[0])
    assert found(page) == first
    page.go_back()
    expect(page.get_by_role("heading", name="Which known pictures")).to_be_visible()


@pytest.mark.slow
def test_sliders_say_in_which_mode_neighbours_stay(page, engine: Engine):
    page.goto(f"/?collection=photos&id={KNOWN}")
    clean = found(page, "l2")
    move(page, "darken", 0.9)
    expect(page.locator("#stayed li")).to_have_count(3)
    expect(page.locator("#darken-said")).to_have_text("to 10 % of its light")
    dark = engine.exemplar(KNOWN).pixels * np.float32(0.1)
    expected = [hit.id for hit in engine.search(np.rint(dark * 255).astype(np.uint8), mode="l2", k=10).hits]
    assert found(page, "l2") == expected
    stayed = len({*expected} & {*clean})
    expect(page.locator("#mode-l2 .stayed")).to_have_text(f"{stayed} of 10 stayed")
    expect(page.locator("#mode-l2 .hits > li.new")).to_have_count(10 - stayed)
    expect(page.locator("#mode-l2 .gone li")).to_have_count(10 - stayed)
    assert "darken=0.9" in page.url
    page.get_by_role("button", name="Reset").click()
    assert found(page, "l2") == clean
    expect(page.locator("#stayed li")).to_have_count(0)
    assert "darken" not in page.url


@pytest.mark.slow
def test_changes_in_the_address_are_those_of_the_sliders(page):
    page.goto(f"/?collection=photos&id={KNOWN}&noise=0.3")
    expect(page.locator("#noise")).to_have_value("0.3")
    expect(page.locator("#stayed li")).to_have_count(3)


@pytest.mark.slow
def test_a_filter_leaves_some_and_its_error_is_the_servers(page, client: httpx.Client):
    page.goto(f"/?collection=photos&id={KNOWN}")
    found(page)
    page.get_by_label("Only exemplars where").fill("label = 'digit-8'")
    page.get_by_role("button", name="Filter", exact=True).click()
    expect(page.locator("#where-help")).to_contain_text("of 61 match")
    total = client.get("/collections/photos/exemplars", params={"where": "label = 'digit-8'"}).json()["total"]
    assert all(id_.startswith("digit-8/") for id_ in found(page, count=min(10, total)))
    page.get_by_label("Only exemplars where").fill("nonsense = 3")
    page.keyboard.press("Enter")
    detail = client.get("/collections/photos/exemplars", params={"where": "nonsense = 3"}).json()["detail"]
    expect(page.locator("#where-error")).to_have_text(f"{detail}.")
    page.get_by_label("Only exemplars where").fill("label = 'digit-8' AND label = 'digit-3'")
    page.keyboard.press("Enter")
    expect(page.locator("#where-error")).to_contain_text("no exemplar matches")
    page.get_by_role("button", name="Without").click()
    found(page)


@pytest.mark.slow
def test_why_shows_what_speaks_for_and_against(page, engine: Engine):
    page.goto(f"/?collection=photos&id={KNOWN}")
    found(page)
    page.get_by_role("button", name="Say why").click()
    told = engine.search(engine.exemplar(KNOWN), explain=True).explanation
    expect(page.get_by_role("heading", name=f"Nearest that are not {told.class_name}")).to_be_visible()
    assert (
        page.locator("#reasons .kinds section").first.locator("li a").first.get_attribute("data-id")
        == told.unlike[0].id
    )


@pytest.mark.slow
def test_tmm_is_asked_for_by_hand_and_shows_its_trigger(page):
    page.goto(f"/?collection=photos&id={KNOWN}")
    found(page)
    page.get_by_role("button", name="Search by tmm").click()
    found(page, "tmm")
    expect(page.locator("#mode-tmm figcaption")).to_have_count(3)
    expect(page.locator("#mode-tmm .stayed")).to_be_empty()
    move(page, "darken", 0.5)  # what was found is of another picture
    expect(page.locator("#stayed li")).to_have_count(3)
    expect(page.locator("#mode-tmm .hits")).to_have_count(0)


@pytest.mark.slow
def test_what_cannot_be_searched_with_is_said_in_the_servers_words(page, client: httpx.Client):
    page.goto("/")
    drop(page, "broken.png", b"no picture")
    detail = client.post("/collections/photos/search", files={"image": ("broken.png", b"no picture")}).json()["detail"]
    expect(page.locator("#query-error")).to_have_text(f"{detail}.")
    page.goto("/?collection=photos&id=digit-3/0004.png")
    expect(page.locator("#query-error")).to_contain_text("digit-3/0004.png")
    page.goto("/?collection=photo")
    expect(page.locator("#start-error")).to_contain_text("photos")


@pytest.mark.slow
def test_another_collection_is_chosen(page):
    page.goto("/")
    page.get_by_label("Collection", exact=True).select_option("same")
    expect(page).to_have_url(re.compile("collection=same"))
    page.locator("#exemplars a").first.click()
    assert "collection=same" in page.url
    found(page)


@pytest.mark.slow
def test_an_audit_is_gone_through_by_keyboard_and_taken_away(page):
    page.goto("/")
    page.get_by_role("link", name="Audit").click()
    page.get_by_role("button", name="Look for it").click()
    expect(page.locator("#audit-finding .finding")).to_be_visible()
    page.get_by_label("Show").select_option("duplicates")
    expect(page.locator("#audit-at")).to_have_text("1 of 1")
    assert serious(page) == []
    page.locator("#audit-finding").focus()
    page.keyboard.press("y")
    expect(page.locator("#audit-decided")).to_contain_text("1 finding decided: 1 to delete")
    with page.expect_download() as download:
        page.get_by_role("button", name="delete.txt").click()
    assert Path(download.value.path()).read_text() in (f"{KNOWN}\n", "digit-5/copy.png\n")
    with page.expect_download() as download:
        page.get_by_role("button", name="All findings").click()
    found = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [each["decision"] for each in found if each["kind"] == "duplicates"] == ["act on it"]
    page.reload()  # the address has the job
    expect(page.locator("#audit-finding .finding")).to_be_visible()


@pytest.mark.slow
def test_everything_is_reached_by_keyboard(page):
    page.goto(f"/?collection=photos&id={KNOWN}")
    first = found(page)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="To the neighbours")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.id") == first[1]:
            break
    page.keyboard.press("Enter")
    expect(page.locator("#query-name")).to_have_text(first[1])
    found(page)
    page.locator("#noise").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#noise-said")).to_contain_text("12 %")
    expect(page.locator("#stayed li")).to_have_count(3)


@pytest.mark.slow
def test_a_server_that_is_gone_is_said_and_asked_again(page):
    page.goto(f"/?collection=photos&id={KNOWN}")
    found(page)
    page.route("**/*", lambda route: route.abort())
    move(page, "darken", 0.5)
    expect(page.locator("#banner")).to_contain_text("does not answer")
    page.unroute("**/*")
    expect(page.locator("#stayed li")).to_have_count(3)
    expect(page.locator("#banner")).to_be_hidden()


@pytest.mark.slow
def test_a_busy_server_is_asked_again(page):
    page.goto("/")
    busy = {"status": 503, "headers": {"Retry-After": "1"}, "json": {"detail": "too much is waiting already"}}
    page.route("**/search", lambda route: route.fulfill(**busy), times=1)
    drop(page, "seven.png", png(70))
    expect(page.locator("#mode-robust .facts")).to_contain_text("busy")
    found(page)


@pytest.mark.slow
def test_a_key_is_asked_for_and_pictures_need_it_too(index: Path, chromium):
    keys = Keys((("a-key-to-read", Right.READ),))
    with running({"photos": index}, Settings(keys=keys)) as client, page_of(chromium, str(client.base_url)) as page:
        page.goto(f"/?collection=photos&id={KNOWN}")
        page.get_by_label("API key").fill("a-wrong-key")
        page.keyboard.press("Enter")
        expect(page.get_by_text("That key was refused")).to_be_visible()
        assert serious(page) == []
        page.get_by_label("API key").fill("a-key-to-read")
        page.get_by_role("button", name="Go on").click()
        found(page)
        shown = "[...document.querySelectorAll('.hits img')].every((each) => each.naturalWidth === 8)"
        page.wait_for_timeout(500)
        assert page.evaluate(shown)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_any_state(client: httpx.Client, chromium, scheme: str):
    with page_of(chromium, str(client.base_url), color_scheme=scheme, reduced_motion="reduce") as page:
        page.goto("/")
        expect(page.locator("#exemplars img")).to_have_count(12)
        assert serious(page) == []
        drop(page, "seven.png", png(70))
        found(page, "l2")
        assert serious(page) == []
        move(page, "darken", 0.9)
        move(page, "noise", 0.3)
        expect(page.locator("#stayed li")).to_have_count(3)
        page.get_by_role("button", name="Search by tmm").click()
        assert serious(page) == []
        found(page, "tmm")
        page.get_by_role("button", name="Say why").click()
        expect(page.locator("#reasons section").first).to_be_visible()
        for summary in page.locator("summary:visible").all():
            summary.click()
        assert serious(page) == []
        page.get_by_label("Only exemplars where").fill("nonsense = 3")
        page.keyboard.press("Enter")
        expect(page.locator("#where-error")).not_to_be_empty()
        assert serious(page) == []
        page.get_by_role("button", name="Without").click()
        drop(page, "broken.png", b"no picture")
        expect(page.locator("#query-error")).to_be_visible()
        page.route("**/*", lambda route: route.abort())
        page.get_by_role("button", name="Others").click()
        expect(page.locator("#banner")).to_be_visible()
        assert serious(page) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [PHONE, TABLET])
def test_nothing_is_wider_than_a_small_screen(client: httpx.Client, chromium, size: tuple[int, int]):
    with page_of(chromium, str(client.base_url), size=size) as page:
        page.goto("/")
        expect(page.locator("#exemplars img")).to_have_count(12)
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]
        page.goto(f"/?collection=photos&id={KNOWN}&darken=0.9")
        expect(page.locator("#stayed li")).to_have_count(3)
        for summary in page.locator("summary:visible").all():
            summary.click()
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]
        assert serious(page) == []


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_script_of_its_own_text():
    folder = Path(sys.modules["tmm_engine.serving.routes.page"].PAGE)
    for file in folder.iterdir():
        text = file.read_text()
        assert not re.search(r"(https?:)?//[\w-]+\.\w", text.replace("http://www.w3.org/2000/svg", "")), file.name
        assert "innerHTML" not in text, file.name
    html = (folder / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", html)
