"""`engine bench scale`: small indexes, drawn as the large ones; figures are what the records say; runs go on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_engine_cli import run
from tmm_engine.bench import scale
from tmm_engine.bench.benchmarks.scale import figures_of, plot_scale
from tmm_engine.bench.drawn import Drawn
from tmm_engine.bench.records import read_records


def test_the_same_exemplars_are_drawn_whatever_comes_after():
    few, many = (Drawn(count, 32).chunk(0) for count in (8192, 20_000))
    np.testing.assert_array_equal(few[0], many[0])
    images = few[0].reshape(8192, 32).astype(np.float64)
    assert (images.min(axis=1) == 0).all()
    assert (images.max(axis=1) == 255).all()
    assert [len(Drawn(20_000, 32).chunk(number)[0]) for number in range(3)] == [8192, 8192, 3616]
    features = images[:, 2:] - images[:, 2:].mean(0)
    means = np.stack([features[few[1] == label].mean(0) for label in range(10)])
    within = ((features - means[few[1]]) ** 2).sum() / (features**2).sum()
    assert within < 0.5


def record(n: int, path: str, *seconds: float, **more: Any) -> dict[str, Any]:
    return {"exemplars": n, "dimension": 32, "path": path, "seconds": [*seconds]} | more


def test_figures_are_ratios_of_medians_and_the_picture_shows_them(tmp_path: Path):
    tuned = {"recall_clean": 0.99, "recall_noise": 0.98}
    records = [
        record(60_000, "faiss flat", 1.0, 9.0, 2.0),
        record(60_000, "default", 3.0, 3.0, 8.0),
        record(60_000, "one client", 1.0),
        record(60_000, "two clients", 2.5),
        record(600_000, "default", 30.0),
        record(1_000_000, "opened", 4.0, open_s=4.0),
        record(1_000_000, "opened, memory=2GiB", 3.0, memory_mib=1536.0),
        record(10_000_000, "opened, approximate", 5.0, open_s=5.0, memory_mib=10_240.0),
        record(1_000_000, "approximate, IVF8,SQ8", 0.1, exact_seconds=[2.0], faiss_seconds=[0.05], tuned=tuned),
    ]
    few, _, many, approximate, most, growth = figures_of(records)
    assert (few["default_over_faiss"], few["two_over_one"], few["default_p50_ms"]) == (1.5, 2.5, 3000.0)
    assert (many["open_1m_s"], many["memory_1m_gib"]) == (4.0, 1.5)
    assert most == {"exemplars": 10_000_000, "dimension": 32, "open_10m_s": 5.0, "memory_10m_gib": 10.0}
    assert approximate == {
        "exemplars": 1_000_000, "dimension": 32, "path": "approximate, IVF8,SQ8",
        "approximate_over_exact": 0.05, **tuned, "approximate_over_faiss": 2.0,
    }  # fmt: skip
    assert growth == {"dimension": 32, "slope": pytest.approx(1.0)}
    plot_scale(records, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_measures_prints_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scale, "EACH", 2)
    monkeypatch.setattr("tmm_engine.bench.benchmarks.scale.EXACT_UP_TO", 1024)
    monkeypatch.setattr(scale, "CANDIDATES", 50)
    monkeypatch.setattr(scale, "opened_alone", lambda *_: {"open_s": 0.5, "first_s": 1.0, "memory_mib": 512.0})
    asked = ("bench", "scale", "--sizes", "512,1024,2048", "--dimension", 32, "--repeats", 2, "--factory", "IVF8,SQ8",
             "--out", tmp_path / "scale.jsonl", "--folder", tmp_path / "indexes", "--json")  # fmt: skip
    done = run(*asked, "--plot", tmp_path / "scale.png")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    ratios = {"default_over_faiss", "default_batch_over_faiss", "two_over_one", "candidates_over_default"}
    of_512 = next(line for line in lines if line["exemplars"] == 512)
    assert ratios | {"default_p50_ms", "default_p99_ms", "open_0k_s"} <= of_512.keys()
    assert of_512["memory_0k_gib"] == 0.5
    paths = {line["path"]: line for line in lines if line.get("exemplars") == 1024 and "path" in line}
    assert paths.keys() == {"default, fp16", "default, int8", "approximate, IVF8,SQ8"}
    assert paths["approximate, IVF8,SQ8"].keys() >= {"approximate_over_exact", "recall_clean", "recall_noise"}
    assert paths["default, fp16"]["recall_clean"] > 0.95
    assert next(line for line in lines if line.get("exemplars") == 2048).keys() >= {"open_2k_s", "memory_2k_gib"}
    assert -2 < lines[-1]["slope"] < 2
    assert (tmp_path / "scale.png").stat().st_size > 1000
    records = read_records(tmp_path / "scale.jsonl").records
    assert len(next(own for own in records if own["path"] == "default")["seconds"]) == 2
    assert {own["path"] for own in records if own["exemplars"] == 512} >= {"build", "opened", "faiss flat", "8 clients"}
    again = run(*asked[:-1])
    assert f"exemplars 512, dimension 32, default_over_faiss {of_512['default_over_faiss']:.4g}" in again.stdout
    assert read_records(tmp_path / "scale.jsonl").records == records


@pytest.mark.parametrize(
    ("given", "why"),
    [(("--sizes", "many"), "whole numbers"), (("--sizes", "100"), "at least 512"), (("--dimension", 40), "16")],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, given: tuple[object, ...], why: str):
    done = run("bench", "scale", "--out", tmp_path / "scale.jsonl", *given)
    assert done.exit_code == 1
    assert why in done.stderr
