"""The command classify, and search --explain: files in, tables, JSON and Parquet out, calibrations kept."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from tests.digits import make_classifier, write_photos, write_queries
from tmm_engine import build_index
from tmm_engine.cli.main import main
from tmm_engine.index import open_source


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    build_index(open_source(write_photos(folder / "photos")), folder / "a.idx", make_classifier(), views=1)
    write_queries(folder / "queries", count=3)
    write_photos(folder / "held", count=40, start=300)
    return folder


def run(work: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["classify", str(work / "a.idx"), *map(str, arguments)])


def test_a_calibration_is_kept_and_used(work: Path):
    made = run(work, "--calibration", work / "held", "--name", "november", "-k", 3)
    assert (made.exit_code, made.stdout) == (0, "")
    assert "calibration 'november' of 40 images of" in made.stderr
    done = run(
        work, work / "queries", "--name", "november", "-k", 3, "--alpha", 0.3, "--json", "--out", work / "o.parquet"
    )
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["calibration"], line["alpha"]) for line in lines] == [("november", 0.3)] * 3
    assert all(line["class_name"].startswith("digit-") and len(line["hits"]) == 3 for line in lines)
    rows = pq.read_table(work / "o.parquet").to_pylist()
    assert [row["query"] for row in rows] == [line["query"] for line in lines]
    assert [row["prediction_set"] for row in rows] == [line["prediction_set"] for line in lines]


def test_a_table_says_class_doubt_and_promise(work: Path):
    (work / "broken.png").write_text("no image")
    done = run(work, work / "queries" / "query-200.png", work / "broken.png", "--mode", "l2")
    assert done.exit_code == 1
    assert "digit-" in done.stdout
    assert "calibrate on labelled images" in " ".join(done.stdout.split())
    assert "1 of 2 images could not be classified" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "nothing to do"),
        (["q.png", "--split", "test"], 2, "--split has no effect without --calibration"),
        (["q.png", "--leave-one-out", "--name", "x"], 2, "--leave-one-out goes without"),
        (["q.png", "--preset", "fast"], 2, "--preset has no effect with --mode robust"),
        (["q.png", "--out", "x.csv"], 2, "ends in .parquet"),
        (["q.png", "--alpha", "2"], 1, "alpha: expected a share"),
        (["--calibration", "photos", "--limit", "5"], 1, "5 of the 5 images of photos are in the index"),
    ],
)
def test_what_cannot_be_done_is_said(work: Path, monkeypatch, arguments: list[str], code: int, said: str):
    monkeypatch.chdir(work)
    done = CliRunner().invoke(main, ["classify", "a.idx", *arguments])
    assert done.exit_code == code
    assert said in done.stderr


def test_search_explains_in_the_terminal_in_json_and_on_the_page(work: Path):
    query = work / "queries" / "query-200.png"
    asked = ["search", str(work / "a.idx"), str(query), "--mode", "l2", "-k", "2", "--explain"]
    shown = CliRunner().invoke(main, [*asked, "--html", str(work / "why.html")])
    assert shown.exit_code == 0, shown.output
    assert "Nearest that are not digit-" in shown.stdout
    assert "Pulled towards digit-" in (work / "why.html").read_text()
    told = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)
    assert len(told["explanation"]["unlike"]) == 3
