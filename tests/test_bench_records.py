"""Files of records: round trips, resuming, interrupted writes, damage, and who may write."""

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import ROOT, finished, start
from tmm_engine.bench.records import RecordFile, describe_run, plain, read_records
from tmm_engine.index.errors import InputError

KEY = ("query", "method")
IDENTITY = ("benchmark", "seed")
SETTINGS = {"benchmark": "robustness", "seed": 3, "queries": 2, "methods": {"l2": {}, "tmm": {"clamp": True}}}

scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


def opened(path: Path, **changes) -> RecordFile:
    return RecordFile.open(path, SETTINGS | changes, KEY, IDENTITY)


def write(path: Path, count: int, *, method: str = "l2") -> list[dict]:
    records = [{"query": f"q{number}", "method": method, "rank": number} for number in range(count)]
    with opened(path) as file:
        for record in records:
            file.append(record)
    return records


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.text(max_size=8).filter(lambda name: name != "settings"), values), max_size=5))
def test_what_is_written_is_read(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    records = [record | {"query": number, "method": "l2"} for number, record in enumerate(found)]
    with opened(path) as file:
        for record in records:
            file.append(record)
    read = read_records(path)
    assert read.records == [plain(record) for record in records]
    assert read.settings == SETTINGS
    assert read.runs == [SETTINGS]


def test_numpy_becomes_json_and_what_json_lacks_becomes_null():
    value = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": np.array([1.0, np.nan]),
        "d": (True, -math.inf),
        "e": np.True_,
    }
    assert json.dumps(plain(value)) == '{"a": 0.5, "b": 3, "c": [1.0, null], "d": [true, null], "e": true}'


def test_a_record_is_in_the_file_at_once(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    with opened(path) as file:
        assert read_records(path).records == []
        file.append({"query": np.int64(1), "method": "l2", "radius": np.inf})
        assert read_records(path).records == [{"query": 1, "method": "l2", "radius": None}]


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    before = write(path, 2)
    with opened(path, queries=4) as file:
        assert [file.done(query=f"q{number}", method="l2") for number in range(4)] == [True, True, False, False]
        assert not file.done(query="q0", method="tmm")
        file.append({"query": "q2", "method": "l2", "rank": 0})
        assert file.done(method="l2", query="q2")
        assert file.find(method="l2", query="q2") == read_records(path).records[-1]
        assert file.find(query="q0", method="tmm") is None
    read = read_records(path)
    assert read.records == [*before, {"query": "q2", "method": "l2", "rank": 0}]
    assert read.settings == SETTINGS | {"queries": 4}
    assert read.runs == [SETTINGS, SETTINGS | {"queries": 4}]
    assert json.loads(path.read_text().splitlines()[3]) == {"settings": SETTINGS | {"queries": 4}}  # before its records


def test_a_run_with_nothing_left_to_do_changes_nothing(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    write(path, 2)
    before = path.read_bytes()
    opened(path, queries=9, started="later").close()
    assert path.read_bytes() == before


def test_equal_settings_are_not_repeated(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    write(path, 2)
    write(path, 2, method="cosine")
    assert len(read_records(path).runs) == 1


def test_numbers_are_the_same_key_before_and_after(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    for expected in (False, True):
        with RecordFile.open(path, SETTINGS, ("query", "level"), IDENTITY) as file:
            assert file.done(query=np.int64(7), level=np.float32(0.1)) == expected
            if not expected:
                file.append({"query": np.int64(7), "level": np.float32(0.1)})


@pytest.mark.parametrize(("changes", "said"), [({"seed": 4}, "expected seed 3"), ({"benchmark": None}, "'robustness'")])
def test_another_identity_is_refused_and_leaves_the_file(tmp_path: Path, changes, said):
    path = tmp_path / "r.jsonl"
    write(path, 2)
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"{said}.*got (4|None).*another --out, or delete"):
        opened(path, **changes)
    assert path.read_bytes() == before
    opened(path).close()  # the refused one holds no lock


def test_a_write_torn_anywhere_costs_that_record_only(tmp_path: Path):
    whole = tmp_path / "whole.jsonl"
    records = write(whole, 2)
    content = whole.read_bytes()
    ends = [position + 1 for position, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content)):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(content[:length])
        kept = max(sum(end <= length for end in ends) - 1, 0)
        with opened(path) as file:
            assert [file.done(query=f"q{number}", method="l2") for number in range(2)] == [kept > 0, kept > 1]
            for record in records[kept:]:
                file.append(record)
        assert path.read_bytes() == content
        if length >= ends[0]:
            path.write_bytes(content[:length])
            assert read_records(path).records == records[:kept]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"query": "q', "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[1]", "object"),
        (b'{"settings": 1}', "object"),
    ],
)
def test_any_other_damage_is_named_by_its_line(tmp_path: Path, line, said):
    path = tmp_path / "r.jsonl"
    write(path, 3)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]) + b"\n")
    before = path.read_bytes()
    for attempt in (opened, read_records):
        with pytest.raises(InputError, match=rf"r\.jsonl, line 3: .*{said}.*delete it"):
            attempt(path)
    assert path.read_bytes() == before


