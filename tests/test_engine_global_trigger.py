"""The global trigger from the command line: built into an index, searched with, used as a prefilter, refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.digits import IMAGES, SHORT, write_photos, write_queries
from tmm_engine import Engine
from tmm_engine.cli.main import main
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.store.manifest import Manifest, digest_of
from tmm_engine.rerank import preset
from tmm_engine.rerank.columns import GLOBAL_TRIGGER
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.settings import Blend

MEAN = ("--set", "intensity=none", "--set", "stretch=false")  # as the paper has it: ω is the exemplars' mean
LIKE_THE_PAPER = preset("paper").with_settings(["trigger=global"])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with photos/, queries/, weights.safetensors, plain.idx, global.idx and mean.idx."""
    folder = tmp_path_factory.mktemp("global")
    write_photos(folder / "photos", count=80)
    write_queries(folder / "queries")
    classifier = Classifier.from_architecture("resnet18", image_shape=(1, 8, 8), seed=0, num_classes=10)
    classifier.save(folder / "weights.safetensors")
    options = ("--model", "resnet18", "--weights", folder / "weights.safetensors")
    for name, more in (("plain", ("--no-global-trigger",)), ("global", SHORT), ("mean", (*SHORT, *MEAN))):
        built = run("build-index", folder / "photos", folder / f"{name}.idx", *options, *more)
        assert built.exit_code == 0, built.stderr
    return folder


def test_an_index_says_whether_it_has_one(work):
    for name, expected in (("plain", False), ("global", True), ("mean", True)):
        described = json.loads(run("info", work / f"{name}.idx", "--json").stdout)
        assert ("global_feature" in described["columns"]) is expected
        assert (work / f"{name}.idx" / GLOBAL_TRIGGER).exists() is expected


def test_it_is_blended_as_the_default_search_wants_it_unless_told_otherwise(work):
    kept = {name: GlobalTrigger.load(work / f"{name}.idx" / GLOBAL_TRIGGER) for name in ("global", "mean")}
    assert kept["global"].intensity == preset("fast").blending.intensity == 0.1
    assert kept["mean"].intensity == pytest.approx(np.mean([(image / 255.0).std() for image in IMAGES[:80]]), rel=1e-6)
    for trigger in kept.values():
        assert (trigger.blend, trigger.clamp) == (Blend.PRINTED, True)
    assert (kept["global"].stretch, kept["mean"].stretch) == (True, False)


