"""The page in a real browser: how soon a dropped picture has its neighbours, and what axe says of it."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmm_engine.bench.serving.process import served
from tmm_engine.engine import Engine
from tmm_engine.index.errors import InputError
from tmm_engine.index.progress import Progress
from tmm_engine.views.showing import as_picture, png_bytes

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
WARMING = 3  # drops that are not counted
SPREAD = 20 / 255  # σ of the noise that makes a dropped picture no exemplar
REST = 1500  # milliseconds between two drops, in which the other modes answer
DROP = """([name, content]) => {
  const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: "image/png"}));
  window.dropped = performance.now();
  for (const type of ["dragenter", "dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(type, {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""
SEEN = """() => new Promise((seen) => {
  const look = () => {
    const shown = document.querySelector(".mode:not([aria-busy]) .hits:not(.empty)");
    const pictures = shown ? [...shown.querySelectorAll("img")] : [];
    const all = pictures.length && pictures.every((each) => each.complete && each.naturalWidth);
    requestAnimationFrame(all ? () => seen(performance.now() - window.dropped) : look);
  };
  look();
})"""


@contextmanager
def browser() -> "Iterator[Browser]":
    """Debian's Chromium, without a window.

    Raises:
        InputError: there is none, or Playwright is missing.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise InputError(f"the page is measured with playwright: pip install playwright ({error})") from None
    if not CHROMIUM.exists():
        raise InputError(f"the page is measured with Chromium: expected it at {CHROMIUM}")
    with sync_playwright() as playwright:
        own = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield own
        own.close()


def drop(page: "Page", name: str, content: bytes) -> None:
    """Drop a PNG file on a page."""
    page.evaluate(DROP, [name, base64.b64encode(content).decode()])


def serious(page: "Page") -> list[str]:
    """What axe finds serious or critical.

    Raises:
        InputError: axe is missing.
    """
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError as error:
        raise InputError(f"axe comes with axe-playwright-python: pip install axe-playwright-python ({error})") from None
    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:200]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def measure_page(
    index: Path, *, drops: int, seed: int, progress: Progress
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`page_ms`, the median over drops, and `axe_serious`, over the page empty, with neighbours, and with why.

    Args:
        index: What is served; exemplars with some noise are dropped.
        drops: How many are timed.
        seed: Of which are dropped, and of the noise.
        progress: Told of drops.
    """
    pictures = _pictures(index, drops + WARMING, seed)
    with served({"index": index}) as server, browser() as own:
        page = own.new_page()
        page.goto(server.address)
        page.wait_for_selector("#exemplars img")
        milliseconds = []
        for number, picture in enumerate(pictures):
            progress("dropping", number, len(pictures))
            drop(page, f"{number}.png", picture)
            milliseconds.append(float(page.evaluate(SEEN)))
            page.wait_for_timeout(REST)
        found = [each for scheme in ("light", "dark") for each in _of_axe(own, server.address, pictures[0], scheme)]
    timed = milliseconds[WARMING:]
    figures = {"page_ms": float(np.median(timed)), "axe_serious": float(len(found))}
    records = [{"part": "page", "page_ms": each} for each in timed]
    return figures, records + [{"part": "page", "axe": each} for each in found]


def _pictures(index: Path, count: int, seed: int) -> list[bytes]:
    """Exemplars that are none any more."""
    rng = np.random.default_rng(seed)
    with Engine.open(index, device="cpu") as engine:
        rows = np.sort(rng.choice(len(engine), min(count, len(engine)), replace=False)).astype(np.int64)
        images = engine.store.images(rows) / 255
    noisy = (images + rng.normal(0, SPREAD, images.shape)).clip(0, 1)
    return [png_bytes(as_picture(np.rint(255 * each).astype(np.uint8))) for each in noisy]


def _of_axe(own: "Browser", address: str, picture: bytes, scheme: str) -> list[str]:
    context = own.new_context(color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce")
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#exemplars img")
    found = serious(page)
    drop(page, "query.png", picture)
    page.evaluate(SEEN)
    found += serious(page)
    page.click("#explain")
    page.wait_for_selector("#reasons section")
    found += serious(page)
    context.close()
    return [f"{scheme}: {each}" for each in found]
