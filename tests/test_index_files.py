"""Files and folders are replaced as a whole, or stay."""

from pathlib import Path

import pytest

from tmm_engine.index.errors import InputError
from tmm_engine.index.files import TEMPORARY, replacing, write_file


def write(path, content, *, folder):
    if folder:
        path.mkdir()
        path = path / "file"
    path.write_text(content)


def read(path):
    return (path / "file" if path.is_dir() else path).read_text()


def names(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("old", ["old", None])
def test_what_is_written_takes_the_place(tmp_path, folder, durable, old):
    path = tmp_path / "target"
    if old is not None:
        write(path, old, folder=folder)
    with replacing(path, durable=durable) as written:
        assert written.parent == tmp_path
        assert written.name.startswith(TEMPORARY)
        write(written, "new", folder=folder)
        assert (read(path) if path.exists() else None) == old
    assert read(path) == "new"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("written_before", [False, True])
def test_after_a_failure_the_old_one_is_there_and_nothing_else(tmp_path, folder, written_before):
    path = tmp_path / "target"
    write(path, "old", folder=folder)
    with pytest.raises(KeyboardInterrupt), replacing(path) as written:
        if written_before:
            write(written, "new", folder=folder)
        raise KeyboardInterrupt
    assert read(path) == "old"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_block_that_writes_nothing_fails_and_changes_nothing(tmp_path, folder):
    path = tmp_path / "target"
    write(path, "old", folder=folder)
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert read(path) == "old"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_link_keeps_pointing_where_it_does(tmp_path, folder):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    write(target, "old", folder=folder)
    link.symlink_to(target)
    with replacing(link) as written:
        write(written, "new", folder=folder)
    assert link.is_symlink()
    assert read(target) == "new"
    assert names(tmp_path / "elsewhere") == ["target"]


def test_a_new_file_can_be_read_by_whoever_may_read_new_files(tmp_path):
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "target", durable=True) as written:
        written.write_text("")
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("text", [True, False])
def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path, text: bool):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "photo.png").write_bytes(b"photo")
    with pytest.raises(InputError, match=r"expected a file to write to, got .*photos, which is a folder"):
        write_file(str(folder) if text else folder, b"content")
    assert (folder / "photo.png").read_bytes() == b"photo"
    write_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
