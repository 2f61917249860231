"""What `engine bench candidates` measures, on a few digits."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.digits import IMAGES, LABELS, make_classifier, write_photos
from tests.modes import quick
from tmm_engine.bench.benchmarks.candidates import KEY, measure_candidates, summarise
from tmm_engine.bench.noise import parse
from tmm_engine.bench.records import read_records
from tmm_engine.bench.report import write_report
from tmm_engine.bench.suite import Suite
from tmm_engine.cli.main import main
from tmm_engine.index import ArraySource
from tmm_engine.rerank.settings import PRESETS

SIZES = (15, 40)
QUICK = quick(trigger_steps=20, head_steps=20)
FEW = ["clean", "gaussian 2.5"]
PERTURBATIONS = ["clean", "brightness 0.5", "gaussian 2.5", "gaussian 5"]  # the command's


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The records of two queries, and what a second run of the same adds to the file."""
    path = tmp_path_factory.mktemp("candidates") / "c.jsonl"
    suite = Suite.load(ArraySource(IMAGES[:60], LABELS[:60], name="digits"), make_classifier(), exemplars=60)
    perturbations = [parse(name) for name in FEW]
    contents = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tmm_engine.bench.benchmarks.candidates.SIZES", SIZES)
        patch.setitem(PRESETS, "paper", QUICK)
        for _ in range(2):
            with suite.records(path, "candidates", [], KEY) as file:
                measure_candidates(suite, suite.queries(2), perturbations, file)
            contents.append(read_records(path).records)
    return contents


@pytest.fixture(scope="module")
def records(measured):
    return measured[0]


def test_a_rerun_adds_nothing(measured):
    assert measured[0] == measured[1]


def test_every_query_meets_every_perturbation(records):
    assert [record["perturbation"] for record in records] == 2 * FEW
    assert len({record["query"] for record in records}) == 2


def test_recall_grows_with_the_candidates_and_ranks_are_ranks(records):
    for record in records:
        assert record["recall"].keys() == {f"{name} {m}" for name in ("l2", "cosine", "union", "global") for m in SIZES}
        for name in ("l2", "cosine", "union", "global"):
            few, many = (record["recall"][f"{name} {m}"] for m in SIZES)
            assert 0 <= few <= many <= 1
        assert all(0 <= record[f"rank_{name}"] < 60 for name in ("query", "global", "cosine"))
    assert all(record["rank_cosine"] == 0 for record in records if record["perturbation"] == "clean")


def test_the_summary_is_the_mean_over_queries(records):
    clean = summarise(records)[0]
    chosen = [record for record in records if record["perturbation"] == "clean"]
    assert clean["queries"] == 2
    assert clean["cosine 15"] == pytest.approx(np.mean([record["recall"]["cosine 15"] for record in chosen]))
    assert clean["median rank, global"] == np.median([record["rank_global"] for record in chosen])


@pytest.mark.slow
def test_the_command_prints_a_table_writes_records_and_is_reported(tmp_path: Path):
    write_photos(tmp_path / "photos", count=60)
    make_classifier().save(tmp_path / "w.safetensors")
    arguments = ["bench", "candidates", str(tmp_path / "photos"), "--model", "resnet18", "--queries", "1"]
    arguments += ["--weights", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "records.jsonl")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "gaussian 5" in result.stdout
    _, *lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [line["perturbation"] for line in lines] == PERTURBATIONS
    [page, *_] = write_report(tmp_path, tmp_path / "report")
    assert "## Candidate sets: " in page.read_text()
