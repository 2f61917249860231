"""The commands that change an index, and searches in what they leave."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from PIL import Image

from tests.digits import IMAGES, SHORT, make_classifier, write_photos, write_queries
from tests.page import Page
from tests.test_engine_cli import answers, error_line, ranked, run


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("living")
    write_photos(folder / "photos", count=40)
    write_queries(folder / "queries")
    make_classifier().save(folder / "weights.safetensors")
    (folder / "photos" / "metadata.csv").write_text("file_name,page\ndigit-3/0003.png,3\ndigit-4/0004.png,4\n")
    done = run("build-index", folder / "photos", folder / "photos.idx", "--weights", folder / "weights.safetensors",
               *SHORT)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture
def work(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "work"))


def test_a_life(work: Path):
    index, query = work / "photos.idx", work / "queries" / "query-200.png"
    more = work / "more" / "digit-3"
    more.mkdir(parents=True)
    Image.fromarray(IMAGES[200]).save(more / "new.png")
    Image.fromarray(IMAGES[201]).save(more / "0003.png")

    taken = run("add", index, work / "more")
    assert (taken.exit_code, taken.stdout) == (1, "")
    assert "'digit-3/0003.png'; nothing was changed. Replace them (--replace)" in taken.stderr
    added = run("add", index, work / "more", "--replace")
    assert added.stdout.strip() == f"{index}: 1 added, 1 replaced; version 2, 41 exemplars"
    [found] = answers(run("search", index, query, "--mode", "l2", "-k", 1, "--json"))
    assert (found["hits"][0]["id"], found["hits"][0]["class_name"]) == ("digit-3/new.png", "digit-3")
    [found] = answers(run("search", index, query, "--mode", "l2", "--version", 1, "-k", 50, "--json"))
    assert len(found["hits"]) == 40
    assert "digit-3/new.png" not in dict(ranked(found))

    deleted = run("delete", index, "--id", "digit-3/new.png", "--id", "digit-4/0004.png")
    assert "2 deleted; version 3, 39 exemplars" in deleted.stdout
    deleted = run("delete", index, "--where", "path LIKE '%digit-0%'")
    assert "deleted; version 4" in deleted.stdout
    assert "compacted; version 5" in run("compact", index).stdout
    lines = answers(run("info", index, "--versions", "--json"))
    assert [line["version"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[1]["change"].startswith("added 1, replaced 1 from")
    assert "digit-0" in run("info", index, "--versions").stdout
    assert answers(run("info", index, "--version", 2, "--json"))[0]["exemplars"] == 41
    assert "version 6" in run("compact", index, "--discard-versions").stdout
    gone = run("search", index, query, "--version", 2)
    assert gone.exit_code == 1
    assert "has the versions 6 to 6, not 2" in gone.stderr


def test_sync_brings_the_index_to_what_the_folder_is_now(work: Path):
    index, photos = work / "photos.idx", work / "photos"
    moved = run("sync", index, photos)  # the folder was copied, and a path is metadata
    assert (
        "0 added, 40 replaced (40 only in label or metadata), 0 deleted, 0 unchanged; 0 through the model; version 2"
        in moved.stdout
    )
    nothing = "0 added, 0 replaced, 0 deleted, 40 unchanged; 0 through the model; version 2"
    assert nothing in run("sync", index, photos).stdout
    (photos / "digit-3" / "0003.png").unlink()
    Image.fromarray(IMAGES[200]).save(photos / "digit-3" / "new.png")
    Image.fromarray(IMAGES[201]).save(photos / "digit-5" / "0005.png")
    (photos / "digit-6" / "0006.png").write_bytes(b"no image")
    (photos / "metadata.csv").write_text("file_name,page\ndigit-4/0004.png,5\n")

    index.chmod(0o555)
    planned = run("sync", index, photos, "--delete", "--dry-run")
    index.chmod(0o755)
    assert planned.stdout.splitlines() == [
        "add digit-3/new.png", "replace digit-4/0004.png", "replace digit-5/0005.png", "delete digit-3/0003.png",
        f"{index}: 1 added, 2 replaced (1 only in label or metadata), 1 deleted, 36 unchanged; 2 through the model; "
        f"would be the result (dry run), 40 exemplars",
    ]  # fmt: skip
    stays = "1 images could not be read and were skipped\n1 of them are in the index and stay as they were"
    assert stays in planned.stderr
    kept = run("sync", index, photos)
    assert kept.stdout == (
        f"{index}: 1 added, 2 replaced (1 only in label or metadata), 0 deleted, 36 unchanged; 2 through the model; "
        f"version 3, 41 exemplars\n"
    )
    assert "1 exemplars are missing from the source and stay (--delete)" in kept.stderr
    gone = run("sync", index, photos, "--delete")
    assert "0 added, 0 replaced, 1 deleted, 39 unchanged; 0 through the model; version 4, 40" in gone.stdout
    assert "0 deleted, 39 unchanged; 0 through the model; version 4, 40" in run("sync", index, photos).stdout
    after = answers(run("search", index, "--id", "digit-4/0004.png", "--mode", "l2", "-k", 3, "--json"))
    assert after[0]["hits"][0]["metadata"]["page"] == 5
    refused = run("sync", index, photos, "--strict")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "digit-6/0006.png" in error_line(refused)


def test_sync_with_a_flat_folder_says_that_labels_are_predictions(work: Path):
    (work / "flat").mkdir()
    Image.fromarray(IMAGES[200]).save(work / "flat" / "new.png")
    assert "what is added gets the model's predictions" in run("sync", work / "photos.idx", work / "flat").stderr


def test_another_folder_of_the_same_names_takes_a_prefix(work: Path):
    done = run("add", work / "photos.idx", work / "photos", "--id-prefix", "again/")
    assert "40 added, 0 replaced; version 2, 80 exemplars" in done.stdout
    [found] = answers(
        run("search", work / "photos.idx", "--id", "again/digit-3/0003.png", "--mode", "l2", "-k", 2, "--json")
    )
    assert [id_ for id_, _ in ranked(found)] == ["again/digit-3/0003.png", "digit-3/0003.png"]  # equal: by id


@pytest.mark.parametrize("mode", ["tmm", "l2", "cosine"])
def test_filters_on_the_command_line(built: Path, mode: str):
    arguments = ("search", built / "photos.idx", built / "queries", "--mode", mode, "-k", 50, "--json")
    arguments += ("--set", "trigger.steps=20") if mode == "tmm" else ()
    expected = {f"digit-{label}" for label in (3, 8)}
    for found in answers(run(*arguments, "--where", "label = 3 OR label = 8")):
        assert {hit["class_name"] for hit in found["hits"]} == expected
        assert "restricted to" in found["notes"][0]
        assert found["scored"] == len(found["hits"]) < found["exemplars"] == 40
    [one, _] = answers(run(*arguments, "--where", "page = 4"))
    assert [(hit["id"], hit["metadata"]["page"]) for hit in one["hits"]] == [("digit-4/0004.png", 4)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("delete", "photos.idx"), 2, "either --id or --from, or --where"),
        (("delete", "photos.idx", "--id", "x", "--where", "label = 1"), 2, "either --id or --from, or --where"),
        (("delete", "photos.idx", "--id", "digit-3/0003.jpg"), 1, "did you mean 'digit-3/0003.png'"),
        (("delete", "photos.idx", "--where", "label >= 0"), 1, "delete its folder instead"),
        (("delete", "nothing.idx", "--id", "x"), 1, "does not exist"),
        (("delete", "photos", "--id", "x"), 1, "is not an index"),
        (("compact", "photos"), 1, "is not an index"),
        (("add", "photos", "photos"), 1, "is not an index"),
        (("sync", "photos", "photos", "--dry-run"), 1, "is not an index"),
        (("sync", "photos.idx", "nothing"), 1, "nothing"),
        (("add", "photos.idx", "nothing"), 1, "nothing"),
        (("add", "photos.idx", "queries/query-200.png", "--split", "train"), 1, "split"),
        (("search", "photos.idx", "queries", "--version", "7"), 1, "has the versions 1 to 1, not 7"),
        (("search", "photos.idx", "queries", "--version", "0"), 2, "0 is not in the range"),
        (("search", "photos.idx", "queries", "--where", "labl = 3"), 1, "Did you mean 'label'?"),
        (("info", "photos.idx", "--version", "3"), 1, "not 3"),
        (("info", "--versions"), 2, "give an INDEX"),
    ],
)
def test_bad_input_is_one_clear_line_and_changes_nothing(
    built: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, message: str
):
    monkeypatch.chdir(built)
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file()}
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in error_line(result)
    after = {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.suffix != ".lock"} == {
        p: t for p, t in before.items() if p.suffix != ".lock"
    }


def test_one_bad_image_among_others_has_an_error_in_its_place(built: Path, tmp_path: Path):
    queries = Path(shutil.copytree(built / "queries", tmp_path / "queries"))
    (queries / "query-200a.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(queries / "query-300.png")
    arguments = ("search", built / "photos.idx", queries, "--mode", "l2,tmm", "-k", 3, "--preset", "paper")
    arguments += ("--set", "head.min_steps=10", "--set", "trigger.steps=20")
    done = run(*arguments, "--json", "--html", tmp_path / "page.html")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    names = [Path(line["query"]).stem for line in lines]
    assert names == [*["query-200"] * 2, "query-200a", *["query-201"] * 2, *["query-300"] * 2]
    assert [("error" in line) for line in lines] == [False, False, True, False, False, False, True]
    assert "expected an image" in lines[2]["error"]
    assert "is the image constant?" in lines[6]["error"]
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (1, "error: 2 of 7 answers failed; see their places")
    errors = Page((tmp_path / "page.html").read_text(encoding="utf-8")).of_class("error")
    assert errors == [f"Cannot be answered: {lines[2]['error']}", f"Not answered in every mode: {lines[6]['error']}"]
    assert "query-200a.png — cannot be answered: " in run(*arguments).stdout
    alone = run("search", built / "photos.idx", queries / "query-300.png", "--preset", "paper")
    assert (alone.exit_code, alone.stdout) == (1, "")
    assert "is the image constant?" in alone.stderr


def test_verify_finds_a_flipped_byte_before_a_search(work: Path):
    [data] = (work / "photos.idx" / "exemplars.lance" / "data").iterdir()
    raw = bytearray(data.read_bytes())
    raw[200] ^= 4
    data.write_bytes(raw)
    result = run("search", work / "photos.idx", work / "queries", "--mode", "l2", "--verify")
    assert result.exit_code == 1
    assert "is not what was written" in result.stderr


def wait_until_locked(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            filelock.FileLock(path).acquire(timeout=0).lock.release()
        except filelock.Timeout:
            return
        time.sleep(0.005)


@pytest.mark.parametrize("command", [("search", "--preset", "paper", "--set", "head.min_steps=1000000"), ("add",)])
def test_ctrl_c_ends_with_130_and_leaves_a_usable_index(work: Path, command: tuple[str, ...]):
    name, *options = command
    if name == "add":
        write_photos(work / "many", count=1700)
    paths = ["photos.idx", "queries" if name == "search" else "many", *([] if name == "search" else ["--replace"])]
    process = subprocess.Popen(
        [sys.executable, "-m", "tmm_engine.cli.main", name, *paths, *options],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    if name == "search":
        assert process.stderr.readline().startswith("tmm on")
        time.sleep(1)
    else:
        wait_until_locked(work / ".photos.idx.lock", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert "version 2" in run("delete", work / "photos.idx", "--id", "digit-3/0003.png").stdout
