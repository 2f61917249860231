"""`engine bench latency`: its statistics, its records, and that its figures are what the records say."""

import copy
import json
import statistics
from importlib.metadata import version
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from tests.digits import IMAGES, LABELS, write_photos
from tmm_engine.bench import latency as module
from tmm_engine.bench import latency_photographs
from tmm_engine.bench.latency import Latency, LatencyBench, Record
from tmm_engine.bench.latency_report import BARS, plot_growth, print_latency
from tmm_engine.bench.latency_robust import SEARCHES, counted_passes
from tmm_engine.bench.machine import describe_machine, memory_mib, peak_memory_mib, reset_peak_memory
from tmm_engine.bench.peak import RandomImages, peak_of_build
from tmm_engine.cli.main import main
from tmm_engine.describing import DEFAULT_VIEWS
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.rerank import TmmConfig, TmmNN
from tmm_engine.rerank.backbone import specialised
from tmm_engine.rerank.settings import PRESETS, QueryTrigger, TunedHead

REPEATS = 2
QUICK = TmmConfig(trigger=QueryTrigger(steps=3), head=TunedHead(min_steps=3))
SMALL = {
    "SIZES": (24, 48),
    "RATIO_SIZE": 40,
    "EAGER_STEPS": 2,
    "TOGETHER": 3,
    "CANDIDATES": 16,
    "AGREEMENT_QUERIES": 2,
    "BUILD_SIZES": (16, 32),
    "MATRIX": 64,
    "PRODUCTS": 3,
}
PATHS = {  # path -> (exemplars, times)
    "l2 by FAISS alone": (60, 20 * REPEATS),
    "cosine by FAISS alone": (60, 20 * REPEATS),
    "l2": (60, 20 * REPEATS),
    "cosine": (60, 20 * REPEATS),
    "trigger, plain loop": (1, REPEATS),
    "trigger": (1, REPEATS),
    "16 triggers together": (3, REPEATS),
    "16 triggers apart": (3, REPEATS),
    "forward fp32": (40, REPEATS),
    "forward bf16": (40, REPEATS),
    "exact": (40, REPEATS),
    "exact bf16": (40, REPEATS),
    "exact onnx": (40, REPEATS),
    "candidates": (48, REPEATS),
    "global": (48, REPEATS),
    "fast": (48, REPEATS),
    "exact beside reference": (40, REPEATS),
    "reference, Fisher alone": (40, 1),
    "reference, batch 256": (40, 1),
    "reference, batch 1024": (40, 1),
    "build": (40, REPEATS),
    "forward beside build": (40, REPEATS),
    "build, defaults": (60, 1),
    "FAISS alone": (60, SEARCHES),
    "search, cosine": (60, SEARCHES),
    "search, robust": (60, SEARCHES),
    "photographs decoded": (6, REPEATS),
    "photographs, passes": (6, REPEATS),
    "photographs, build": (6, REPEATS),
}
RECORDS = st.builds(
    Record,
    st.sampled_from(["exact", "global"]),
    st.sampled_from([10, 20]),
    st.floats(1, 100),
    st.floats(0, 1),
)