def test_records_without_a_key_field_are_damage(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    write(path, 1)
    with pytest.raises(InputError, match="line 2: expected a record with 'level'"):
        RecordFile.open(path, SETTINGS, ("query", "level"), IDENTITY)


@pytest.mark.parametrize("content", [b"weights", b'{"query": 1}\n', b"\n", b"a,b\n1,2\n"])
def test_other_people_s_files_are_not_touched(tmp_path: Path, content):
    path = tmp_path / "theirs.bin"
    path.write_bytes(content)
    for attempt in (opened, read_records):
        with pytest.raises(InputError, match="begins with settings"):
            attempt(path)
    assert path.read_bytes() == content


def test_files_that_cannot_be_opened(tmp_path: Path):
    with pytest.raises(InputError, match="folder does not exist"):
        opened(tmp_path / "nowhere" / "r.jsonl")
    with pytest.raises(InputError, match="cannot write"):
        opened(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        read_records(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="empty file"):
        read_records(tmp_path / "empty.jsonl")


def test_two_writers_exclude_each_other(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    holding = start(
        "from tmm_engine.bench.records import RecordFile\n"
        f"file = RecordFile.open(Path(sys.argv[1]), {SETTINGS!r}, {KEY!r}, {IDENTITY!r})\n"
        "say('open')\nsys.stdin.read()\nfile.close()",
        path,
    )
    assert holding.stdout.readline() == "open\n"
    with pytest.raises(InputError, match="being written by another process"):
        opened(path)
    finished(holding)
    with opened(path) as file, pytest.raises(InputError, match="being written"):
        opened(path)
    assert file.done(query="q", method="l2") is False


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    child = start(
        "from tmm_engine.bench.records import RecordFile\nfrom tmm_engine.index.errors import InputError\n"
        f"file = RecordFile.open(Path(sys.argv[1]), {SETTINGS!r}, {KEY!r}, {IDENTITY!r})\n"
        "file.append({'query': 0, 'method': 'l2'})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (Path(sys.argv[1]).stat().st_size + 9,) * 2)\n"
        "try:\n    file.append({'query': 1, 'method': 'l2'})\n"
        "except InputError as error:\n    say(error)\n    os._exit(0)",
        path,
    )
    assert "cannot write" in finished(child)
    with opened(path) as file:
        assert file.done(query=0, method="l2")
        assert not file.done(query=1, method="l2")


def test_a_run_tells_machine_time_and_commit(tmp_path: Path):
    run = describe_run()
    assert run["machine"]["python"]
    assert run["started"].endswith("+00:00")
    tracked = subprocess.run(
        ["git", "ls-files", "bench/records.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if not tracked.stdout:
        assert run["commit"] is None
    else:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert run["commit"].removesuffix("-dirty") == head.stdout.strip()
    assert plain(run) == run
