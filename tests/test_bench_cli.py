"""`engine bench`: every command on a few digits, what it writes, and how it fails."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.digits import IMAGES, LABELS, make_classifier, write_photos
from tmm_engine.bench import benchmarks
from tmm_engine.bench.cli import bench
from tmm_engine.bench.loading import parse_few, parse_methods, parse_perturbations
from tmm_engine.bench.options import FEW_PERTURBATIONS
from tmm_engine.bench.registry import SUMMARIES, load
from tmm_engine.cli.main import main
from tmm_engine.index.models.classifier import Classifier

METHODS = "l2;fast,trigger_steps=2;paper,trigger_steps=2,tuning_min_steps=2"
QUICK = ("--set", "trigger_steps=2", "--set", "tuning_min_steps=2")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, others/ (held out, the same classes), few/ (other classes), weights.safetensors, semantic.jsonl."""
    folder = tmp_path_factory.mktemp("bench")
    write_photos(folder / "photos", count=60)
    write_photos(folder / "few", count=4)
    for number in range(300, 330):
        path = folder / "others" / f"digit-{LABELS[number]}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[number]).save(path)
    make_classifier().save(folder / "weights.safetensors")
    made = measured(
        folder, "semantic", *held_out(folder), "--methods", METHODS, "--gallery", folder / "g.png", out="semantic.jsonl"
    )
    assert made.exit_code == 0, made.stderr
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def measured(work: Path, command: str, *arguments: object, out: str | None, source: object = None) -> Result:
    options = ["--model", "resnet18", "--weights", work / "weights.safetensors", "--exemplars", 40, "--queries", 3]
    target = [] if out is None else ["--out", work / out]
    return run(command, source or work / "photos", *options, *target, *arguments)


def held_out(work: Path) -> tuple[object, ...]:
    return "--query-source", work / "others"


def records(work: Path, out: str, *, benchmark: str) -> list[dict]:
    first, *found = [json.loads(line) for line in (work / out).read_text().splitlines()]
    assert first["settings"]["benchmark"] == benchmark
    assert first["settings"]["exemplars"] == 40
    return found


# --------------------------------------------------------------------------------------------- help


def test_every_command_is_listed():
    listed = run("--help").stdout
    assert all(f"\n  {name} " in listed for name in bench.commands)
    assert {"train", "robustness", "radius", "semantic", "oracle", "ablation", "ood", "latency", "report"} <= set(
        bench.commands
    )


@pytest.mark.parametrize("command", sorted(bench.commands))
def test_every_help_has_an_example(command: str):
    shown = run(command, "--help").stdout
    assert "Example" in shown
    assert f"engine bench {command} " in shown


def test_summaries_are_the_beginning_of_the_help():
    for name, summary in SUMMARIES.items():
        assert load(name).command.help.startswith(summary.rstrip("?")), name


def test_every_file_is_registered():
    files = (path.stem for path in Path(benchmarks.__file__).parent.glob("*.py"))
    assert set(files) == {"__init__", *SUMMARIES}


