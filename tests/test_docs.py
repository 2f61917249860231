"""The README's commands and code are run as they stand; its pictures and folders exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests import notebook
from tests.digits import make_classifier, write_photos, write_queries
from tmm_engine.cli.main import main
from tmm_engine.options import RECOGNITION
from tmm_engine.rerank import preset

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL = [
    line.partition("  #")[0].rstrip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("engine ")
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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
    return folder


def write_vit(folder: Path) -> None:
    """What transformers saves of a classifier and its image processor."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=10,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def test_there_is_something_to_run():
    assert len(SHELL) >= 6
    assert len(PYTHON) >= 2


@pytest.mark.parametrize("command", SHELL)
def test_commands_run_in_the_readmes_order(work: Path, monkeypatch: pytest.MonkeyPatch, command: str):
    monkeypatch.chdir(work)
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert result.stdout


@pytest.mark.parametrize("code", PYTHON, ids=["open", "arrays"])
def test_python_blocks_run(work: Path, code: str):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=work, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore")  # what runs a notebook has warnings of its own; those of ours are seen elsewhere
def test_the_notebook_runs_and_its_outputs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for variable in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    kept = notebook.kinds(notebook.read())
    assert ["image/png", "text/plain"] in [form for outputs in kept for form in outputs]
    assert notebook.kinds(notebook.executed(notebook.read())) == kept


def test_every_command_is_in_the_readme():
    assert [name for name in main.commands if f"engine {name}" not in README and f"make {name}" not in README] == []


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
