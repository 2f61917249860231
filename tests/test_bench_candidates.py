"""What `engine bench candidates` measures, on a few digits."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.digits import IMAGES, LABELS, make_classifier, write_photos
from tmm_engine.bench.candidates import PERTURBATIONS, measure_candidates, summarise
from tmm_engine.cli.main import main
from tmm_engine.index import ArraySource

SIZES = (15, 40)


@pytest.fixture(scope="module")
def records():
    source = ArraySource(IMAGES[:60], LABELS[:60])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tmm_engine.bench.candidates.SIZES", SIZES)
        return measure_candidates(source, make_classifier(), queries=2)


def test_every_query_meets_every_perturbation(records):
    assert [record.perturbation for record in records] == 2 * list(PERTURBATIONS)
    assert len({record.query for record in records}) == 2


def test_recall_grows_with_the_candidates_and_ranks_are_ranks(records):
    for record in records:
        assert record.recall.keys() == {f"{name} {m}" for name in ("l2", "cosine", "union", "global") for m in SIZES}
        for name in ("l2", "cosine", "union", "global"):
            few, many = (record.recall[f"{name} {m}"] for m in SIZES)
            assert 0 <= few <= many <= 1
        assert all(0 <= rank < 60 for rank in (record.rank_query, record.rank_global, record.rank_cosine))
    assert all(record.rank_cosine == 0 for record in records if record.perturbation == "clean")


def test_the_summary_is_the_mean_over_queries(records):
    clean = summarise(records)[0]
    chosen = [record for record in records if record.perturbation == "clean"]
    assert clean["queries"] == 2
    assert clean["cosine 15"] == pytest.approx(np.mean([record.recall["cosine 15"] for record in chosen]))
    assert clean["median rank, global"] == np.median([record.rank_global for record in chosen])


def test_noise_has_its_norm_and_darkening_its_factor():
    image = np.full((1, 28, 28), 0.5, np.float32)
    noisy = PERTURBATIONS["gaussian 2.5"](image, np.random.default_rng(0))
    assert np.linalg.norm(noisy - image) == pytest.approx(2.5, abs=1e-4)  # nothing to cut off here
    assert np.array_equal(PERTURBATIONS["brightness 0.5"](image, np.random.default_rng(0)), image / 2)


def test_the_command_prints_a_table_and_writes_records(tmp_path: Path):
    write_photos(tmp_path / "photos", count=60)
    make_classifier().save(tmp_path / "w.safetensors")
    arguments = ["bench", "candidates", str(tmp_path / "photos"), "--model", "resnet18", "--queries", "1"]
    arguments += ["--weights", str(tmp_path / "w.safetensors"), "--json", str(tmp_path / "records.jsonl")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "gaussian 5" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [line["perturbation"] for line in lines] == list(PERTURBATIONS)
