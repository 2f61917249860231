"""An audit finds what was planted, says by which rule, leaves whole files behind, and says what it cannot do."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from jaxtyping import Float

from tests.digits import IMAGES, LABELS, make_classifier, write_photos
from tests.test_engine_cli import run
from tmm_engine import Engine
from tmm_engine.auditing import writing
from tmm_engine.auditing.alignment import pictures, residuals
from tmm_engine.auditing.copies import groups
from tmm_engine.auditing.discovery import Tail, adjusted, likely
from tmm_engine.auditing.findings import SUSPICIOUS, Kind
from tmm_engine.auditing.foreign import energies, strangeness
from tmm_engine.auditing.opinions import pooled, translated, votes
from tmm_engine.auditing.writing import PAGE, write_audit
from tmm_engine.bench.planting.faults import copies_of
from tmm_engine.index import InputError, Metric
from tmm_engine.index.neighbours.graph import NeighbourGraph
from tmm_engine.relabelling import line_of, read_ids, read_labels

N = 150
COPIES = copies_of(IMAGES[:N, None], share=0.12, seed=0)  # three of each change


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Digits, copies of some, four of them with labels that are no class, and two splits."""
    images = np.concatenate([IMAGES[:N, None], COPIES.images])
    labels = [f"digit {label}" for label in LABELS[:N].tolist() + LABELS[COPIES.origin].tolist()]
    metadata = {"half": ["one"] * N + ["two"] * len(COPIES.images)}
    return Engine.from_arrays(images, labels, make_classifier(), metadata=metadata, views=1)


def test_copies_are_found_as_groups_and_leaks_between_sources(engine: Engine) -> None:
    audit = engine.audit(kinds=["duplicates", "leaks"], sources="half")
    planted = {(int(row), N + place) for place, row in enumerate(COPIES.origin)}
    found = {
        tuple(sorted((int(each.id), *(int(other.id) for other in each.evidence)))) for each in audit.of("duplicates")
    }
    assert len(found & planted) >= 6  # the network is untrained, and the digits are small
    assert len(found - planted) <= 3
    leaks = {(int(each.id), int(each.evidence[0].id)) for each in audit.of(Kind.LEAKS)}
    assert leaks & planted == found & planted
    assert all((each.source, each.evidence[0].source) == ("one", "two") for each in audit.of("leaks"))
    assert all(0 <= finding.score <= 1 and finding.evidence for finding in audit.findings)
    assert audit.rules[Kind.DUPLICATES].threshold == pytest.approx(0.9)


def test_another_index_and_single_images_are_looked_up(engine: Engine) -> None:
    other = Engine.from_arrays(COPIES.images[:6], None, make_classifier(), views=0)
    leaks = engine.audit(kinds="leaks", against=other).of("leaks")
    assert {int(each.id) for each in leaks} >= {int(row) for row in COPIES.origin[:3]}
    assert leaks[0].evidence[0].image is not None
    there, new = engine.copies_of([IMAGES[5], np.asarray(IMAGES[900]).T.copy()])
    assert there.there
    assert there.evidence[0].id == "00000005"
    assert not new.there
    assert new.to_json()["there"] is False


