"""Where an index appears: refusals, the exchange by renames, what interrupted ones leave behind."""

import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from tests.builders import ROOT, beside, snapshot
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.store import target as target_module
from tmm_engine.index.store.manifest import MANIFEST
from tmm_engine.index.store.target import check_target, recover, staged


def index_at(folder: Path, text: str = "old") -> Path:
    """A folder that counts as an index."""
    (folder / "exemplars.lance").mkdir(parents=True)
    (folder / "exemplars.lance" / "data").write_text(text)
    (folder / MANIFEST).write_text(text)
    return folder


def content(folder: Path) -> str:
    """Which `index_at` this is; all of its files agree."""
    texts = {path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert len(texts) == 1
    return texts.pop()


def replace(target: Path, text: str = "new", *, overwrite: bool = True) -> None:
    with staged(target, overwrite=overwrite) as staging:
        index_at(staging / "inner", text)
        for path in (staging / "inner").iterdir():
            path.rename(staging / path.name)
        (staging / "inner").rmdir()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "idx"


# ---- appearing


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "an index"])
def test_it_appears_whole(target, before):
    if before == "an empty folder":
        target.mkdir()
    elif before == "an index":
        index_at(target)
    with staged(target, overwrite=True) as staging:
        assert staging.parent == target.parent
        assert list(staging.iterdir()) == []
        (staging / MANIFEST).write_text("new")
        assert not (target / MANIFEST).exists() or content(target) == "old"
    assert content(target) == "new"
    assert beside(target) == set()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("there", [True, False])
def test_an_exception_passes_through_and_changes_nothing(target, kind, there):
    before = snapshot(index_at(target)) if there else {}
    with pytest.raises(kind, match="stop"), staged(target, overwrite=True) as staging:
        (staging / MANIFEST).write_text("half")
        raise kind("stop")
    assert target.exists() == there
    assert snapshot(target) == before
    assert beside(target) == set()


def test_a_failing_exchange_puts_the_old_index_back(target):
    before = snapshot(index_at(target))
    with pytest.raises(FileNotFoundError), staged(target, overwrite=True) as staging:
        shutil.rmtree(staging)  # so that the second rename fails
    assert snapshot(target) == before
    assert beside(target) == set()


def test_a_link_stays_a_link_to_the_replaced_index(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "links").mkdir()
    real, link = index_at(tmp_path / "disk" / "real"), tmp_path / "links" / "link"
    link.symlink_to(real)
    for text in ("first", "second"):
        replace(link, text)
        assert link.is_symlink()
        assert content(real) == content(link) == text
    assert beside(real) == beside(link) == set()