def test_the_list_of_commands_needs_nothing_heavy():
    code = (
        "import sys\nfrom tmm_engine.bench.cli import bench\n"
        "for arguments in (['--help'], ['train', '--help'], ['report', '--help']):\n"
        "    try: bench(arguments)\n    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'lance', 'faiss', 'numpy', 'matplotlib', 'openai'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------- every command


def test_robustness(work: Path):
    levels = ("--levels", "brightness=0.5", "--levels", "adaptive=0.5")
    options = ("--methods", METHODS, "--families", "brightness,shift,adaptive", *levels, "-k", 3)
    done = measured(work, "robustness", *options, out="robustness.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "3 queries, 5 perturbations, 3 methods" in done.stdout
    found = records(work, "robustness.jsonl", benchmark="robustness")
    assert len(found) == 3 * 6 * 3  # and the clean query
    before = (work / "robustness.jsonl").read_bytes()
    assert measured(work, "robustness", *options, out="robustness.jsonl").exit_code == 0
    assert (work / "robustness.jsonl").read_bytes() == before


def test_radius(work: Path):
    options = ("--methods", "l2;cosine,recognition=0.8", "--kinds", "brightness,adaptive,feature", "--directions", 1)
    done = measured(work, "radius", *options, out="radius.jsonl")
    assert done.exit_code == 0, done.stderr
    kinds = {record["kind"] for record in records(work, "radius.jsonl", benchmark="radius")}
    assert kinds == {"brightness", "adaptive", "feature"}


def test_semantic_and_its_gallery(work: Path):
    found = records(work, "semantic.jsonl", benchmark="semantic")
    assert len(found) == 3 * 3
    assert all(len(record["neighbours"]) == 10 for record in found)
    with Image.open(work / "g.png") as picture:
        assert picture.width > 300
    options = (*held_out(work), "--methods", METHODS, "--queries", 5)
    assert measured(work, "semantic", *options, out="semantic-more.jsonl").exit_code == 0
    more = records(work, "semantic-more.jsonl", benchmark="semantic")
    assert [record for record in more if record["query"] < 3] == found


def test_unseen(work: Path):
    options = (*held_out(work), "--methods", "cosine;robust,views=1", "--perturbations", "blur 1", "-k", 3)
    done = measured(work, "unseen", *options, out="unseen.jsonl")
    assert done.exit_code == 0, done.stderr
    assert len(records(work, "unseen.jsonl", benchmark="unseen")) == 3 * 2 * 2


def test_rivals(work: Path):
    done = measured(work, "rivals", *held_out(work), "--perturbations", "blur 1", "-k", 3, out="rivals.jsonl")
    assert done.exit_code == 0, done.stderr
    found = records(work, "rivals.jsonl", benchmark="rivals")
    assert {record["perturbation"] for record in found} == {"clean", "blur 1"}
    assert {record["job"] for record in found} == {"the very image", "unseen"}


def test_classify(work: Path):
    options = (*held_out(work), "--perturbations", "blur 1", "-k", 3, "--calibration", 20, "--noisy", 2, "--json")
    done = measured(work, "classify", *options, out="classify.jsonl")
    assert done.exit_code == 0, done.stderr
    assert {"coverage_01", "coverage_05", "coverage_10", "accuracy_90", "accuracy_90_softmax"} <= set(
        json.loads(done.stdout)
    )
    assert len(records(work, "classify.jsonl", benchmark="classify")) == (3 + 2) * 5


def test_oracle_by_ssim_and_its_estimate(work: Path):
    options = (*held_out(work), "--semantic", work / "semantic.jsonl")
    done = measured(work, "oracle", *options, "--judge", "ssim", out="oracle.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "3 queries, 0 without a verdict" in done.stdout
    assert len(records(work, "oracle.jsonl", benchmark="oracle")) == 3 * 3
    dry = measured(work, "oracle", *options, "--dry-run", "--price", 2.5, out=None)
    assert dry.exit_code == 0, dry.stderr
    assert dry.stdout.startswith("3 requests, 12 pictures, about ")
    assert "at 2.5 per million" in dry.stdout


def test_ablation(work: Path):
    options = ("--settings", "score,clamp", "--perturbations", "brightness 0.5", *QUICK)
    done = measured(work, "ablation", *options, out="ablation.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "3 queries, 3 configurations" in done.stdout
    found = records(work, "ablation.jsonl", benchmark="ablation")
    base = "paper,trigger_steps=2,tuning_min_steps=2"
    varied = {(record["method"], record["setting"], record["value"]) for record in found}
    assert varied == {
        (base, "base", base),
        (f"{base},score=logit", "score", "logit"),
        (f"{base},clamp=false", "clamp", False),
    }
    assert len(found) == 3 * 2 * 3


def test_ablation_of_recognition(work: Path):
    options = ("--base", "fast", "--set", "trigger_steps=2", "--settings", "recognition", "--perturbations", "clean")
    done = measured(work, "ablation", *options, out="recognition.jsonl")
    assert done.exit_code == 0, done.stderr
    varied = {(one["setting"], one["value"]) for one in records(work, "recognition.jsonl", benchmark="ablation")}
    values = {("recognition", "none"), ("recognition", 0.6), ("recognition", 0.7), ("recognition", 0.9)}
    assert varied == {("base", "fast,trigger_steps=2"), *values}  # which has 0.8


def test_ablation_of_layers(work: Path):
    options = ("--layers", *QUICK, "--set", "tuning_batch=8", "--queries", 1, "--perturbations", "clean")
    done = measured(work, "ablation", *options, out="layers.jsonl")
    assert done.exit_code == 0, done.stderr
    values = [record["value"] for record in records(work, "layers.jsonl", benchmark="ablation")]
    assert values == ["head", *(f"head + layer{number}" for number in range(1, 5))]


@pytest.mark.parametrize("foreign", ["noise", "others"])
def test_ood(work: Path, foreign: str):
    name = foreign if foreign == "noise" else str(work / foreign)
    options = ("--methods", METHODS, "--foreign", name, "--foreign-count", 7, "--perturbations", "clean,adaptive 1")
    done = measured(work, "ood", *options, out=f"ood-{foreign}.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "3 queries, 7 foreign exemplars, 3 methods" in done.stdout
    found = records(work, f"ood-{foreign}.jsonl", benchmark="ood")
    assert len(found) == 3 * 2 * 3
    assert {(record["foreign"], record["foreign_count"]) for record in found} == {(name, 7)}


def test_global_triggers_are_kept_beside_the_records(work: Path):
    kept, method = work / "kept" / ".triggers", ("--methods", "fast,trigger_steps=3")
    kept.parent.mkdir()
    files = dict[str, int]()
    for command, options, exemplar_sets in (
        ("robustness", (*method, "--families", "clean"), 1),
        ("radius", (*method, "--kinds", "feature"), 1),
        ("semantic", (*held_out(work), *method), 1),
        (
            "ablation",
            ("--base", "fast", "--set", "trigger_steps=3", "--settings", "fusion", "--perturbations", "clean"),
            2,
        ),
        ("ood", (*method, "--foreign", "noise", "--foreign-count", 7, "--perturbations", "clean"), 3),
    ):
        done = measured(work, command, *options, out=f"kept/{command}.jsonl")
        assert done.exit_code == 0, done.stderr
        now = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
        assert len(now) == exemplar_sets
        assert files.items() <= now.items()
        files = now


def test_report_of_every_benchmark(work: Path, tmp_path: Path):
    folder = tmp_path / "runs"
    folder.mkdir()
    common = {"data_set": "digits", "methods": {}}
    record = {"query": 0, "method": "l2", "label_precision": 1.0, "knn_correct": True, "ssim": 0.5}
    lines = [{"settings": {"benchmark": "semantic", **common}}, record]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("report", folder)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(folder / "report" / "report.md")
    assert "Held-out queries: digits" in (folder / "report" / "report.md").read_text()
    assert run("report", folder, "--out", tmp_path / "else").exit_code == 0
    assert (tmp_path / "else" / "report.md").is_file()
    assert run("report", work, "--out", tmp_path / "all").exit_code == 0  # whatever the commands above have written


def test_train(work: Path):
    target = work / "trained.safetensors"
    options = ("--test-source", work / "others", "--epochs", 1, "--batch", 16)
    done = run("train", work / "photos", target, *options)
    assert done.exit_code == 0, done.stderr
    assert re.search(r"of the 30 images of .*others, trained on 60", done.stdout)
    assert Classifier.load(target).class_names == tuple(f"digit-{label}" for label in range(10))
    assert_fails(run("train", work / "photos", target), "its sub-folders are no splits")


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("robustness", ("--methods", "cosin"), "unknown method 'cosin'"),
        (
            "robustness",
            ("--methods", "l2,recognition=2"),
            "recognition: expected a finite value in \\[0\\.01, 1\\], got 2",
        ),
        ("robustness", ("--methods", "l2,recognition=off"), "recognition: cannot read 'off' as float"),
        ("robustness", ("--methods", ";"), "--methods: expected at least one"),
        ("robustness", ("--families", "brigthness"), "unknown family 'brigthness' \\(did you mean 'brightness'"),
        ("robustness", ("--levels", "gaussian=much"), "expected FAMILY=LEVEL"),
        ("robustness", ("--levels", "brightness=2"), "brightness: expected a finite level in \\[0, 1\\]"),
        ("robustness", ("--queries", 41), "expected at most 40 queries"),
        ("robustness", ("--split", "test"), "its sub-folders are no splits"),
        ("radius", ("--kinds", "gausian"), "unknown kind 'gausian'"),
        ("semantic", (), "no held-out queries: .*--query-source"),
        ("semantic", ("--query-split", "train"), "got both from train"),
        ("ablation", ("--base", "cosine"), "expected a preset"),
        ("ablation", ("--set", "blend=mixed"), "unknown blend"),
        ("ablation", ("--settings", "colour"), "unknown setting 'colour'"),
        ("ablation", ("--perturbations", "gaussian"), "like 'gaussian 2.5', got 'gaussian'"),
        ("ablation", ("--layers", "--base", "fast"), "slow reference"),
        ("ablation", ("--queries", 41), "expected at most 40 queries"),
        ("ood", ("--foreign", "nosie"), "expected a path or a data set's name .*got nosie"),
        ("ood", ("--foreign", "noise", "--queries", 41), "expected at most 40 queries"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(work: Path, command: str, options: tuple[object, ...], message: str):
    done = measured(work, command, *options, out="bad.jsonl")
    assert_fails(done, message)
    assert not (work / "bad.jsonl").exists()


@pytest.mark.parametrize("command", ["robustness", "radius", "semantic", "ablation"])
def test_unknown_data_sets_and_missing_roots(work: Path, command: str):
    assert_fails(measured(work, command, out="bad.jsonl", source="mnits"), "got mnits \\(did you mean 'mnist'\\?\\)")
    rootless = measured(work, command, "--root", work / "weights.safetensors", out="bad.jsonl", source="mnist")
    assert_fails(rootless, "mnist: expected .*MNIST/raw")


def test_held_out_queries_are_checked(work: Path):
    for options, message in (
        (("--query-source", work / "few"), "expected queries of the classes of"),
        ((*held_out(work), "--queries", 31), "expected at most 30 queries"),
        (("--query-source", work / "photos" / "digit-0"), "expected labelled queries"),
    ):
        assert_fails(measured(work, "semantic", *options, out="bad.jsonl"), message)


def test_the_oracle_wants_the_exemplars_of_its_records(work: Path, monkeypatch: pytest.MonkeyPatch):
    options = (*held_out(work), "--semantic", work / "semantic.jsonl")
    for changed, message in (
        (("--seed", 1), "expected records of seed 1, got 0"),
        (("--exemplars", 30), "expected records of exemplars 30, got 40"),
        (("--query-source", work / "photos"), "expected records of query_source"),
        (("--name", "else"), "expected records of data_set 'else'"),
        (("--queries", 2), "they have query 2 and there are only 2"),
    ):
        assert_fails(measured(work, "oracle", *options, "--judge", "ssim", *changed, out="bad.jsonl"), message)
    missing = measured(work, "oracle", *held_out(work), "--semantic", work / "no.jsonl", out="bad.jsonl")
    assert_fails(missing, "cannot read")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert_fails(measured(work, "oracle", *options, "--judge-model", "m", out="bad.jsonl"), "OPENAI_API_KEY")
    for lacking, out in (("--judge-model", "bad.jsonl"), ("--out", None)):
        done = measured(work, "oracle", *options, out=out)
        assert done.exit_code == 2
        assert f"Missing option '{lacking}'" in done.stderr
    assert not (work / "bad.jsonl").exists()


def test_what_cannot_be_written_or_read(work: Path):
    assert_fails(measured(work, "ood", "--foreign", "noise", out="no/folder/o.jsonl"), "its folder does not exist")
    assert_fails(run("report", work / "nowhere"), "expected \\*.jsonl files with records")
    assert_fails(measured(work, "robustness", out="semantic.jsonl"), "expected benchmark 'semantic'")


def assert_fails(done: Result, message: str) -> None:
    assert done.exit_code == 1, done.output
    assert re.fullmatch(f"error: .*{message}.*", done.stderr.strip()), done.stderr  # one line


# --------------------------------------------------------------------------------------------- texts


def test_perturbations_are_read():
    found = parse_perturbations("brightness, gaussian", ("gaussian=1,2.5", "blur=1"))
    names = [perturbation.name for perturbation in found]
    assert names[-2:] == ["gaussian 1", "gaussian 2.5"]
    assert names[0] == "brightness 0.9"
    assert not any(name.startswith("blur") for name in names)
    assert [one.name for one in parse_few(FEW_PERTURBATIONS)] == FEW_PERTURBATIONS.split(",")
    assert [one.name for one in parse_few("shift 2, clean")] == ["shift 2", "clean"]


def test_methods_are_read():
    assert [method.name for method in parse_methods("l2; cosine,stretch=true ;")] == ["l2", "cosine,stretch=true"]