def user_model() -> nn.Module:
    """A factory, named as a user's own code is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 16, 16),
            nn.ReLU(),
            nn.Linear(16, 10),
        )


MODEL = f"{__name__}:{user_model.__name__}"


def make_classifier() -> Classifier:
    return Classifier.from_architecture(MODEL, image_shape=(1, 8, 8))


def digits(count: int) -> ArraySource:
    return ArraySource(IMAGES[:count], LABELS[:count])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def strict_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> SimpleNamespace:
    """`engine bench latency` on 60 photos, once: result, the JSON's content, the picture's path."""
    folder = tmp_path_factory.mktemp("latency")
    write_photos(folder / "photos", count=60)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(module, name, value)
        patch.setattr(latency_photographs, "PHOTOGRAPHS", 6)
        patch.setattr(latency_photographs, "SHAPE", (3, 64, 64))
        patch.setattr(latency_photographs, "PEAK_PHOTOGRAPHS", (4, 8))
        patch.setitem(PRESETS, "paper", QUICK)
        patch.setenv("OMP_NUM_THREADS", "1")
        result = run(
            "bench", "latency", folder / "photos", "--model", MODEL,
            "--repeats", REPEATS, "--json", folder / "l.json", "--plot", folder / "l.png", "--device", "cpu",
        )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return SimpleNamespace(result=result, content=strict_json(folder / "l.json"), plot=folder / "l.png")


def read_back(content: dict[str, Any]) -> Latency:
    records = [Record(**record) for record in content["records"]]
    return Latency(content["machine"], content["started"], records, content["figures"], content["device"])


# ---- statistics


@given(records=st.lists(RECORDS, min_size=1))
def test_medians_are_of_the_paths_own_records(records):
    found = Latency(records=records, machine={})
    assert sorted(found.paths()) == sorted({(record.path, record.exemplars) for record in records})
    assert found.paths()[0] == (records[0].path, records[0].exemplars)
    for path, exemplars in found.paths():
        own = [record for record in records if (record.path, record.exemplars) == (path, exemplars)]
        assert found.seconds(path, exemplars) == [record.seconds for record in own]
        assert found.median(path, exemplars) == statistics.median(record.seconds for record in own)
        without = statistics.median(record.seconds - record.trigger_seconds for record in own)
        assert found.median(path, exemplars, without_trigger=True) == without


def test_a_ranking_tells_how_long_its_trigger_took(classifier, make_store, make_queries):
    tmm, queries = TmmNN(classifier, make_store(classifier, 20)), make_queries(2, dtype=torch.float32)
    found = Latency(machine={})
    one = found.time("one", 20, lambda: tmm.rank(queries[0], k=3, config=QUICK))
    two = found.time("two", 20, lambda: tmm.rank_many(queries, k=3, config=QUICK))
    assert found.time("nothing", 20, lambda: None) is None
    shares = [record.trigger_seconds for record in found.records]
    assert shares == [one.timings["trigger"], sum(ranking.timings["trigger"] for ranking in two), 0.0]
    assert all(0.0 <= record.trigger_seconds < record.seconds for record in found.records)
    assert found.seconds("one", 20)[0] >= sum(one.timings.values())


# ---- a run


@pytest.mark.slow
def test_every_path_is_recorded_as_often_as_asked_without_the_warm_up(measured):
    latency = read_back(measured.content)
    expected = {(path, exemplars): times for path, (exemplars, times) in PATHS.items()}
    expected |= {("exact by size", size): REPEATS for size in (24, 48)}
    assert {key: len(latency.seconds(*key)) for key in latency.paths()} == expected
    assert all(record.seconds > 0.0 for record in latency.records)
    with_trigger = {record.path for record in latency.records if record.trigger_seconds > 0.0}
    exact = {path for path, _ in latency.paths() if path.startswith("exact")}
    assert with_trigger == {"candidates", "global", "fast"} | exact
    assert all(record.trigger_seconds < record.seconds for record in latency.records)


@pytest.mark.slow
def test_figures_are_what_the_records_say(measured):
    latency = read_back(measured.content)
    figures = latency.figures

    def median(path: str, exemplars: int | None = None, **options: bool) -> float:
        return latency.median(path, exemplars or PATHS[path][0], **options)

    forward, exact = median("forward fp32"), median("exact", without_trigger=True)
    rough = median("exact bf16", without_trigger=True)
    slowest_size = median("exact by size", 48)
    literal = min(median("reference, batch 256"), median("reference, batch 1024"))
    reference = literal - median("reference, Fisher alone")
    expected = {
        "exact_over_forward": exact / forward,
        "exact_over_forward_and_trigger": median("exact") / (forward + median("exact") - exact),
        "bf16_over_fp32_forward": rough / forward,
        "bf16_over_bf16_forward": rough / median("forward bf16"),
        "forward_images_per_second": 40 / forward,
        "onnx_over_forward": median("exact onnx", without_trigger=True) / forward,
        "reference_over_exact": reference / median("exact beside reference", without_trigger=True),
        "trigger_over_eager": median("trigger") / median("trigger, plain loop"),
        "batched_trigger": median("16 triggers together") / median("16 triggers apart"),
        "candidates_over_exact": median("candidates") / slowest_size,
        "global_over_exact": median("global") / slowest_size,
        "fast_over_exact": median("fast") / slowest_size,
        "slope": np.log2(slowest_size / median("exact by size", 24)),  # of the line through two sizes, one the double
        "l2_over_faiss": median("l2") / median("l2 by FAISS alone"),
        "cosine_over_faiss": median("cosine") / median("cosine by FAISS alone"),
        "build_over_forward": median("forward beside build") / median("build"),
        "robust_over_cosine": median("search, robust") / median("search, cosine"),
        "robust_over_faiss": median("search, robust") / median("FAISS alone"),
        "photographs_build_over_slower_part": max(median("photographs decoded"), median("photographs, passes"))
        / median("photographs, build"),
        "photographs_decoded_per_second": 6 / median("photographs decoded"),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    rest = {"bf16_agreement", "trigger_loss", "trigger_loss_eager", "peak_mib", "build_passes"}
    rest |= {f"{built}_peak_mib_{size}" for built in ("build", "photographs") for size in ("small", "large")}
    assert figures.keys() == expected.keys() | rest
    assert 0.0 <= figures["bf16_agreement"] <= 1.0
    assert figures["trigger_loss"] == pytest.approx(figures["trigger_loss_eager"], rel=1e-2)  # of the same steps
    assert all(figures[name] > 0.0 for name in figures if "mib" in name)
    assert figures["build_passes"] > 1 + DEFAULT_VIEWS  # all exemplars, plainly and in each view, and a sample


@pytest.mark.slow
def test_every_path_and_figure_is_printed_with_its_bar(measured):
    printed = measured.result.stdout
    figures = measured.content["figures"]
    for name in [*PATHS, *figures]:
        assert name in printed, name
    assert set(figures) >= set(BARS), "a bar without a figure"
    for line in printed.splitlines():
        name = next(iter(line.split()), "")
        if name in BARS:
            bound, lower = BARS[name]
            met = figures[name] >= bound if lower else figures[name] <= bound
            assert line.split()[-1] == ("met" if met else "missed"), line
            assert f"{'≥' if lower else '≤'} {bound:g}" in line


@pytest.mark.slow
def test_the_record_names_the_machine_and_the_time(measured):
    machine, here = measured.content["machine"], describe_machine()
    assert machine == json.loads(json.dumps(here))
    assert machine["torch"] == version("torch")
    assert measured.content["device"] == "cpu"
    assert {"processor", "threads", "python", "faiss-cpu"} <= machine.keys()
    assert measured.content["started"].endswith("+00:00")


@pytest.mark.slow
def test_the_picture_is_written(measured):
    with Image.open(measured.plot) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) >= 400
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_one_size_has_no_slope(tmp_path, capsys):
    found = Latency(machine={"processor": "any", "threads": 1, "torch": "2"}, figures={"peak_mib": 700.0, "other": 1.0})
    for path in ("exact by size", "candidates", "global"):
        found.records += [Record(path, 100, 0.5, 0.1), Record(path, 100, 0.7, 0.1)]
    plot_growth(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    print_latency(found)
    lines = {line.split()[0]: line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["peak_mib"].endswith("missed")
    assert lines["other"].split() == ["other", "1"]
    assert "600.0 ms" in lines["global"]


def test_a_run_over_one_size_is_whole_json(tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(PRESETS, "paper", QUICK)
    bench = LatencyBench(digits(20), make_classifier(), repeats=1)
    bench.growth()
    assert bench.sizes == [20]
    assert "slope" not in bench.latency.figures
    bench.latency.save(tmp_path / "l.json")
    assert read_back(strict_json(tmp_path / "l.json")) == bench.latency
    queries = bench.queries.numpy()
    assert queries.shape == (3, 1, 8, 8)
    assert 0.0 <= queries.min() < queries.max() <= 1.0


# ---- groups


@pytest.mark.parametrize("group", [name for name in module.GROUPS if name not in ("card", "build", "photographs")])
def test_a_group_needs_no_other(monkeypatch, group):
    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(PRESETS, "paper", QUICK)
    alone = LatencyBench(digits(60), make_classifier(), repeats=1).run([group])
    assert alone.figures
    assert all(np.isfinite(value) for value in alone.figures.values())


def test_a_group_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(module, "SIZES", (24, 48))
    bench = LatencyBench(digits(60), make_classifier(), repeats=1)
    with pytest.raises(InputError, match=r"unknown group 'groth' \(did you mean 'growth'\?\)"):
        bench.run(["groth"])


def test_passes_of_any_copy_of_the_network_are_counted_and_only_while_asked():
    classifier, images = make_classifier(), torch.zeros(5, 1, 8, 8)
    with counted_passes() as passed:
        classifier.features(images)
        specialised(classifier).features(images[:2])
        copy.deepcopy(classifier).logits(classifier.features(images[:3]))
    classifier.features(images)
    assert passed == [5, *passed[1:-2], 2, 3]  # between: what a specialised copy is compared by


# ---- the card


def test_the_pass_is_a_share_of_the_cards_own_rate(monkeypatch, capsys):
    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(PRESETS, "paper", QUICK)
    bench = LatencyBench(digits(60), make_classifier(), repeats=REPEATS)
    bench.card()
    latency, figures = bench.latency, bench.latency.figures
    assert {path: len(latency.seconds(*path)) for path in latency.paths()} == {
        ("pass bf16", 48): REPEATS,
        ("products bf16", 64): REPEATS,
    }
    images_per_second, rate = 48 / latency.median("pass bf16", 48), 3 * 2 * 64**3 / latency.median("products bf16", 64)
    operations = 2 * (8 * 9 * 16 + 128 * 16)  # 8 kernels of 3×3 at 4×4 places, and the Linear layer before the head
    assert figures == {
        "images_per_second": pytest.approx(images_per_second),
        "bf16_tflops": pytest.approx(rate / 1e12),
        "pass_of_bf16_rate": pytest.approx(images_per_second * operations / rate),
    }
    print_latency(latency)
    assert "pass_of_bf16_rate" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_timing_on_a_gpu_waits_for_it():
    factor = torch.randn(4096, 4096, device="cuda")
    latency = Latency(machine={}, device="cuda")
    for path in ("warm-up", "queued"):
        latency.time(path, 1, lambda: [factor @ factor for _ in range(50)])
    latency.time("nothing", 1, lambda: None)
    assert latency.median("queued", 1) > 0.005  # 7 · 10¹² operations
    assert latency.median("nothing", 1) < latency.median("queued", 1) / 5


# ---- refusals


def test_too_few_exemplars_are_refused(monkeypatch):
    monkeypatch.setitem(PRESETS, "paper", QUICK)
    with pytest.raises(InputError, match="expected at least 16 exemplars to time queries with, got 15"):
        LatencyBench(digits(15), make_classifier())


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_folder_that_is_missing_is_told_before_anything_is_read(tmp_path, option):
    result = run("bench", "latency", tmp_path / "nothing", "--model", "resnet18", option, tmp_path / "no" / "file")
    assert result.exit_code == 1
    assert "file: its folder does not exist" in result.stderr


def test_bench_shows_its_commands_and_examples():
    assert "latency" in run("bench", "--help").stdout
    assert "Examples:" in run("bench", "latency", "--help").stdout


# ---- memory


def test_peak_memory_sees_what_came_and_went():
    reset_peak_memory()
    before = memory_mib()
    assert peak_memory_mib() == pytest.approx(before, abs=8)
    block = mmap(-1, 64 << 20)  # of its own: malloc may hand out what the process holds already
    block.write(bytes(64 << 20))
    assert memory_mib() > before + 60
    block.close()
    assert before + 60 < peak_memory_mib() < before + 160
    reset_peak_memory()
    assert peak_memory_mib() == pytest.approx(memory_mib(), abs=8)  # the system may take its time to take pages back


def test_random_images_are_the_same_every_time():
    source = RandomImages(25)
    first, second = ([record.image for record in source.read((1, 28, 28))] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(first) == len(source) == 25
    assert source.natural_shape() == (1, 28, 28)
    assert len({image.tobytes() for image in first}) == 25
    assert {record.label for record in source.read((1, 28, 28))} == set(range(10))


@pytest.mark.slow
def test_the_peak_of_a_build_hardly_grows_with_its_size():
    small, large = peak_of_build(1_000), peak_of_build(3_000)
    assert small > 0.0
    assert large < small + 30.0
