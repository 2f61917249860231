"""A real browser on a page."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tmm_engine.bench.serving.page import CHROMIUM
from tmm_engine.bench.serving.page import browser as started

PHONE, TABLET, DESKTOP = (390, 844), (820, 1180), (1440, 900)
SECONDS = 20_000  # milliseconds that anything may take on a machine that is busy

PASTE = """([name, content]) => {
  const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: "image/png"}));
  document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}));
}"""
MOVE = """([name, value]) => {
  const slider = document.getElementById(name);
  slider.value = value;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
}"""


@contextmanager
def browser() -> Iterator:
    """As `bench.serving.page`; skips where there is none."""
    pytest.importorskip("playwright.sync_api")
    pytest.importorskip("axe_playwright_python.sync_playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    with started() as own:
        yield own


@contextmanager
def page_of(browser, base_url: str, *, size: tuple[int, int] = DESKTOP, **options) -> Iterator:
    """A page in a session of its own; fails if anything on it did, or went to another host."""
    width, height = size
    context = browser.new_context(base_url=base_url, viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(SECONDS)
    page, errors, hosts = context.new_page(), [], set()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if request.url[:4] == "http" else None)
    yield page
    context.close()
    assert errors == [], errors
    assert hosts <= {base_url.split("/")[2]}, hosts


def paste(page, name: str, content: bytes) -> None:
    page.evaluate(PASTE, [name, base64.b64encode(content).decode()])


def move(page, slider: str, value: float) -> None:
    page.evaluate(MOVE, [slider, value])
