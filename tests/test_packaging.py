"""What is installed: one import name with all its folders and files, also beside packages named like our folders."""

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.digits import make_classifier, write_photos, write_queries

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


def test_every_kind_of_file_that_is_no_python_file_is_package_data():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["*"]
    tracked = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("needs the repository")
    files = [Path(name) for name in tracked.stdout.splitlines() if not name.startswith("bench/results/")]
    others = [file for file in files if file.suffix not in {".py", ".sh"}]
    assert others
    assert [file for file in others if not any(file.match(pattern) for pattern in patterns)] == []


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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git tracks, so that the checkout stays as it is and no earlier build/ gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if not name.startswith(("bench/results/", "tests/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    isolation = ["--no-build-isolation"] if can_build_here() else []  # else pip fetches setuptools
    pip("wheel", source, "--no-deps", *isolation, "--wheel-dir", folder)
    [built] = folder.glob("*.whl")
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


def can_build_here() -> bool:
    """Whether setuptools is as new as pyproject.toml asks: that of a fresh Python 3.11 is 65."""
    [requirement] = PYPROJECT["build-system"]["requires"]
    try:
        found = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return False
    return int(found.partition(".")[0]) >= int(requirement.removeprefix("setuptools>="))


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
def test_the_wheel_holds_one_package_with_all_its_files(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    [metadata] = {name.partition("/")[0] for name in names} - {"tmm_engine"}
    assert metadata.endswith(".dist-info")
    modules = {
        f"{installed_name(file.parent).replace('.', '/')}/{file.name}"
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    data = ("py.typed", "__init__.pyi", "index/__init__.pyi", "rerank/__init__.pyi", "digits.npz")
    assert {f"tmm_engine/{name}" for name in (*data, "views/page.html.j2")} <= set(names)
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
