"""Builds that end before their time, or beside another: full disks, kills, two at once; and the memory they need."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders import beside, finished, seed_of, snapshot, start, tiny_build
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.store.manifest import MODEL, Manifest
from tmm_engine.index.store.target import recover


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "idx"


def test_where_the_disk_is_full_the_old_index_stays(target):
    """The kernel refuses files beyond a size, as a full disk or a quota does, in the middle of a write."""
    tiny_build(target)
    before = snapshot(target)
    model = (target / MODEL).stat().st_size
    limits = (0, 100, 1000, 4000, model - 1)  # fragments fail, then the model, the largest file
    said = finished(start("build_confined(Path(sys.argv[1]), *map(int, sys.argv[2:]))", target, *limits)).splitlines()
    assert len(said) == len(limits)
    assert all(f"{target} cannot be written" in line and "nothing was changed" in line for line in said), said
    assert snapshot(target) == before
    assert beside(target) == set()


WAITING = """
def wait(step, done, total):
    if done == 16:
        say("building")
        sys.stdin.readline()
tiny_build(Path(sys.argv[1]), 1, overwrite=True, progress=wait)
"""


def test_a_build_beside_another_processes_is_refused_and_the_other_one_ends_well(target):
    tiny_build(target)
    first = start(WAITING, target)
    assert first.stdout.readline() == "building\n"
    before = snapshot(target)
    with pytest.raises(IndexStateError, match="another process is building"):
        tiny_build(target, 2, overwrite=True)
    assert snapshot(target) == before
    assert seed_of(target) == 0
    first.stdin.write("go on\n")
    finished(first)
    assert seed_of(target) == 1
    assert beside(target) == set()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def check_after_a_kill(target: Path, *, there_before: bool) -> int | None:
    """Old, new or (if there was none) no index; the next build works and cleans up. Returns the seed found."""
    recover(target)
    found = seed_of(target) if target.exists() else None
    assert found is not None or not there_before
    tiny_build(target, 7, overwrite=True)
    assert seed_of(target) == 7
    assert beside(target) == set()
    return found


def kill_at_random(target: Path, seed: int) -> None:
    there_before = seed % 3 > 0
    if there_before:
        tiny_build(target)
    process = start("build_until_killed(Path(sys.argv[1]))", target)
    time.sleep(random.Random(seed).uniform(0, 0.4))
    kill(process)
    check_after_a_kill(target, there_before=there_before)


@pytest.mark.parametrize("seed", range(3))
def test_a_build_killed_at_a_random_moment_leaves_a_whole_index_or_none(target, seed):
    kill_at_random(target, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 30))
def test_more_builds_killed_at_random_moments(target, seed):
    kill_at_random(target, seed)


def die(target: Path, event: str, number: int) -> int | None:
    """Kill an overwrite of seed 0 by seed 1 just before an operation; the seed found, None if it survived."""
    tiny_build(target)
    process = start("build_and_die(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))", target, event, number)
    said = process.communicate()[0]
    assert (process.returncode, said) in ((-signal.SIGKILL, ""), (0, f"survived {event}\n"))
    found = check_after_a_kill(target, there_before=True)
    return found if process.returncode else None


# A build renames the manifest, then the old index out of the way and the new one to its place.
@pytest.mark.parametrize(("number", "survivor"), [(2, 0), (3, 0)])
def test_a_build_killed_before_each_rename_of_the_exchange(target, number, survivor):
    assert die(target, "os.rename", number) == survivor


def test_a_build_killed_while_it_removes_the_old_index_leaves_the_new_one(target):
    assert die(target, "os.remove", 3) == 1  # the first is a file of Lance's that no version needs


@pytest.mark.slow
@pytest.mark.parametrize("event", ["os.rename", "os.remove", "os.mkdir", "os.rmdir", "open", "shutil.rmtree"])
def test_a_build_killed_before_each_operation_on_the_file_system(tmp_path, event):
    for number in range(1, 17):
        (tmp_path / str(number)).mkdir()
        if die(tmp_path / str(number) / "idx", event, number) is None:
            assert number > 1
            return


MEASURE = """
from tmm_engine.index.store.building import write_index
batches.MAX_IMAGES, lance_store.FRAGMENT_BYTES = 1024, 16 << 20
model = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.Linear(16, 4))
classifier = Classifier.from_module(model, image_shape=(3, 32, 32))
write_index(EndlessSource(int(sys.argv[2])), Path(sys.argv[1]), classifier)
say(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_exemplars(tmp_path):
    """40,000 images are 123 MB, 160,000 are 491 MB; of the 368 MB between them a tenth is tolerated."""
    unit = 1 if sys.platform == "darwin" else 1024
    few, many = (int(finished(start(MEASURE, tmp_path / str(n), n))) * unit for n in (40_000, 160_000))
    assert Manifest.read(tmp_path / "160000").exemplars == 160_000
    assert many - few < 37e6
