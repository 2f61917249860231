"""What becomes of answers where standard output lacks characters, is full, or is closed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.digits import make_classifier, write_photos
from tmm_engine.building import build_index
from tmm_engine.cli.main import main
from tmm_engine.index.sources.opening import open_source

FULL = Path("/dev/full")
NAME = "caf\u00e9 \u2014 \u732b"  # Latin-1 has the first of the three


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    photos = write_photos(folder / "photos", count=10)
    (photos / "digit-0").rename(photos / NAME)
    build_index(open_source(photos), folder / "photos.idx", make_classifier(), views=0)
    return folder / "photos.idx"


def search(index: Path, *options: str) -> list[str]:
    return ["search", str(index), "--id", f"{NAME}/0000.png", "--mode", "l2", "-k", "1", *options]


@pytest.mark.parametrize(
    ("encoding", "name"), [("ascii", r"caf\xe9 - \u732b"), ("latin-1", "caf\u00e9 - \\u732b"), ("utf-8", NAME)]
)
def test_what_cannot_be_printed_is_replaced(index: Path, encoding: str, name: str):
    done = CliRunner(charset=encoding).invoke(main, search(index))
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.count(f"{name}/0000.png") == 2  # the query, and itself as its neighbour


def test_json_is_the_same_in_every_encoding(index: Path):
    plain, full = (CliRunner(charset=each).invoke(main, search(index, "--json")).stdout for each in ("ascii", "utf-8"))
    assert plain.isascii()
    assert NAME in full  # readable where it can be
    assert json.loads(plain)["hits"] == json.loads(full)["hits"]


def test_a_name_that_is_no_unicode_can_be_printed(tmp_path: Path):
    done = CliRunner().invoke(main, ["info", str(tmp_path / "caf\udce9.idx")])
    assert done.exit_code == 1
    assert r"caf\udce9.idx" in done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_a_full_standard_output_is_an_error_in_one_line(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
):
    with FULL.open("w") as full, monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(sys, "stdout", full)
        main(search(index, *options))
    assert ended.value.code == 1
    said = "error: standard output, or a file, could not be written (No space left on device)\n"
    assert capsys.readouterr().err == said


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_python_has_nothing_to_add_when_it_ends():
    with FULL.open("w") as full:
        command = [sys.executable, "-m", "tmm_engine.cli.main", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output")
    assert done.stderr.count("\n") == 1
