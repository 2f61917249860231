"""Backends and precisions, from the command line and from Python."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from tests.digits import IMAGES, LABELS, SHORT, make_classifier, write_photos
from tests.robust import by_row
from tmm_engine import Engine, SearchResult
from tmm_engine.backends import cached_onnx
from tmm_engine.cli.main import main
from tmm_engine.index import ArraySource, InputError
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.manifest import Manifest
from tmm_engine.rerank.backbone import Backbone
from tmm_engine.rerank.settings import preset
from tmm_engine.rerank.tmm import TmmNN
from tmm_engine.verify import repair_index, verify_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backends") / "digits.idx"
    write_index(ArraySource(IMAGES[:120], LABELS[:120]), path, make_classifier())
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def search(index: Path, **options: str) -> SearchResult:
    with Engine.open(index, device="cpu", **options) as engine:
        return engine.search(IMAGES[200], k=120, config="paper")


def scores(result: SearchResult) -> np.ndarray:
    by_id = {hit.id: hit.score for hit in result.hits}
    return np.array([by_id[id_] for id_ in sorted(by_id)])


def test_every_backend_and_precision_gives_the_same_scores(index: Path):
    torch_fp32 = search(index)
    assert torch_fp32.backend == "torch fp32 on cpu"
    onnx = search(index, backend="onnx")
    assert "CPUExecutionProvider" in onnx.backend
    np.testing.assert_allclose(scores(onnx), scores(torch_fp32), atol=1e-3)
    bf16 = search(index, precision="bf16")
    assert bf16.backend == "torch bf16 on cpu"
    assert np.corrcoef(scores(bf16), scores(torch_fp32))[0, 1] > 0.99


@pytest.mark.parametrize("left", [-100, 0], ids=["cut", "empty"])  # the latter has no trace of an export
def test_a_graph_in_the_cache_is_made_anew_when_it_is_damaged(index: Path, left: int):
    expected = scores(search(index, backend="onnx"))
    graph = index / "cache" / "onnx" / "triggered.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:left])
    np.testing.assert_array_equal(scores(search(index, backend="onnx")), expected)
    assert graph.read_bytes() == whole


def test_verify_finds_and_repair_removes_a_damaged_graph(index: Path, monkeypatch: pytest.MonkeyPatch):
    search(index, backend="onnx")
    graphs = sorted((index / "cache" / "onnx").iterdir())
    whole = {graph: graph.read_bytes() for graph in graphs}
    assert verify_index(index).findings == []
    for graph in graphs:
        graph.write_bytes(whole[graph].replace(b"images", b"imagex", 1))
    done = verify_index(index, sample=0)
    assert done.sound
    assert [finding.what for finding in done.findings] == [
        f"{graph} is damaged; searches ignore it" for graph in graphs
    ]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)  # as where the extra is not installed
        unseen = verify_index(index, sample=0)
    assert unseen.findings == []
    assert "not looked at: ONNX needs the 'onnx' extra: pip install" in str(unseen.notes)
    graphs[0].write_bytes(whole[graphs[0]])
    [said] = repair_index(index)
    assert str(graphs[1]) in said
    assert list(graphs[0].parent.iterdir()) == graphs[:1]
    assert verify_index(index, sample=0).findings == []


def test_auto_takes_what_was_measured_and_info_says_so(index: Path):
    assert "not compared" in run("info", index).stdout
    with Engine.open(index, device="cpu") as engine:
        speeds = engine.compare_backends()
    assert speeds.keys() == {"torch", "onnx"}
    assert all(speed > 0 for speed in speeds.values())
    fastest = max(speeds, key=lambda name: speeds[name])
    assert Manifest.read(index).backend_speeds == speeds
    assert f"{fastest} (when built" in run("info", index).stdout
    assert search(index, backend="auto").backend.lower().startswith(fastest)
    assert search(index, backend="auto", precision="bf16").backend.startswith("torch bf16")


def test_the_command_line_compares_exports_and_searches(tmp_path: Path):
    photos = write_photos(tmp_path / "photos", count=60)
    make_classifier().save(tmp_path / "w.safetensors")
    built = run(
        "build-index", photos, tmp_path / "a.idx", "--weights", tmp_path / "w.safetensors", "--compare-backends",
        "--no-global-trigger",
    )  # fmt: skip
    assert built.exit_code == 0, built.stderr
    assert "torch: " in built.stderr
    assert "onnx: " in built.stderr
    exported = run("export-onnx", tmp_path / "a.idx", tmp_path / "graphs")
    assert exported.exit_code == 0, exported.stderr
    assert {path.name for path in (tmp_path / "graphs").iterdir()} == {"clean.onnx", "triggered.onnx"}
    assert "largest difference" in exported.stderr
    found = run("search", tmp_path / "a.idx", "--id", "digit-3/0003.png", "--preset", "paper", "--backend", "onnx")
    assert found.exit_code == 0, found.stderr
    assert "tmm on ONNX Runtime" in found.stderr


def test_what_does_not_go_together_is_refused(index: Path, tmp_path: Path):
    with pytest.raises(InputError, match="fp32"):
        Engine.open(index, backend="onnx", precision="bf16")
    with pytest.raises(InputError, match="did you mean 'onnx'"):
        Engine.open(index, backend="onx")
    with pytest.raises(InputError, match="bf16"):
        Engine.open(index, precision="fp16")
    with pytest.raises(InputError, match="smaller than one chunk"):
        Engine.open(index, cache_bytes=100)
    memory = Engine.from_arrays(IMAGES[:20], LABELS[:20], make_classifier(), global_trigger=None)
    with pytest.raises(InputError, match="in memory"):
        memory.compare_backends()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    refused = run("export-onnx", index, tmp_path / "mine")
    assert refused.exit_code == 1
    assert "mine exists and is not an ONNX export: it is left alone" in refused.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


@pytest.mark.parametrize(("text", "message"), [("4GB", None), ("0", None), ("4XB", "size like"), ("10", "one chunk")])
def test_cache_sizes_on_the_command_line(index: Path, text: str, message: str | None):
    result = run("search", index, "--id", "00000003", "--preset", "paper", "--cache-images", text)
    assert (result.exit_code == 0) == (message is None), result.output
    assert message is None or message in result.stderr


class Cramped:
    """A backbone on a device that has room for so many images at once."""

    name, exact = "cramped", True

    def __init__(self, backbone: Backbone, room: int) -> None:
        self.backbone, self.room, self.largest = backbone, room, 0

    def __call__(self, images: torch.Tensor, trigger: torch.Tensor, **options: Any) -> torch.Tensor:
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.largest = max(self.largest, len(images))
        return self.backbone(images, trigger, **options)


def test_out_of_memory_means_smaller_chunks_and_then_a_clear_error():
    engine = Engine.from_arrays(IMAGES[:120], LABELS[:120], make_classifier(), global_trigger=None)
    tmm = TmmNN(engine.classifier, engine.store)
    expected = tmm.rank(torch.from_numpy(IMAGES[200][None] / np.float32(255)), k=120, config=preset("paper"))
    tmm.backbone = cramped = Cramped(tmm.backbone, 13)
    found = tmm.rank(torch.from_numpy(IMAGES[200][None] / np.float32(255)), k=120, config=preset("paper"))
    assert 1 < cramped.largest <= 13
    np.testing.assert_allclose(by_row(found), by_row(expected), atol=1e-3)
    tmm.backbone = Cramped(tmm.backbone, 0)
    with pytest.raises(InputError, match="no memory for one image"):
        tmm.rank(torch.from_numpy(IMAGES[200][None] / np.float32(255)), k=1, config=preset("paper"))


def test_a_global_trigger_can_be_built_with_another_blend(tmp_path: Path):
    photos = write_photos(tmp_path / "photos", count=60)
    make_classifier().save(tmp_path / "w.safetensors")
    arguments = (
        "build-index",
        photos,
        tmp_path / "a.idx",
        "--weights",
        tmp_path / "w.safetensors",
        "--set",
        "blend=added",
        *SHORT,
    )
    refused = run(*arguments, "--no-global-trigger")
    assert refused.exit_code == 2
    assert "--set needs --global-trigger" in refused.stderr
    built = run(*arguments)
    assert built.exit_code == 0, built.stderr
    search_ = ("search", tmp_path / "a.idx", "--id", "digit-3/0003.png", "--preset", "fast", "--json")
    other = run(*search_)
    assert other.exit_code == 1
    assert "was blended with blend=added, the configuration says blend=printed: search with the former" in other.stderr
    found = run(*search_, "--set", "blend=added")
    assert found.exit_code == 0, found.stderr
    answer = json.loads(found.stdout)
    assert answer["config"] == preset("fast").with_settings(["blend=added"]).to_json()
    assert answer["hits"][0]["id"] == "digit-3/0003.png"


def test_an_index_that_cannot_be_written_is_searched_without_a_cache(tmp_path):
    classifier = make_classifier()
    (tmp_path / "cache").write_text("a file where the cache's folder would be")
    backbone = cached_onnx(tmp_path, classifier, torch.device("cpu"))
    assert backbone.name == "ONNX Runtime fp32, CPUExecutionProvider"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
