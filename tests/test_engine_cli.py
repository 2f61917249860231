"""The command line: every command, what it prints where, and how it fails."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from tests.digits import IMAGES, SHORT, make_classifier, write_photos, write_queries
from tmm_engine import Engine
from tmm_engine.cli.main import main
from tmm_engine.index import Classifier
from tmm_engine.rerank import preset
from tmm_engine.rerank.optimisation import TriggerResult, make_trigger


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, queries/, weights.safetensors and photos.idx."""
    folder = tmp_path_factory.mktemp("cli")
    write_photos(folder / "photos")
    write_queries(folder / "queries")
    make_classifier().save(folder / "weights.safetensors")
    weights = ("--weights", folder / "weights.safetensors")
    built = run("build-index", folder / "photos", folder / "photos.idx", *weights, *SHORT)
    assert built.exit_code == 0, built.stderr
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def error_line(result: Result) -> str:
    """What a command that failed says in the end, on stderr: the one line of its error."""
    [line] = [line for line in result.stderr.splitlines() if line.lower().startswith("error: ")]
    assert result.stderr.endswith(f"{line}\n"), result.output
    assert (result.stdout, "Traceback" in result.stderr) == ("", False), result.output
    return line


def answers(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def ranked(answer: dict) -> list[tuple[str, float]]:
    return [(hit["id"], hit["score"]) for hit in answer["hits"]]


@pytest.mark.parametrize("command", ["", *main.commands])
def test_every_help_has_an_example_and_needs_no_torch(command: str):
    code = (
        "import sys\nfrom tmm_engine.cli.main import main\n"
        f"try: main({[command, '--help'] if command else ['--help']})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'lance', 'faiss', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Example" in done.stdout


def test_build_reports_and_info_describes(work: Path):
    described = answers(run("info", work / "photos.idx", "--json"))[0]
    assert described["exemplars"] == 120
    assert described["classes"] == [f"digit-{digit}" for digit in range(10)]
    assert described["model"] == "resnet18"
    assert described["preprocessing"].startswith(
        "resized to cover 8 × 8 where it has another size (bicubic, pil); centre"
    )
    assert described["preprocessing"].endswith("1 channel, mean 0, std 1")
    assert "fingerprint" in run("info", work / "photos.idx").stdout
    assert {"torch", "threads"} <= answers(run("info", "--system", "--json"))[0].keys()


@pytest.mark.parametrize("mode", ["tmm", "l2", "cosine"])
def test_command_line_and_python_give_identical_answers(work: Path, mode: str):
    bit_for_bit = [] if mode == "tmm" else ["--alone"]
    asked = ("search", work / "photos.idx", work / "queries", "--mode", mode, "-k", 7, "--json")
    lines = answers(run(*asked, *bit_for_bit))
    paths = sorted((work / "queries").iterdir())
    [alone] = answers(run("search", work / "photos.idx", paths[0], "--mode", mode, "-k", 7, "--json"))
    with Engine.open(work / "photos.idx", device="cpu") as engine:
        together = engine.search(list(paths), k=7, mode=mode, alone=mode != "tmm")
        assert ranked(alone) == [(hit.id, hit.score) for hit in engine.search(paths[0], k=7, mode=mode).hits]
    for line, path, result in zip(lines, paths, together, strict=True):
        assert line["query"] == result.query == str(path)
        assert ranked(line) == [(hit.id, hit.score) for hit in result.hits]
        assert line["hits"][0]["metadata"]["path"].endswith(line["hits"][0]["id"])
    assert ranked(alone) == ranked(lines[0])


def test_together_triggers_are_optimised_jointly_and_the_answer_hardly_changes(
    work: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[int] = []

    def counted(classifier: Classifier, queries: torch.Tensor, *how: object, **options: int) -> TriggerResult:
        made.append(len(queries))
        return make_trigger(classifier, queries, *how, **options)

    monkeypatch.setattr("tmm_engine.rerank.trigger.make_trigger", counted)
    arguments = ("search", work / "photos.idx", work / "queries", "-k", 7, "--json")
    arguments += ("--preset", "paper", "--set", "trigger.steps=60")
    apart, together = (answers(run(*arguments, *option)) for option in ((), ("--together",)))
    assert made == [1, 1, 2]
    for one, other in zip(apart, together, strict=True):
        assert ranked(other)[0][1] == pytest.approx(ranked(one)[0][1], abs=0.2)


def test_several_modes_write_tables_a_page_and_a_picture(work: Path, tmp_path: Path):
    page, picture = tmp_path / "answer.html", tmp_path / "answer.png"
    query = work / "queries" / "query-200.png"
    result = run(
        "search",
        work / "photos.idx",
        query,
        "--mode",
        "robust,tmm,l2",
        "--preset",
        "fast",
        "-k",
        3,
        "--html",
        page,
        "--png",
        picture,
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("query-200.png") >= 3
    assert "alike + 4 · cosine similarity" in result.stdout
    assert f"wrote {page}" in result.stderr
    assert str(page) not in result.stdout
    assert page.read_text().count("data:image/png") > 9
    with Image.open(picture) as image:
        assert image.width > 300


def test_an_exemplar_as_the_query_finds_itself(work: Path):
    [answer] = answers(run("search", work / "photos.idx", "--id", "digit-3/0003.png", "--mode", "l2", "--json"))
    assert answer["hits"][0]["id"] == "digit-3/0003.png"
    assert answer["hits"][0]["score"] == pytest.approx(0, abs=1e-4)  # a batch of one rounds differently
    assert answer["true_class"] == "digit-3"


def test_a_source_gives_labelled_queries_in_order(work: Path):
    found = answers(
        run("search", work / "photos.idx", "--source", work / "photos", "--limit", 3, "--mode", "cosine", "--json")
    )
    assert [answer["query"] for answer in found] == [answer["hits"][0]["id"] for answer in found]
    assert all(answer["true_class"] == "digit-0" for answer in found)


def test_settings_and_seed_reach_the_configuration(work: Path):
    query = work / "queries" / "query-200.png"
    options = ("--preset", "paper", "--candidates", 20, "--set", "blend=added", "--set", "head.min_steps=10")
    options += ("--set", "trigger.steps=20")
    options += ("--seed", 5, "--json")
    [answer] = answers(run("search", work / "photos.idx", query, *options))
    assert answer["config"] == preset("paper").to_json() | {
        "blend": "added",
        "head.min_steps": 10,
        "trigger.steps": 20,
        "seed": 5,
    }
    assert answer["scored"] == 20
    [again] = answers(run("search", work / "photos.idx", query, *options))
    assert ranked(answer) == ranked(again)


def test_the_default_is_robust_and_settings_are_those_of_the_preset(work: Path):
    query = work / "queries" / "query-200.png"
    [answer] = answers(run("search", work / "photos.idx", query, "--json"))
    assert (answer["mode"], answer["config"]) == ("robust", None)
    fast = ("--preset", "fast")
    [answer] = answers(run("search", work / "photos.idx", query, *fast, "--json"))
    assert answer["config"] == preset("fast").to_json()
    for name in ("head.shrinkage", "shrinkage"):  # as it was called
        [other] = answers(run("search", work / "photos.idx", query, *fast, "--set", f"{name}=0.5", "--json"))
        assert other["config"] == preset("fast").to_json() | {"head.shrinkage": 0.5}
        assert ranked(other) != ranked(answer)


@pytest.mark.parametrize("mode", ["tmm", "l2", "cosine"])
def test_stretched_a_darkened_query_is_the_original(work: Path, tmp_path: Path, mode: str):
    original = IMAGES[200] // 2  # from 0 to 127, so that halves and less are exact
    for name, image in (("bright", original * 2), ("dark", original), ("lifted", original + 40)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    arguments = ("search", work / "photos.idx", tmp_path, "--mode", mode, "--json")
    paper = ("--preset", "paper", "--set", "head.min_steps=10", "--set", "trigger.steps=20") if mode == "tmm" else ()
    without = ("--no-stretch", *paper)
    fast = ("--preset", "fast") if mode == "tmm" else ()
    for options, same in ((("--stretch", *fast), True), (without, False), (fast, mode == "tmm")):
        bright, dark, lifted = answers(run(*arguments, *options))
        for other in (dark, lifted) if same else (lifted,):  # cosine: this network's φ(x / 2) is φ(x) / 2
            differences = [dict(ranked(other)).get(id_, np.inf) - score for id_, score in ranked(bright)]
            assert (np.abs(differences).max() < 1e-4) == same
        if mode == "tmm":
            assert bright["config"]["stretch"] is same


def test_without_a_global_trigger_a_search_by_it_says_what_to_do(work: Path, tmp_path: Path):
    index = tmp_path / "plain.idx"
    weights = ("--weights", work / "weights.safetensors")
    assert run("build-index", work / "photos", index, *weights, "--no-global-trigger").exit_code == 0
    refused = run("search", index, work / "queries" / "query-200.png", "--preset", "fast")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "no global trigger, which this configuration needs: build it with one (global_trigger" in refused.stderr
    assert "or search with the query's own (the preset 'paper', or trigger=query)" in refused.stderr
    paper = ("--preset", "paper", "--set", "head.min_steps=10", "--set", "trigger.steps=20")
    assert run("search", index, work / "queries" / "query-200.png", *paper).exit_code == 0


def test_more_than_there_is_returns_all_and_says_so(work: Path):
    [answer] = answers(
        run("search", work / "photos.idx", "--id", "digit-3/0003.png", "--mode", "l2", "-k", 500, "--json")
    )
    assert len(answer["hits"]) == 120
    assert "500" in answer["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("search", "photos.idx", "missing.png"), 1, "no such file"),
        (("search", "photos.idx"), 2, "no query"),
        (("search", "photos.idx", "queries", "--mode", "cosin"), 2, "did you mean 'cosine'"),
        (("search", "photos.idx", "queries", "--preset", "papr"), 1, "did you mean 'paper'"),
        (("search", "photos.idx", "queries", "--set", "blnd=added"), 1, "did you mean 'blend'"),
        (("search", "photos.idx", "queries", "--set", "blend=adde"), 1, "did you mean 'added'"),
        (("search", "photos.idx", "queries", "--prefilter", "l3"), 1, "known: l2, cosine"),
        (("search", "photos.idx", "queries", "--device", "cuda:99"), 1, "CUDA devices"),
        (("search", "photos.idx", "queries", "--html", "nowhere/a.html"), 1, "folder does not exist"),
        (("search", "photos.idx", "--id", "digit-3/0004.png"), 1, "did you mean 'digit-"),
        (("search", "photos.idx", "queries", "-k", "0"), 2, "0 is not in the range"),
        (("search", "nothing.idx", "queries"), 1, "does not exist"),
        (("search", "photos", "queries"), 1, "is not an index"),
        (("info",), 2, "give an INDEX"),
        (("info", "photos.idx/index.json"), 1, "is not an index"),
        (("build-index", "photos", "new.idx"), 1, "no model"),
        (("build-index", "photos", "new.idx", "--model", "resnet19", "--weights", "weights.safetensors"), 1,
        "resnet18"),
        (("build-index", "photos", "new.idx", "--head", "fc", "--weights", "weights.safetensors"), 2, "needs --model"),
        (("build-index", "photos", "photos.idx", "--weights", "weights.safetensors"), 1, "--overwrite"),
        (("build-index", "photos", "queries", "--weights", "weights.safetensors", "--overwrite"), 1, "left alone"),
        (("build-index", "photos", "a/b.idx", "--weights", "weights.safetensors"), 1, "not a folder"),
        (("build-index", "nothing", "new.idx", "--weights", "weights.safetensors"), 1, "nothing"),
        (("build-index", "photos", "new.idx", "--weights", "weights.safetensors", "--neighbours", "HNW"), 1, "HNSW32"),
        (("build-index", "photos", "new.idx", "--model", "resnet18", "--mean", "a"), 2, "separated by commas"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(
    work: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, message: str
):
    monkeypatch.chdir(work)
    before = sorted(work.rglob("*"))
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in error_line(result)
    left = [path for path in sorted(work.rglob("*")) if not path.name.endswith(".lock")]
    assert left == [path for path in before if not path.name.endswith(".lock")]


def test_unreadable_images_are_named_and_counted_or_fail_under_strict(work: Path, tmp_path: Path):
    photos = write_photos(tmp_path / "photos", count=40)
    (photos / "digit-0" / "broken.png").write_bytes(b"not an image")
    arguments = ("build-index", photos, tmp_path / "new.idx", "--weights", work / "weights.safetensors", *SHORT)
    strict = run(*arguments, "--strict")
    assert strict.exit_code == 1
    assert "broken.png" in strict.stderr
    assert not (tmp_path / "new.idx").exists()
    lenient = run(*arguments)
    assert lenient.exit_code == 0
    assert "skipped digit-0/broken.png" in lenient.stderr
    assert "1 images could not be read" in lenient.stderr
    assert "40 exemplars" in lenient.stdout


def test_a_models_factory_has_to_be_named_again(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_model_for_cli.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(1)\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    built = run("build-index", work / "photos", "own.idx", "--model", "my_model_for_cli:make", *SHORT)
    assert built.exit_code == 0, built.stderr
    query = work / "queries" / "query-200.png"
    refused = run("search", "own.idx", query, "--mode", "l2")
    assert refused.exit_code == 1
    assert "my_model_for_cli:make" in refused.stderr
    accepted = run("search", "own.idx", query, "--mode", "tmm", "--model", "my_model_for_cli:make", "--json")
    assert len(answers(accepted)[0]["hits"]) == 10


@pytest.mark.slow
def test_ctrl_c_ends_a_build_with_130_and_leaves_nothing(tmp_path: Path):
    write_photos(tmp_path / "photos", count=1700)
    make_classifier().save(tmp_path / "weights.safetensors")
    build = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tmm_engine.cli.main",
            "build-index",
            "photos",
            "new.idx",
            "--weights",
            "weights.safetensors",
            *SHORT,
        ],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / ".new.idx.building").exists() and time.monotonic() < deadline and build.poll() is None:
        time.sleep(0.01)
    build.send_signal(signal.SIGINT)
    _, errors = build.communicate(timeout=60)
    assert build.returncode == 130, errors
    assert "interrupted" in errors
    assert not (tmp_path / "new.idx").exists()
    assert not (tmp_path / ".new.idx.building").exists()


def test_the_demo_compares_the_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tmm_engine.demo.EPOCHS", 1)
    monkeypatch.setattr("tmm_engine.demo.EXEMPLARS", 500)
    result = run("demo", "--out", tmp_path / "out", "--queries", 1)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    for mode in ("robust", "tmm", "l2", "cosine"):  # one row each: clean, darkened, noisy
        assert len([line for line in lines if re.search(rf"│ {mode} +│ +[01]/1 +│ +\d+ +│ +[01]\.\d\d │", line)]) == 3
    [clean] = [line for line in lines if "│ clean" in line]
    assert re.search(r"│ robust +│ +1/1 +│ +1 +│", clean), "a query that is an exemplar is found first"
    assert "tmm is the preset 'fast'" in " ".join(result.stdout.split())
    for name in ("report.html", "report.png", "digits.idx"):
        assert (tmp_path / "out" / name).exists()
        assert name in result.stdout


def test_every_option_is_documented():
    for name, command in main.commands.items():
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help, f"{name} {parameter.name}"