def test_the_current_folder_can_be_a_target(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    replace(Path())
    assert content(tmp_path / "here") == "new"
    assert beside(tmp_path / "here") == set()


@pytest.mark.parametrize("name", ["with space", ".hidden", "日本", "a" * 200, "-x", "idx.building"])
def test_names_of_any_kind(tmp_path, name):
    replace(tmp_path / name)
    replace(tmp_path / name, "newer")
    assert content(tmp_path / name) == "newer"
    assert beside(tmp_path / name) == set()


# ---- refusals


def test_an_index_is_replaced_only_when_told_to(target):
    before = snapshot(index_at(target))
    for attempt in (lambda: check_target(target, overwrite=False), lambda: replace(target, overwrite=False)):
        with pytest.raises(IndexStateError, match=r"is an index already; `overwrite=True`"):
            attempt()
    assert snapshot(target) == before
    assert beside(target) == set()


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("kind", ["photos", "file", "almost"])
def test_what_is_not_an_index_is_never_touched(target, overwrite, kind):
    if kind == "file":
        target.write_text("my thesis")
    else:
        target.mkdir()
        (target / "photo.png").write_bytes(b"precious")
    if kind == "almost":
        (target / MANIFEST).mkdir()  # a folder of that name does not make an index
    before = snapshot(target.parent)
    for attempt in (lambda: check_target(target, overwrite=overwrite), lambda: replace(target, overwrite=overwrite)):
        with pytest.raises(IndexStateError, match="is not an index: it is left alone"):
            attempt()
    assert snapshot(target.parent) == before


def test_a_parent_must_be_there(tmp_path):
    with pytest.raises(IndexStateError, match="is not a folder; create it first"):
        check_target(tmp_path / "missing" / "idx", overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that another user can reach, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


WITHOUT_PRIVILEGES = """
import os, sys
from pathlib import Path
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.store.target import recover, staged
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
target = Path(sys.argv[1])
try:
    if sys.argv[2] == "build":
        with staged(target, overwrite=True):
            pass
    else:
        recover(target)
except IndexStateError as error:
    print(error)
"""


def run_without_privileges(target: Path, action: str) -> str:
    target.parent.chmod(0o555)  # for root too, once it has given its privileges up
    command = [sys.executable, "-c", WITHOUT_PRIVILEGES, str(target), action]
    try:
        return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    finally:
        target.parent.chmod(0o755)


def test_a_parent_must_be_writable(public_folder):
    target = index_at(public_folder / "idx")
    assert "cannot be written to; choose another path" in run_without_privileges(target, "build")
    assert content(target) == "old"
    assert beside(target) == set()


def test_putting_back_in_a_folder_that_cannot_be_written_says_so(public_folder):
    index_at(public_folder / ".idx.previous")
    said = run_without_privileges(public_folder / "idx", "recover")
    assert "was not put back after an interrupted overwrite" in said
    assert content(public_folder / ".idx.previous") == "old"


# ---- what a killed build leaves


def test_killed_between_the_two_renames_the_old_index_is_put_back_on_opening(target):
    index_at(target).rename(target.parent / ".idx.previous")
    index_at(target.parent / ".idx.building", "whole, but never shown")
    recover(target)
    assert content(target) == "old"
    assert beside(target) == set()


def test_killed_between_the_two_renames_the_next_build_knows_the_old_index(target):
    index_at(target).rename(target.parent / ".idx.previous")
    index_at(target.parent / ".idx.building", "half")
    with pytest.raises(IndexStateError, match="is an index already"):
        replace(target, overwrite=False)
    assert content(target) == "old"
    assert beside(target) == set()


def test_killed_while_the_old_index_was_removed_the_next_build_removes_the_rest(target):
    index_at(target, "new")
    index_at(target.parent / ".idx.previous", "old")
    (target.parent / ".idx.previous" / MANIFEST).unlink()
    recover(target)  # nothing to put back, nothing to wait for
    assert content(target) == "new"
    replace(target, "newest")
    assert content(target) == "newest"
    assert beside(target) == set()


def test_killed_while_building_the_next_build_starts_afresh(target):
    index_at(target.parent / ".idx.building", "half")
    recover(target)
    assert not target.exists()
    replace(target)
    assert content(target) == "new"
    assert beside(target) == set()


def test_recover_follows_links(tmp_path):
    index_at(tmp_path / ".real.previous")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    recover(tmp_path / "link")
    assert content(tmp_path / "link") == "old"


def test_recover_leaves_alone_what_needs_nothing(target):
    before = snapshot(index_at(target))
    recover(target)
    recover(target.parent / "nothing")
    assert snapshot(target) == before
    assert {path.name for path in target.parent.iterdir()} == {"idx"}  # readers leave no lock behind


# ---- two at once


def test_a_second_build_is_refused_and_the_first_goes_on(target):
    index_at(target)
    outcomes: list[str] = []

    def second(path: Path) -> None:
        try:
            replace(path, "second")
        except IndexStateError as error:
            outcomes.append(str(error))

    (target.parent / "link").symlink_to(target)
    with staged(target, overwrite=True) as staging:
        (staging / MANIFEST).write_text("first")
        for path in (target, target.parent / "link", target.parent / "x" / ".." / "idx"):
            (target.parent / "x").mkdir(exist_ok=True)
            thread = threading.Thread(target=second, args=(path,))
            thread.start()
            thread.join()
        recover(target)  # a reader does not wait for the lock
        assert content(target) == "old"
    assert len(outcomes) == 3
    assert all("another process is building" in outcome for outcome in outcomes)
    assert content(target) == "first"


def test_a_lock_that_does_not_come_free_is_a_clear_error(target, monkeypatch):
    monkeypatch.setattr(target_module, "RECOVERY_SECONDS", 0.2)
    index_at(target).rename(target.parent / ".idx.previous")
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with filelock.FileLock(target.parent / ".idx.lock"):
            held.set()
            leave.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(20)
    try:
        with pytest.raises(IndexStateError, match="was not put back"):
            recover(target)
    finally:
        leave.set()
        thread.join()
    recover(target)
    assert content(target) == "old"


def test_the_index_has_the_permissions_of_any_new_folder(target):
    replace(target)
    (target.parent / "plain").mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((target.parent / "plain").stat().st_mode)


def test_a_path_that_is_not_utf8_is_refused_in_one_line(tmp_path):
    odd = tmp_path / b"caf\xe9.idx".decode("utf-8", "surrogateescape")
    with pytest.raises(IndexStateError, match=r"caf\\udce9\.idx: expected a path in UTF-8"):
        check_target(odd, overwrite=False)
