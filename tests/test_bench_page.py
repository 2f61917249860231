"""`engine bench serve --only page`, in short, on a few digits."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.digits import make_classifier, write_photos
from tmm_engine import build_index
from tmm_engine.bench.serving.page import CHROMIUM
from tmm_engine.cli.main import main


@pytest.mark.slow
def test_drops_are_timed_and_what_axe_finds_is_counted(tmp_path: Path):
    pytest.importorskip("playwright.sync_api")
    pytest.importorskip("axe_playwright_python.sync_playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    write_photos(tmp_path / "photos", count=20)
    build_index(tmp_path / "photos", tmp_path / "photos.idx", make_classifier(), views=1)
    asked = ["bench", "serve", str(tmp_path / "photos.idx"), "--only", "page", "--drops", "2", "--json"]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["page_ms"] > 0
    assert figures["axe_serious"] == 0
