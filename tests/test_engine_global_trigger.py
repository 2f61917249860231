"""The global trigger from the command line: built into an index, searched with, used as a prefilter, refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from engine import Engine
from engine.cli import main
from index.classifier import Classifier
from index.errors import InputError
from index.manifest import GLOBAL_TRIGGER
from rerank import Blend, TmmConfig, Trigger
from rerank.global_trigger import GlobalTrigger
from tests.digits import write_photos, write_queries


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with photos/, queries/, weights.safetensors, plain.idx and global.idx."""
    folder = tmp_path_factory.mktemp("global")
    write_photos(folder / "photos", count=80)
    write_queries(folder / "queries")
    classifier = Classifier.from_architecture("resnet18", image_shape=(1, 8, 8), seed=0, num_classes=10)
    classifier.save(folder / "weights.safetensors")
    options = ("--model", "resnet18", "--weights", folder / "weights.safetensors")
    for name, more in (("plain", ()), ("global", ("--global-trigger",))):
        built = run("build-index", folder / "photos", folder / f"{name}.idx", *options, *more)
        assert built.exit_code == 0, built.stderr
    return folder


def test_an_index_says_whether_it_has_one(work):
    for name, expected in (("plain", False), ("global", True)):
        described = json.loads(run("info", work / f"{name}.idx", "--json").stdout)
        assert described["global_trigger"] is expected
        assert (work / f"{name}.idx" / GLOBAL_TRIGGER).exists() is expected


def test_the_command_line_searches_with_it_as_python_does(work):
    query = work / "queries" / "query-200.png"
    result = run("search", work / "global.idx", query, "--set", "trigger=global", "-k", 7, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["config"]["trigger"] == "global"
    assert answer["scored"] == 80
    with Engine.open(work / "global.idx", device="cpu") as engine:
        found = engine.search(query, k=7, config=TmmConfig(trigger=Trigger.GLOBAL))
        kept = GlobalTrigger.load(work / "global.idx" / GLOBAL_TRIGGER)
        np.testing.assert_array_equal(found.trigger, kept.trigger)
        with pytest.raises(InputError, match="blend=added"):
            engine.search(query, config=TmmConfig(trigger=Trigger.GLOBAL, blend=Blend.ADDED))
    assert [(hit["id"], hit["score"]) for hit in answer["hits"]] == [(hit.id, hit.score) for hit in found.hits]


@pytest.mark.parametrize(
    ("index", "options", "message"),
    [
        ("plain", ("--set", "trigger=global"), "no global trigger; build it with --global-trigger"),
        ("plain", ("--prefilter", "global", "--candidates", 5), "no global trigger; build it with --global-trigger"),
        ("global", ("--set", "trigger=global", "--set", "blend=added"), "blend=added"),
        ("global", ("--prefilter", "global", "--candidates", 5, "--set", "clamp=false"), "clamp=False"),
        ("global", ("--set", "trigger=global", "--set", "intensity=0.9"), "intensity=0.9"),
    ],
)
def test_the_command_line_refuses_what_does_not_fit(work, index, options, message):
    result = run("search", work / f"{index}.idx", work / "queries", *options)
    assert result.exit_code == 1
    assert not result.stdout
    assert message in result.stderr


def test_the_prefilter_hands_over_the_best_of_the_global_trigger(work):
    queries = sorted((work / "queries").iterdir())
    with Engine.open(work / "global.idx", device="cpu") as engine:
        by_global = engine.search(list(queries), k=12, config=TmmConfig(trigger=Trigger.GLOBAL))
        config = TmmConfig(intensity=0.4, trigger_steps=5)  # the query's own trigger may have another intensity
        found = engine.search(list(queries), k=12, candidates=12, prefilter="global", config=config)
        labelled = engine.search(queries[0], k=12, candidates=12, prefilter="global", label=3)
        same_label = engine.search(queries[0], k=12, config=TmmConfig(trigger=Trigger.GLOBAL), label=3)
    for first, second in zip([*by_global, same_label], [*found, labelled], strict=True):
        assert second.scored == 12
        assert {hit.id for hit in second.hits} == {hit.id for hit in first.hits}
        assert "prefilter" in second.timings
    assert found[0].config is not None
    assert found[0].config["trigger"] == "query"


def test_a_damaged_trigger_is_told_when_the_index_is_opened(work, tmp_path):
    built = tmp_path / "copy.idx"
    assert run(
        "build-index", work / "photos", built, "--weights", work / "weights.safetensors", "--model", "resnet18",
        "--limit", 20, "--global-trigger",
    ).exit_code == 0  # fmt: skip
    path = built / GLOBAL_TRIGGER
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "is damaged" in run("search", built, work / "queries").stderr
    path.write_bytes(whole.replace(b"printed", b"prinTed"))
    result = run("search", built, work / "queries")
    assert result.exit_code == 1
    assert "is not what was written" in result.stderr
    path.unlink()
    assert "is missing" in run("search", built, work / "queries").stderr


def test_a_folder_of_black_images_gets_no_global_trigger(work, tmp_path):
    folder = tmp_path / "black" / "digit-0"
    folder.mkdir(parents=True)
    for number in range(10):
        (tmp_path / "black" / f"digit-{number}").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black" / f"digit-{number}" / "0.png")
    options = ("--model", "resnet18", "--weights", work / "weights.safetensors", "--global-trigger")
    result = run("build-index", tmp_path / "black", tmp_path / "a.idx", *options)
    assert result.exit_code == 1
    assert "is every image constant?" in result.stderr
    assert not (tmp_path / "a.idx").exists()