def test_labels_of_ones_own_are_judged_by_neighbours_and_model(engine: Engine) -> None:
    audit = engine.audit(kinds=["labels", "unsure"])
    assert set(audit.rules) == {Kind.LABELS, Kind.UNSURE}
    scores = audit.scores[Kind.LABELS]
    assert scores.shape == (len(engine),)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_files_are_whole_or_not_there(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = engine.audit(rate=0.3, sources="half")
    written = write_audit(audit, engine, tmp_path / "audit")
    lines = [json.loads(line) for line in (tmp_path / "audit" / "findings.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [finding.id for finding in audit.findings]
    assert pq.read_table(tmp_path / "audit" / "findings.parquet").num_rows == len(lines)
    page = (tmp_path / "audit" / PAGE).read_text()
    assert page.count('class="finding"') == len(lines)
    assert "<script" not in page
    deleted = (tmp_path / "audit" / "decisions" / "delete-duplicates.txt").read_text().splitlines()
    assert set(deleted) <= set(map(str, engine.store.ids))
    tasks = json.loads((tmp_path / "audit" / "label-studio.json").read_text())
    assert len(tasks) == len([*audit.of("labels"), *audit.of("unsure")])
    assert all(task["data"]["image"].startswith("data:image/png") for task in tasks)

    with pytest.raises(InputError, match="is there already"):
        write_audit(audit, engine, tmp_path / "audit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(InputError, match="is no audit"):
        write_audit(audit, engine, tmp_path / "mine", overwrite=True)
    monkeypatch.setattr(writing, "_parquet", lambda findings: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_audit(audit, engine, tmp_path / "audit", overwrite=True)
    assert all(path.is_file() for path in written)
    assert {path.name for path in tmp_path.iterdir()} == {"audit", "mine"}


def test_below_a_threshold_the_most_suspicious_are_shown_and_are_no_findings(engine: Engine, tmp_path: Path) -> None:
    audit = engine.audit(rate=1e-9, sources="half", where="half = 'one' OR id = '00000157'")  # an exact copy is certain
    nothing = [kind for kind in Kind if not audit.of(kind)]
    assert Kind.LABELS in nothing
    assert set(audit.suspicious) == set(nothing)
    for kind in nothing:
        found = audit.suspicious[kind]
        assert 1 <= len(found) <= SUSPICIOUS
        assert all(each.kind == kind and each.score < audit.rules[kind].threshold for each in found)
    best = [audit.scores[Kind.LABELS][int(each.id)] for each in audit.suspicious[Kind.LABELS]]
    assert best == sorted(np.sort(audit.scores[Kind.LABELS])[-SUSPICIOUS:].tolist(), reverse=True)
    write_audit(audit, engine, tmp_path / "audit")
    page = (tmp_path / "audit" / PAGE).read_text()
    assert page.count("which are no findings") == len(nothing)
    assert page.count('class="finding below"') == sum(map(len, audit.suspicious.values()))
    assert len((tmp_path / "audit" / "findings.jsonl").read_text().splitlines()) == len(audit.findings)
    assert not (tmp_path / "audit" / "decisions" / "relabel.csv").exists()
    usual = engine.audit(kinds=["duplicates"])
    assert usual.findings
    assert usual.suspicious == {}


def test_what_cannot_be_done_is_said() -> None:
    classifier = make_classifier()
    without = Engine.from_arrays(IMAGES[:40, None], None, classifier, views=0).audit()
    assert not without.of("labels")
    assert Kind.LABELS not in without.rules
    assert any("no exemplar has a label of its own" in note for note in without.notes)
    assert any("no descriptors" in note for note in without.notes)
    one = Engine.from_arrays(IMAGES[:10, None], [0] * 10, classifier, views=0).audit()
    assert any("all labels are the same" in note for note in one.notes)
    assert any("only 9 others" in note for note in one.notes)
    two = Engine.from_arrays(IMAGES[:2, None], [0, 1], classifier, views=0)
    assert two.audit().of("duplicates") == ()
    assert any("fewer than 3 exemplars" in note for note in two.audit().notes)
    with pytest.raises(InputError, match="at least 3 exemplars"):
        two.copies_of([IMAGES[0]])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": 0.0}, "above 0 and below 1, got 0"),
        ({"k": 0}, "at least 1 neighbour, got 0"),
        ({"kinds": ["labls"]}, "did you mean 'labels'"),
        ({"kinds": []}, "expected at least one of"),
        ({"kinds": "leaks"}, "two sources"),
        ({"sources": "hlf"}, "did you mean 'half'"),
        ({"rate": float("nan")}, "above 0 and below 1, got nan"),
        ({"memory": 1000}, "MiB to compare"),
    ],
)
def test_options_out_of_range_are_refused(engine: Engine, options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        engine.audit(**options)  # type: ignore[arg-type]


def test_against_itself_is_refused_and_against_another_part_of_it_is_not(engine: Engine) -> None:
    with pytest.raises(InputError, match="expected another index, got this one"):
        engine.audit(kinds="leaks", against=engine)
    assert engine.matching("half = 'two'").audit(kinds="leaks", against=engine.matching("half = 'one'")).of("leaks")


IDS = ["a, b.png", "ö/猫.png", "two\nlines", "a\r", ' "quoted"', '"', "\u2028", "=1+1", "plain"]


def test_decisions_come_back_as_they_were_decided(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    text = "".join(f"{line_of(id_)}\n" for id_ in IDS)
    path.write_bytes(text.encode())
    assert read_ids(path) == IDS
    assert line_of("ö/猫, 1.png") == "ö/猫, 1.png"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n")  # edited elsewhere
    assert read_ids(path) == IDS
    path.write_text('"torn')
    with pytest.raises(InputError, match="a text file of ids, one a line"):
        read_ids(path)
    table = tmp_path / "labels.csv"
    for separator in (",", ";", "\t"):
        with table.open("w", encoding="utf-8-sig", newline="") as file:
            rows = [("id", "label", "was", "score"), *((id_, f"of {id_}", "x", "0.9") for id_ in IDS), ("", "", "", "")]
            csv.writer(file, delimiter=separator).writerows(rows)
        assert read_labels(table) == {id_: f"of {id_}" for id_ in IDS}
    table.write_text("id;label\na;b\na;c\n")
    with pytest.raises(InputError, match="expected different ids, got 'a' twice"):
        read_labels(table)
    table.write_text("id;label\na\n")
    with pytest.raises(InputError, match="expected a label for 'a', got none"):
        read_labels(table)


def test_commands(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", count=40)
    (tmp_path / "photos" / "digit-1" / "copy.png").write_bytes(
        (tmp_path / "photos" / "digit-3" / "0003.png").read_bytes()
    )
    make_classifier().save(tmp_path / "w.safetensors")
    index, out = tmp_path / "photos.idx", tmp_path / "audit"
    built = run("build-index", tmp_path / "photos", index, "--weights", tmp_path / "w.safetensors", "--views", 1)
    assert built.exit_code == 0, built.stderr
    done = run("audit", index, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert "duplicates: " in done.stdout
    assert "1.000 digit-1/copy.png: 2 pictures are the same, or nearly so; their labels differ" in done.stdout
    assert {path.suffix for path in (index / "cache").iterdir()} == {".graph", ".json"}
    looked = run("audit", index, "--image", tmp_path / "photos" / "digit-3" / "0003.png", "--json")
    assert json.loads(looked.stdout)["there"]
    among = run("audit", index, "--image", tmp_path / "photos" / "digit-3" / "0003.png", "--where", "label = 'digit-2'")
    assert "0003.png: is new; the nearest is digit-2/" in among.stdout
    for options, said in (
        (["--rate", 1.5], "above 0 and below 1, got 1.5"),
        (["--rate", "nan"], "above 0 and below 1, got nan"),
        (["--only", "nothing"], "unknown kind"),
        (["--image", "q.png", "--out", "x", "-k", 20], "--out, -k have no effect with --image"),
        (["--image", "q.png", "--only", "labels"], "--only has no effect with --image"),
        (["--overwrite"], "--overwrite has no effect without --out"),
        (["--limit", 5, "--json"], "--limit has no effect without --out"),
        (["--only", "labels,foreign", "--sources", "path"], "--sources has no effect with --only labels,foreign"),
        (["--only", "unsure", "--rate", 0.1], "--rate has no effect with --only unsure"),
    ):
        refused = run("audit", index, *options)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert said in " ".join(refused.stderr.split())
    for target, said in ((out, "is there already"), (tmp_path / "gone" / "audit", "create it first")):
        refused = run("audit", index, "--out", target)
        assert (refused.exit_code, said in refused.stderr) == (1, True)
        assert "comparing" not in refused.stderr  # before anything is computed

    said = run("audit", index, "--only", "foreign", "--rate", 1e-9).stdout.splitlines()
    assert said[0].startswith("foreign: 0 found")
    assert said[1] == "  nothing certain; the most suspicious, which are no findings:"
    assert len(said) == 5

    decided = out / "decisions" / "delete-duplicates.txt"
    assert decided.read_text().splitlines()[0] == "digit-3/0003.png"
    decided.write_text("digit-3/0003.png\n")  # somebody has looked at it
    deleted = run("delete", index, "--from", decided)
    assert "1 deleted; version 2" in deleted.stdout
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "label"), ("digit-0/0000.png", "zero"), ("digit-1/0001.png", "digit-3")])
    with Engine.open(index) as engine:
        before = dict(zip(engine.store.ids, engine.store.features(np.arange(len(engine))), strict=True))
    relabelled = run("relabel", index, "--from", tmp_path / "labels.csv")
    assert "2 relabelled; version 3, 40 exemplars" in relabelled.stdout
    with Engine.open(index) as engine:
        table = engine.to_arrow().to_pylist()
        after = dict(zip(engine.store.ids, engine.store.features(np.arange(len(engine))), strict=True))
    assert all(np.array_equal(after[id_], feature) for id_, feature in before.items())
    labels = {row["id"]: (row["class_name"], row["path"]) for row in table}
    assert labels["digit-0/0000.png"][0] == "zero"
    assert labels["digit-1/0001.png"][0] == "digit-3"
    assert labels["digit-1/0001.png"][1].endswith("0001.png")
    (tmp_path / "labels.csv").write_text("id,label\nnobody,zero\n")
    assert "no exemplar has the id 'nobody'" in run("relabel", index, "--from", tmp_path / "labels.csv").stderr
    (tmp_path / "labels.csv").write_text("id\nnobody\n")
    assert "got no label" in run("relabel", index, "--from", tmp_path / "labels.csv").stderr
    assert "expected another index, got this one" in run("audit", index, "--against", index).stderr
    (tmp_path / "empty").touch()
    assert "got none" in run("delete", index, "--from", tmp_path / "empty").stderr


# -------------------------------------------------------------------------------------------- the parts


def test_alignment_undoes_what_was_done() -> None:
    shown = pictures(np.concatenate([IMAGES[:N, None], COPIES.images]))
    same = np.stack([COPIES.origin, N + np.arange(len(COPIES.images))], axis=1)
    other = np.stack([COPIES.origin, (COPIES.origin + 1) % N], axis=1)
    copied, foreign = residuals(shown, shown, same), residuals(shown, shown, other)
    assert copied[:3].max() < 1e-5  # exact
    assert np.median(copied) < 0.05
    assert np.median(foreign) > 4 * np.median(copied)
    assert pictures(np.zeros((1, 3, 224, 200), np.uint8)).shape == (1, 32, 32)
    flat = np.zeros((2, 8, 8), np.uint8)
    assert residuals(flat, flat, np.array([[0, 1]])).tolist() == [1.0]


def test_thresholds_keep_their_promise() -> None:
    rng = np.random.default_rng(0)
    innocent, guilty = rng.exponential(0.3, 4000), rng.normal(6, 1, 400)
    tail = Tail.fit(np.concatenate([innocent, guilty]))
    assert tail.scale == pytest.approx(0.3, rel=0.15)
    rates = adjusted(tail.chance(np.concatenate([innocent, guilty])))
    found = rates <= 0.1
    assert found[4000:].mean() > 0.9
    assert found[:4000].sum() / found.sum() < 0.2
    normal = Tail.fit(rng.normal(2, 3, 20_000), normal=True)
    assert normal.scale == pytest.approx(3, rel=0.1)
    assert normal.chance(np.array([2 + 1.645 * 3]))[0] == pytest.approx(0.05, abs=0.01)
    assert adjusted(np.array([0.01, 0.04, 0.03, 0.5])).tolist() == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert adjusted(np.array([0.01]), tests=5).tolist() == [0.05]
    assert likely(np.array([0.99, 0.9, 0.5, 0.1]), rate=0.1) == 0.9
    assert likely(np.array([0.5]), rate=0.1) == np.inf


def test_flipped_labels_are_told_with_the_share_that_there_is() -> None:
    rng = np.random.default_rng(0)
    n, count = 2000, 10
    truth = rng.integers(count, size=n)
    logits = rng.normal(size=(n, count)) + 6 * np.eye(count)[truth]
    model = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = np.arange(n) < 100
    labels = np.where(wrong, (truth + rng.integers(1, count, n)) % count, truth)
    near = np.stack([rng.choice(np.flatnonzero(truth == truth[row]), 6) for row in range(n)])
    graph = NeighbourGraph(near, np.full((n, 6), 0.9, np.float32), Metric.COSINE)
    given = np.ones(n, dtype=np.bool_)
    given[-50:] = False
    cast = votes(graph, labels, given, count)
    np.testing.assert_allclose(cast.sum(1), 1)
    opinions = pooled(model, cast, labels, given, numbers=np.arange(count))
    assert opinions.share == pytest.approx(0.05, abs=0.02)
    assert opinions.wrong[wrong].mean() > 0.85
    assert opinions.wrong[given & ~wrong].mean() < 0.05
    assert (opinions.wrong[~given] == 0).all()


def test_labels_that_are_no_classes_are_learnt_without_the_exemplar_itself() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]])
    labels, given = np.array([2, 2, 0, 1]), np.array([True, True, True, True])
    found = translated(probabilities, labels, given, 3)
    for row in range(4):
        others = [other for other in range(4) if other != row]
        slow = np.full(3, 1e-3 / 3)
        for seen in range(2):
            total = sum(probabilities[other, seen] for other in others)
            for other in others:
                slow[labels[other]] += probabilities[row, seen] * probabilities[other, seen] / (total + 1)
        np.testing.assert_allclose(found[row], slow / slow.sum(), rtol=1e-6)


def test_groups_and_energies() -> None:
    assert groups(np.array([4, 1, 2]), np.array([5, 2, 7])) == [[1, 2, 7], [4, 5]]
    logits: Float[np.ndarray, "n c"] = np.array([[1.0, 2.0], [1000.0, 0.0]])
    np.testing.assert_allclose(energies(logits), -torch.logsumexp(torch.from_numpy(logits), 1).numpy())
    graph = NeighbourGraph(np.array([[1], [0]]), np.ones((2, 1), np.float32), Metric.COSINE)
    np.testing.assert_allclose(strangeness(np.array([1.0, 5.0]), graph), [6, 6])