@pytest.mark.parametrize(
    ("index", "options", "config"),
    [
        ("global", ("--preset", "fast"), preset("fast")),
        (
            "global",
            ("--preset", "paper", "--set", "trigger=global", "--stretch"),
            LIKE_THE_PAPER.with_settings(["stretch=true"]),
        ),
        ("mean", ("--preset", "paper", "--set", "trigger=global"), LIKE_THE_PAPER),
        ("mean", ("--preset", "fast", *MEAN), preset("fast").with_settings(["intensity=none", "stretch=false"])),
    ],
)
def test_the_command_line_searches_with_it_as_python_does(work, index, options, config):
    query = work / "queries" / "query-200.png"
    result = run("search", work / f"{index}.idx", query, *options, "-k", 7, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["config"] == config.to_json()
    assert answer["scored"] == 80
    with Engine.open(work / f"{index}.idx", device="cpu") as engine:
        found = engine.search(query, k=7, config=config)
        kept = GlobalTrigger.load(work / f"{index}.idx" / GLOBAL_TRIGGER)
        np.testing.assert_array_equal(found.trigger, kept.trigger)
        with pytest.raises(InputError, match="blend=added"):
            engine.search(query, config=config.with_settings(["blend=added"]))
    assert [(hit["id"], hit["score"]) for hit in answer["hits"]] == [(hit.id, hit.score) for hit in found.hits]


@pytest.mark.parametrize(
    ("index", "options", "message"),
    [
        (
            "plain",
            ("--preset", "fast"),
            "no global trigger, which this configuration needs: build it with one (global_trigger=…)",
        ),
        ("plain", ("--preset", "paper", "--set", "trigger=global"), "no global trigger"),
        (
            "plain",
            ("--preset", "paper", "--prefilter", "global", "--candidates", 5),
            "choose another prefilter, such as 'union'",
        ),
        ("mean", ("--preset", "fast"), "intensity=0.1: leave the intensity out"),
        (
            "mean",
            ("--preset", "fast", "--set", "intensity=none"),
            "stretch=False, the configuration says stretch=True: search with the former",
        ),
        (
            "global",
            ("--preset", "fast", "--no-stretch"),
            "stretch=True, the configuration says stretch=False: search with the former",
        ),
        ("global", ("--set", "trigger=global", "--set", "blend=added"), "blend=added"),
        (
            "global",
            ("--preset", "fast", "--prefilter", "global", "--candidates", 5, "--set", "clamp=false"),
            "clamp=False",
        ),
        ("global", ("--set", "trigger=global", "--set", "intensity=0.9"), "intensity=0.9"),
    ],
)
def test_the_command_line_refuses_what_does_not_fit(work, index, options, message):
    result = run("search", work / f"{index}.idx", work / "queries", *options)
    assert result.exit_code == 1
    assert not result.stdout
    assert message in result.stderr


@pytest.mark.parametrize("index", ["mean", "global"])
def test_the_prefilter_hands_over_the_best_of_the_global_trigger(work, index):
    by = LIKE_THE_PAPER.with_settings(
        [f"stretch={index == 'global'}"]
    )  # as the index's features are, whatever the rerank's
    queries = sorted((work / "queries").iterdir())
    with Engine.open(work / f"{index}.idx", device="cpu") as engine:
        by_global = engine.search(list(queries), k=12, config=by)
        config = preset("paper").with_settings(
            ["intensity=0.4", "trigger.steps=5"]
        )  # the query's own trigger may have another intensity
        found = engine.search(list(queries), k=12, candidates=12, prefilter="global", config=config)
        labelled = engine.search(queries[0], k=12, candidates=12, prefilter="global", label=3, config="paper")
        same_label = engine.search(queries[0], k=12, config=by, label=3)
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
        "--limit", 20, *SHORT,
    ).exit_code == 0  # fmt: skip
    path = built / GLOBAL_TRIGGER
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "is damaged" in run("search", built, work / "queries").stderr
    path.write_bytes(whole.replace(b"printed", b"prinTed"))
    assert "is not what was written" in run("search", built, work / "queries").stderr
    manifest = Manifest.read(built)
    replace(manifest, files=manifest.files | {GLOBAL_TRIGGER: digest_of(path)}).write(built)
    result = run("search", built, work / "queries")
    assert result.exit_code == 1
    assert "damaged global trigger" in result.stderr
    path.unlink()
    assert "is missing" in run("search", built, work / "queries").stderr


def test_a_folder_of_black_images_gets_a_global_trigger_only_where_the_intensity_is_set(work, tmp_path):
    folder = tmp_path / "black" / "digit-0"
    folder.mkdir(parents=True)
    for number in range(10):
        (tmp_path / "black" / f"digit-{number}").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black" / f"digit-{number}" / "0.png")
    options = ("--model", "resnet18", "--weights", work / "weights.safetensors", *SHORT)
    result = run("build-index", tmp_path / "black", tmp_path / "a.idx", *options, "--set", "intensity=none")
    assert result.exit_code == 1
    assert "is every image constant?" in result.stderr
    assert not (tmp_path / "a.idx").exists()
    result = run("build-index", tmp_path / "black", tmp_path / "a.idx", *options)
    assert result.exit_code == 0, result.stderr
    for query in (work / "queries" / "query-200.png", tmp_path / "black" / "digit-3" / "0.png"):
        answer = json.loads(run("search", tmp_path / "a.idx", query, "--json").stdout)
        assert [hit["id"] for hit in answer["hits"]] == [f"digit-{digit}/0.png" for digit in range(10)]  # all alike
        assert len({hit["score"] for hit in answer["hits"]}) == 1
