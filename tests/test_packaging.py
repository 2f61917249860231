"""What is installed: one import name with all its folders and files, also beside packages named like our folders."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

import tmm_engine
from tests.digits import make_classifier, write_photos, write_queries
from tmm_engine.cli.main import main
from tmm_engine.info import describe_system

ROOT = Path(__file__).parent.parent
FOLDERS = ("engine", "index", "rerank", "bench")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OTHERS = "raise RuntimeError('not ours')\n"  # the content of other people's engine.py, index.py, …


def installed_name(path: Path) -> str:
    """engine/cli -> tmm_engine.cli; index/store -> tmm_engine.index.store."""
    parts = path.relative_to(ROOT).parts
    return ".".join(("tmm_engine", *(parts[1:] if parts[0] == "engine" else parts)))


def test_every_folder_with_python_files_is_a_package_of_the_wheel():
    found = {installed_name(file.parent) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_kind_of_file_that_is_no_python_file_is_package_data(tracked: list[str]):
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["*"]
    files = [Path(name) for name in tracked if name.partition("/")[0] in FOLDERS]
    others = [file for file in files if file.suffix not in {".py", ".sh"}]
    assert others
    assert [file for file in others if not any(file.match(pattern) for pattern in patterns)] == []


def test_the_version_is_said_in_one_place():
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "tmm_engine.__version__"}}
    assert CliRunner().invoke(main, ["--version"]).stdout == f"tmm-engine {tmm_engine.__version__}\n"
    assert describe_system()["tmm-engine"] == tmm_engine.__version__


def test_the_changelog_keeps_to_its_form():
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    [first, *older] = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert first == "[Unreleased]"
    assert [title for title in older if not re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title)] == []
    kinds = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert older or len(kinds) == len(set(kinds))  # one section of a kind until there is a release


def test_floors_are_those_of_all_dependencies():
    floors = runpy.run_path(str(ROOT / ".ci" / "floors"))["floors"](PYPROJECT)
    groups = [*PYPROJECT["project"]["optional-dependencies"].values(), *PYPROJECT["dependency-groups"].values()]
    every = [*PYPROJECT["project"]["dependencies"], *(each for group in groups for each in group)]
    assert sorted(floors) == sorted(re.sub(r"\[.*?\]", "", each).replace(">=", "==", 1) for each in every)


@pytest.mark.parametrize("requirement", ["numpy", "numpy==1", "numpy<3", "numpy>=1,<3"])
def test_a_dependency_without_a_plain_floor_is_refused(requirement: str):
    floors = runpy.run_path(str(ROOT / ".ci" / "floors"))["floors"]
    project = {"dependencies": ["click>=8.1", requirement], "optional-dependencies": {}}
    with pytest.raises(ValueError, match=re.escape(requirement)):
        floors({"project": project, "dependency-groups": {}})


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files that git knows, but for the records of benchmarks, which are not shipped."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs the repository")
    names = [name for name in listed.stdout.splitlines() if not name.startswith("bench/results/")]
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git tracks, so that no earlier build/ gets in; the links of `make check` beside it."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    subprocess.run([source / ".ci" / "links"], check=True)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [built] = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the source distribution: what that lacks, the wheel lacks."""
    pip("wheel", sdist, "--no-deps", "--no-build-isolation", "--wheel-dir", sdist.parent)
    [built] = sdist.parent.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is installed, beside other packages that are called `index`, `rerank` and `bench`."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", wheel, "--no-deps", "--no-index", "--target", folder)
    for name in ("index", "rerank", "bench"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(OTHERS)
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A user's folder: photos, weights, and code of the user's named like our folders."""
    for name in FOLDERS:
        (tmp_path / f"{name}.py").write_text(OTHERS)
    write_photos(tmp_path / "photos", count=20)
    write_queries(tmp_path / "queries", count=1)
    make_classifier().save(tmp_path / "weights.safetensors")
    return tmp_path


def pip(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def python(site: Path, work: Path, *arguments: str | Path) -> str:
    """Output of Python in `work`, where `tmm_engine` is the one in `site`."""
    done = run(site, work, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(site: Path, work: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=work,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, work)))},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_source_distribution_holds_every_file_but_records(sdist: Path, tracked: list[str]):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {name for name in held if name.startswith("tmm_engine.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert held - made == {name for name in tracked if not name.startswith(".git")}


@pytest.mark.slow
def test_the_wheel_holds_one_package_with_all_its_files(wheel: Path, tracked: list[str]):
    names = zipfile.ZipFile(wheel).namelist()
    [metadata] = {name.partition("/")[0] for name in names} - {"tmm_engine"}
    assert metadata == f"tmm_engine-{tmm_engine.__version__}.dist-info"
    paths = [ROOT / name for name in tracked if name.startswith(tuple(f"{folder}/" for folder in FOLDERS))]
    files = {f"{installed_name(path.parent).replace('.', '/')}/{path.name}" for path in paths if path.suffix != ".sh"}
    assert {name for name in names if name.startswith("tmm_engine/")} == files
    assert {f"{metadata}/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= set(names)


@pytest.mark.slow
def test_the_wheel_works_beside_packages_and_files_named_like_our_folders(site: Path, work: Path):
    where = python(site, work, "-c", "import tmm_engine; print(tmm_engine.__file__)").strip()
    assert Path(where) == site / "tmm_engine" / "__init__.py"
    script, module = (site / "bin" / "engine",), ("-m", "tmm_engine.cli.main")  # -m looks into `work` first
    for command in (script, module):
        assert "build-index" in python(site, work, *command, "--help")
    assert "tmm-engine" in python(site, work, *script, "info", "--system")
    build = ("build-index", "photos", "photos.idx", "--weights", "weights.safetensors", "--views", "1")
    python(site, work, *module, *build)
    assert "digit-" in python(site, work, *script, "search", "photos.idx", "queries", "-k", "3")
    python(site, work, "-c", "from tmm_engine.digits import load_digits; assert load_digits()[0].shape == (1797, 8, 8)")
    python(site, work, "-c", "import tmm_engine.bench.peak")


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_the_files_beside_which_the_wheel_works_would_have_been_imported(site: Path, work: Path, name: str):
    assert "RuntimeError: not ours" in run(site, work, "-c", f"import {name}").stderr
