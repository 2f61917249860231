"""The reliability bench: small runs of it hold, and it counts what it is there to count."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tmm_engine.bench.reliability import faults, hostile
from tmm_engine.bench.reliability.bench import Reliability, ReliabilityBench, print_reliability
from tmm_engine.bench.reliability.faults import Plan
from tmm_engine.bench.reliability.surroundings import CONTENT, KINDS, NOT_MOUNTED, Attempt, Skipped, outcome_of
from tmm_engine.index.errors import IndexStateError, TmmEngineError
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.manifest import Manifest


@pytest.fixture(scope="module")
def bench() -> ReliabilityBench:
    return ReliabilityBench(trials=2, cases=14, searches=10, rows=20, seed=3)


@pytest.mark.slow
def test_a_small_run_loses_nothing(bench: ReliabilityBench, tmp_path: Path):
    bench._kill_trials(tmp_path / "kills")
    bench._full_disks(tmp_path / "disks")
    bench._endure(tmp_path / "endure")
    bench._hostile(tmp_path / "hostile")
    result = bench.result
    assert result.failures == []
    assert (result.trials, result.hostile_cases) == (2, 14)
    assert result.endurance["searches"] == 10
    assert result.where["ratio"] > 0
    assert any(name.endswith(": error") for name in result.disk_full)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that who gave root's privileges up can reach, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.slow
def test_permissions_read_only_disks_and_clocks_set_back_lose_nothing(public_folder: Path):
    bench = ReliabilityBench(trials=0)
    bench._surroundings(public_folder)
    result, outcomes = bench.result, bench.result.surroundings
    assert result.failures == []
    assert outcomes["nothing denied, read: right"] == 1
    assert outcomes["idx cannot be written, read: right"] == 1
    assert outcomes["idx/exemplars.lance/data cannot be entered, read: error"] == 1
    assert outcomes["index.json cannot be read: error"] == 1
    for kind in KINDS:
        assert outcomes[f".idx.lock cannot be written, {kind}: error"] == 1
        assert outcomes[f"clock set back, {kind}: done"] == 1
        if f"read-only disk: {NOT_MOUNTED}" not in outcomes:
            assert outcomes[f"read-only disk, {kind}: error"] == 1


def say(outcome: str) -> str:
    return outcome


def test_outcomes_that_are_not_allowed_and_contents_that_are_not_left_are_counted(tmp_path: Path):
    bench, index = ReliabilityBench(trials=0), tmp_path / "idx"
    write_index(faults.source_of(CONTENT), index, faults.small_classifier())
    attempts = [
        Attempt("as it should be", index, say, ("error",), {"error": CONTENT}),
        Attempt("done where it cannot be", index, say, ("done",), {"error": CONTENT}),
        Attempt("lost", index, say, ("done",), {"done": CONTENT | {"id 0": 9}}),
        Attempt("raised", index, int, ("x",), {"error": CONTENT}),
        Skipped("not here"),
    ]
    outcomes = bench._try_all(iter(attempts))
    assert (bench.result.wrong_silent, bench.result.lost, bench.result.crashed) == (1, 1, 1)
    assert (outcomes["as it should be: error"], outcomes["not here"]) == (1, 1)


def test_an_error_is_one_line():
    def fail(text: str) -> str:
        raise IndexStateError(text)

    assert outcome_of(lambda: fail("one line")) == "error"
    assert outcome_of(lambda: fail("one\nand another")).startswith("an error that is not one line")


def test_a_file_that_lacks_only_its_end_is_an_error_and_not_done(tmp_path: Path):
    """Lance says nothing of a last write that fails."""
    bench, seed = ReliabilityBench(trials=0), 5
    now = Plan(seed).first()
    kind, after = Plan(seed).next(now)
    assert kind == "build"
    for name in ("whole", "cut"):
        write_index(faults.source_of(now), tmp_path / name, faults.small_classifier())
    assert bench._alone(faults.fill_disk, tmp_path / "whole", 10**6, seed) == "done"
    assert bench._any_right(tmp_path / "whole", [after], "whole")
    [data] = (tmp_path / "whole" / "exemplars.lance" / "data").iterdir()
    assert bench._alone(faults.fill_disk, tmp_path / "cut", data.stat().st_size - 1, seed) == "error"
    assert bench._any_right(tmp_path / "cut", [now], "cut")


def test_an_index_at_another_content_counts_as_lost_and_a_wrong_answer_as_wrong(tmp_path: Path, monkeypatch):
    bench, content = ReliabilityBench(trials=0), Plan(0).first()
    write_index(faults.source_of(content), tmp_path / "idx", faults.small_classifier())
    assert bench._any_right(tmp_path / "idx", [content], "as built")
    assert not bench._any_right(tmp_path / "idx", [content | {"id 0": 9}], "another")
    assert (bench.result.lost, bench.result.wrong_silent) == (1, 0)
    monkeypatch.setattr(faults, "exact_scores", lambda query, features, metric: features[:, 0])
    assert bench._any_right(tmp_path / "idx", [content], "as built")
    assert (bench.result.lost, bench.result.wrong_silent) == (1, 1)
    shutil.rmtree(tmp_path / "idx")
    assert not bench._any_right(tmp_path / "idx", [content], "gone")
    assert bench.result.lost == 2


def test_damage_that_is_found_and_damage_that_would_not_be(tmp_path: Path):
    bench, outcomes = ReliabilityBench(trials=0), Counter[str]()
    index = bench._whole(tmp_path / "idx")
    name = next(Path(name) for name in Manifest.read(index).files if "/data/" in name)
    bench._judge(index, name, "not at all", outcomes)  # nothing is damaged, so nothing can be found
    assert outcomes == {"data, quick check: right": 1, "data, full check: right": 1}
    assert bench.result.undetected == 1
    raw = bytearray((index / name).read_bytes())
    raw[len(raw) // 3] ^= 1
    (index / name).write_bytes(raw)
    bench._judge(index, name, "flipped", outcomes)
    assert outcomes["data, full check: error"] == 1
    assert bench.result.undetected == 1


def dies() -> None:
    import os

    os.abort()


def test_processes_that_die_or_raise_are_crashes():
    bench = ReliabilityBench(trials=0)
    assert bench._alone(dies) == "crashed: the process ended with -6"
    assert bench._alone(int, "x").startswith("crashed: ValueError")
    assert bench._alone(int, "7") == 7


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_generated_input_is_accepted_or_refused_and_repeats(kind: str, tmp_path: Path):
    import random

    outcomes = []
    for seed in (*range(12), 5):
        folder = tmp_path / str(len(outcomes))
        folder.mkdir()
        try:
            hostile.KINDS[kind](random.Random(seed), folder)
            outcomes.append("accepted")
        except TmmEngineError as error:
            outcomes.append(str(error).replace(str(folder), ""))
    assert outcomes[5] == outcomes[-1]
    assert len(set(outcomes)) > 1


def test_figures_and_bars_are_printed(capsys: pytest.CaptureFixture[str]):
    result = Reliability(trials=200, hostile_cases=2100, lost=1, endurance={"mib": 3.0}, where={"ratio": 1.2})
    result.failures = ["lost: a kill"]
    print_reliability(result, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["bars"]["lost"] == {"value": 1, "bar": 0, "holds": False}
    assert printed["bars"]["trials"]["holds"]
    assert not printed["bars"]["where_ratio"]["holds"]
    print_reliability(result, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert "FAILS  lost = 1 (bar 0)" in lines
    assert lines[-1] == "lost: a kill"
