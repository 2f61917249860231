"""The commands and code of the pages on serving, containers, installing and clusters are run, or parsed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import yaml
from click.testing import CliRunner

from tests.digits import make_classifier, write_photos, write_queries
from tests.serving import running
from tests.test_container import parsed
from tests.test_docs import write_vit
from tmm_engine import build_index
from tmm_engine.cli.main import main
from tmm_engine.serving.settings import Settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CURL = "curl --silent --show-error --fail-with-body "
OWN_SHELL = ("bash", "-euo", "pipefail", "-c")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each block of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """Of a page's blocks for a shell; lines that end in a backslash go on."""
    texts = [text.replace("\\\n", " ") for language, text in blocks(page) if language == "sh"]
    return [line.partition("  #")[0].rstrip() for text in texts for line in text.splitlines() if line.strip()]


# ---- serving


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the reader has: photos.idx with cats, query.png, new.png, and a folder below /data."""
    folder = tmp_path_factory.mktemp("serving")
    for number in range(24):
        write_photo(folder / "photos" / ("dog", "cat")[number % 2] / f"{number:03}.png", number)
        write_photo(folder / "data" / "2026" / "summer" / "cat" / f"{number:03}.png", number)
    write_photo(folder / "query.png", 200)
    write_photo(folder / "new.png", 201)
    build_index(folder / "photos", folder / "photos.idx", make_classifier(), views=1)
    shutil.copytree(folder / "photos.idx", folder / "other.idx")
    (folder / "built").mkdir()
    return folder


def write_photo(path: Path, number: int) -> None:
    write_queries(path.parent, count=1, start=number)
    (path.parent / f"query-{number}.png").rename(path)


@pytest.fixture(scope="module")
def address(work: Path) -> Iterator[str]:
    """Of a server as the page starts it."""
    settings = Settings(builds=work / "built", sources=work / "data")
    with running({"photos": work / "photos.idx"}, settings) as client:
        yield str(client.base_url).removeprefix("http://").rstrip("/")


def test_servers_that_the_page_starts_are_commands(work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(work)
    page = (DOCS / "serving.md").read_text()
    [started] = [line for line in commands("serving.md") if line.startswith("engine ")]
    assert parsed(shlex.split(started)[1:])["port"] == 8080
    [building] = re.findall(r"`(engine serve photos.idx --builds .*?)`", page)
    assert parsed(shlex.split(building.replace("/data", str(work / "data")))[1:])["builds"] == Path("built")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_what_the_page_asks_by_curl_is_answered(work: Path, address: str):
    asked = [line for line in commands("serving.md") if line.startswith("curl ")]
    assert len(asked) >= 5
    for line in asked:
        text = line.replace("localhost:8000", address).replace("curl ", CURL, 1)
        done = subprocess.run([*OWN_SHELL, text], cwd=work, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert done.stdout, line


def test_what_the_page_does_from_python_and_a_terminal_works(work: Path, address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(work)
    [code] = [text for language, text in blocks("serving.md") if language == "python"]
    names: dict[str, object] = {}
    exec(compile(code.replace("localhost:8000", address), "serving.md", "exec"), names)
    assert len(names["result"].hits) == 5  # type: ignore[attr-defined]
    added = httpx.get(f"http://{address}/collections/photos/exemplars/new.png").raise_for_status()
    assert added.json()["class_name"] == "cat"
    [line] = re.findall(r"`(engine search http.*?)`", (DOCS / "serving.md").read_text())
    result = CliRunner().invoke(main, shlex.split(line.replace("localhost:8000", address))[1:])
    assert result.exit_code == 0, result.output
    assert (work / "answer.html").stat().st_size > 1000


# ---- containers


def test_what_is_run_in_containers_are_commands_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos.idx", "photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "query.png").write_bytes(b"")
    ran = [line for line in commands("container.md") if line.startswith("docker run ")]
    inside = [line.partition(" tmm-engine")[2].replace(" /photos ", f" {tmp_path / 'photos'} ") for line in ran]
    assert [line.split()[:1] for line in inside] == [["build-index"], [], ["search"]]
    for line in filter(None, inside):
        assert parsed(shlex.split(line))


def test_what_the_page_on_containers_sets_is_there_to_set():
    dockerfile, compose = ((ROOT / name).read_text() for name in ("Dockerfile", "compose.yaml"))
    arguments = re.findall(r"--build-arg (\w+)=", "\n".join(commands("container.md")))
    assert arguments
    assert all(re.search(rf"^ARG {name}\b", dockerfile, re.MULTILINE) for name in arguments)
    page = (DOCS / "container.md").read_text()
    [named] = re.findall(r"^(`TORCH`.*) in the environment", page, re.MULTILINE)
    assert all(f"${{{name}" in compose for name in re.findall(r"`(\w+)`", named))
    [override] = [yaml.safe_load(text) for language, text in blocks("container.md") if language == "yaml"]
    assert override["services"].keys() <= yaml.safe_load(compose)["services"].keys()


# ---- installing


def test_completion_is_what_the_page_says(tmp_path: Path):
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    bash, fish = (line for line in commands("install.md") if "_ENGINE_COMPLETE" in line)
    assert fish == "_ENGINE_COMPLETE=fish_source engine | source"
    told = {f"{bash}\ncomplete -p engine": "engine", fish.replace("| source", ""): "--command engine"}
    for text, expected in told.items():
        done = subprocess.run(
            [*OWN_SHELL, text], env={**os.environ, "PATH": search}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


# ---- clusters


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what Ray and transformers warn elsewhere, nothing is ours
def test_what_the_page_on_clusters_runs(ray: ModuleType, tmp_path: Path):
    write_photos(tmp_path / "photos", count=40)
    write_queries(tmp_path, count=1)
    (tmp_path / "query-200.png").rename(tmp_path / "query.png")
    write_vit(tmp_path / "vit-folder")
    ours = [line for line in commands("CLUSTER.md") if line.startswith("engine ")]
    assert [line.split()[1] for line in ours] == ["build-index", "search"]
    for line in ours:
        text = line.replace("/nfs", str(tmp_path)).replace("head:6379", ray.get_runtime_context().gcs_address)
        arguments = shlex.split(text.replace("query.png", str(tmp_path / "query.png")))
        code = "from tmm_engine.cli.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments[1:]], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "photos.idx" / "index.json").exists()
