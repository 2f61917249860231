"""The commands and code of README and how-to pages are run as they stand; pictures and folders exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import tmm_engine.index
import tmm_engine.rerank
from tests import notebook
from tests.digits import IMAGES, LABELS, make_classifier, write_photos, write_queries
from tmm_engine import build_index
from tmm_engine.bench.cli import bench
from tmm_engine.cli.main import main
from tmm_engine.index import ArraySource
from tmm_engine.options import RECOGNITION
from tmm_engine.rerank import preset

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    name: (ROOT / name).read_text()
    for name in (
        "docs/quick-start.md",
        "README.md",
        *(f"docs/how-to/{name}.md" for name in ("search", "classify", "audit", "explain", "filter")),
        *(f"docs/how-to/{name}.md" for name in ("living", "model", "data", "scale")),
    )
}
"""Whose blocks are run, in this order, in one folder."""

ELSEWHERE = ("docs/install.md", "docs/container.md", "docs/serving.md")  # what they run is no work of this command
OTHER_PROGRAMS = ("python -m pip install ", "uv tool install ", "make ", "git clone ")
RUN_BY_ANOTHER_TEST = ("engine demo", "engine serve photos.idx")


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, text) of each block of a page; of a shell's each command."""
    found = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```", PAGES[name], re.DOTALL | re.MULTILINE):
        lines = [line.partition("  #")[0].rstrip() for line in text.splitlines()] if language == "sh" else [text]
        found += [(language, line) for line in lines if line]
    return found


BLOCKS = [(name, *block) for name in PAGES for block in blocks(name)]
SHELL = list(dict.fromkeys((name, line) for name, language, line in BLOCKS if language == "sh"))
COMMANDS = [(name, line) for name, line in SHELL if not line.startswith((*OTHER_PROGRAMS, *RUN_BY_ANOTHER_TEST))]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's reader has: photos/, query.png, resnet18.safetensors — and photos.idx, which it makes."""
    folder = tmp_path_factory.mktemp("readme")
    write_photos(folder / "photos")
    write_photos(folder / "held-out", count=40, start=400)
    write_queries(folder, count=1)
    (folder / "query-200.png").rename(folder / "query.png")
    make_classifier().save(folder / "resnet18.safetensors")
    write_vit(folder / "vit-folder")
    (folder / "doomed.txt").write_text("digit-3/0013.png\n")
    (folder / "relabel.csv").write_text("id,label\ndigit-3/0003.png,digit-8\n")
    write_tables(folder)
    write_demo(folder / "engine-demo")
    return folder


def write_tables(folder: Path) -> None:
    """The first photos as a list of paths, and as Parquet."""
    paths = sorted((folder / "photos").rglob("*.png"))[:12]
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in paths]
    (folder / "photos.csv").write_text("\n".join(["path,kind", *rows]) + "\n")
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    pq.write_table(
        pa.table({"image": images, "label": [path.parent.name for path in paths]}), folder / "photos.parquet"
    )


def write_demo(folder: Path) -> None:
    """What `engine demo` leaves: an index and queries. That it does is seen where the demo is tested."""
    images, labels = IMAGES[:60, None], LABELS[:60]
    folder.mkdir()
    build_index(ArraySource(images, labels), folder / "digits.idx", make_classifier(), views=1)
    write_queries(folder / "queries", count=1)


def write_vit(folder: Path) -> None:
    """What transformers saves of a classifier and its image processor."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=10,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def test_every_page_has_something_to_run_and_nothing_else():
    assert {language for _, language, _ in BLOCKS} == {"sh", "python"}
    assert {name for name, _ in COMMANDS} == set(PAGES)
    assert [line for _, line in COMMANDS if not line.startswith("engine ")] == []
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "how-to").glob("*.md")}
    assert pages <= PAGES.keys()


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run_in_their_order(work: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(work)
    for language, text in blocks(name):
        if language == "python":
            exec(compile(text, name, "exec"), {"__name__": "__main__"})
        elif (name, text) in COMMANDS and text not in work_done(work):
            result = CliRunner().invoke(main, shlex.split(text)[1:])
            assert result.exit_code == 0, f"{text}\n{result.output}"
            assert result.stdout, text
            note_built(work, text)


def work_done(work: Path) -> list[str]:
    """The builds that an earlier page has run, word by word: the index is there already."""
    record = work / "built.txt"
    return record.read_text().splitlines() if record.exists() else []


def note_built(work: Path, command: str) -> None:
    if command.startswith("engine build-index"):
        with (work / "built.txt").open("a") as record:
            record.write(f"{command}\n")


@pytest.mark.filterwarnings("ignore")  # what runs a notebook has warnings of its own; those of ours are seen elsewhere
def test_the_notebook_runs_and_its_outputs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for variable in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    kept = notebook.kinds(notebook.read())
    assert ["image/png", "text/plain"] in [form for outputs in kept for form in outputs]
    assert notebook.kinds(notebook.executed(notebook.read())) == kept


def test_every_command_is_on_a_page():
    texts = [*PAGES.values(), *((ROOT / name).read_text() for name in ELSEWHERE)]
    assert [name for name in main.commands if not any(f"engine {name}" in text for text in texts)] == []


@pytest.mark.slow
def test_the_site_shows_every_command_and_asks_no_other_host(tmp_path: Path):
    site = tmp_path / "site"
    build = ("-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--doctree-dir", tmp_path / "trees")
    done = subprocess.run([sys.executable, *build, ROOT / "docs", site], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids = {
        found
        for name in ("commands", "bench")
        for found in re.findall(r'id="engine-([\w-]+)"', (site / "reference" / f"{name}.html").read_text())
    }
    assert {*main.commands} | {f"bench-{name}" for name in bench.commands} <= ids
    loaded = r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)=["']?(?:https?:)?//[^>]*>"""
    assert [(page.name, re.findall(loaded, page.read_text())) for page in site.rglob("*.html")
            if re.search(loaded, page.read_text())] == []  # fmt: skip


def test_every_public_name_is_in_the_reference():
    pages = {path: path.read_text() for path in (ROOT / "docs" / "reference").glob("python-*.md")}
    for package in (tmm_engine, tmm_engine.index, tmm_engine.rerank):
        texts = [text for text in pages.values() if f".. currentmodule:: {package.__name__}\n" in text]
        named = {name for text in texts for name in re.findall(r"^\.\. (?:auto|py:)\w+:: (\w+)$", text, re.MULTILINE)}
        assert named == set(package.__all__)


def test_the_help_says_the_ratios_of_recognition():
    shown = " ".join(CliRunner().invoke(main, ["search", "--help"]).stdout.split())
    assert (
        f"Default: {RECOGNITION} for robust, as the preset says for tmm (fast: {preset('fast').rank.recognition})"
        in shown
    )


def test_pictures_and_make_targets_exist():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"`?make (\w+)", README))
