"""What is planted is what it is said to be, and figures are what their definitions give."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from tests.digits import IMAGES, LABELS, make_classifier
from tmm_engine.bench.benchmark import Run, Sheet
from tmm_engine.bench.benchmarks.audit import KEY, measure_audit, quoted, section
from tmm_engine.bench.known import compared, confirmed
from tmm_engine.bench.planting.cleanlab import cleanlab_scores
from tmm_engine.bench.planting.data import Planted, drawn, plant
from tmm_engine.bench.planting.faults import CHANGES, copies_of, flipped
from tmm_engine.bench.planting.measures import auroc, average_precision
from tmm_engine.bench.records import RecordFile, read_records
from tmm_engine.index import ArraySource, InputError

N = 120


@pytest.fixture(scope="module")
def planted() -> Planted:
    strange = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    return plant(IMAGES[:N, None], LABELS[:N].astype(np.int64), strange, make_classifier(), share=0.1, seed=0)


def test_every_fault_is_measured_and_a_rerun_measures_nothing(planted: Planted, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with RecordFile.open(path, {"data_set": "digits"}, KEY, ()) as file:
        records = measure_audit(planted, file, shares=(0.05,))
    assert {record["fault"] for record in records} == {"duplicates", "leaks", "labels", "foreign", "time"}
    found = quoted(records)
    assert found["labels_ap_cleanlab"] is None
    assert {
        "duplicates_ap", "duplicates_ap_hash", "duplicates_ap_cosine", "labels_ap", "labels_auroc", "foreign_auroc",
        "foreign_auroc_knn", "foreign_auroc_softmax", "foreign_auroc_energy", "audit_over_graph",
    } <= set(found)  # fmt: skip
    for record in records:
        assert all(0 <= record[name] <= 1 for name in record if name.startswith(("ap", "auroc")) and "_by_" not in name
                   and record[name] is not None)  # fmt: skip
        assert record["fault"] == "time" or record["right"] <= min(record["found"], record["planted"])
    assert json.loads(json.dumps(found)) == found
    content = read_records(path)
    with RecordFile.open(path, {"data_set": "digits"}, KEY, ()) as file:
        assert measure_audit(planted, file, shares=(0.05,)) == content.records
    with RecordFile.open(tmp_path / "time.jsonl", {"data_set": "digits"}, KEY, ()) as file:
        [timed] = measure_audit(None, file, timed=planted.part(planted.clean[:50]))
    assert timed["exemplars"] == 50
    assert timed["audit_over_graph"] == timed["audit_s"] / timed["graph_s"]
    assert set(quoted([timed])) == {"audit_over_graph", "audit_over_graph_cpu"}
    blocks = section(Run(path, content), Sheet(tmp_path, {}))
    assert "**Flipped labels**" in blocks
    assert "AP, cleanlab" in "\n".join(blocks)


def test_planted_faults_are_what_they_say() -> None:
    copies = copies_of(IMAGES[:N, None], share=0.1, seed=1)
    assert copies.change == [name for name in CHANGES for _ in range(2)]
    assert len(set(copies.origin.tolist())) == 12
    np.testing.assert_array_equal(copies.images[:2], IMAGES[copies.origin[:2], None])
    assert (copies.images[2:] != IMAGES[copies.origin[2:], None]).any(axis=(1, 2, 3)).all()
    with pytest.raises(InputError, match="at least 6 images"):
        copies_of(IMAGES[:10, None], share=0.1, seed=0)
    labels, wrong = flipped(LABELS[:N].astype(np.int64), share=0.05, classes=10, seed=0)
    assert wrong.sum() == 6
    np.testing.assert_array_equal(labels != LABELS[:N], wrong)
    assert labels.max() < 10


def test_measures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, scores = rng.random(200) < 0.2, rng.integers(0, 20, 200) / 20
    assert auroc(truth, scores) == pytest.approx(roc_auc_score(truth, scores))
    assert average_precision(truth, scores) == pytest.approx(average_precision_score(truth, scores))
    never = average_precision_score(np.append(truth, True), np.append(scores, -1.0))
    share = average_precision(truth, scores, missing=1)
    assert share == pytest.approx(never, abs=0.25 / truth.sum())
    assert share < average_precision(truth, scores)


def test_confirmed_label_errors_are_those_that_a_majority_denies() -> None:
    def voted(place: int, given: int, **others: int) -> dict[str, object]:
        return {"id": place, "mturk": {"given": given, **others}}

    looked, wrong = confirmed([voted(1, 5), voted(3, 2, guessed=3), voted(4, 1, both=2, neither=2), voted(7, 0)], 9)
    assert np.flatnonzero(looked).tolist() == [1, 3, 4, 7]
    assert np.flatnonzero(wrong).tolist() == [3, 7]
    found = compared(wrong, np.array([0, 1, 2, 9, 4, 5, 6, 7, 8.0]))
    assert found["ap"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["among_first_15"] == 2


def test_one_image_per_group() -> None:
    ids = [f"track-{number % 7}/{number}" for number in range(21)]
    source = ArraySource(IMAGES[:21], LABELS[:21], ids=ids)
    found = drawn(source, make_classifier(), count=50, seed=0, one_per="^(.*)/")
    assert len({record.id.split("/")[0] for record in found}) == len(found) == 7
    for pattern in ("(", "no group", "^(x)"):
        with pytest.raises(InputError, match="expected a pattern"):
            drawn(source, make_classifier(), count=5, seed=0, one_per=pattern)


def test_an_interpreter_without_cleanlab_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a Python with cleanlab"):
        cleanlab_scores(tmp_path / "gone", np.zeros(2, np.int64), np.full((2, 2), 0.5))
