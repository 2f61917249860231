"""How does every path grow with the number of exemplars? Beside FAISS called directly, on drawn features."""

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from tmm_engine.bench.benchmark import Benchmark
from tmm_engine.bench.drawn import build_drawn
from tmm_engine.bench.options import check_folders, out_option
from tmm_engine.bench.records import Record, RecordFile, describe_run, read_records
from tmm_engine.bench.scale import BATCH, EXACT_UP_TO, RECALL, REDUCED_UP_TO, Measured
from tmm_engine.cli.display import progress_bar
from tmm_engine.index.errors import InputError
from tmm_engine.index.progress import Progress, silent

SIZES = "10000,60000,100000,1000000"
KEY = ("exemplars", "dimension", "path")
BARS: dict[str, tuple[int | None, float]] = {
    "default_over_faiss": (60_000, 2.5),
    "default_batch_over_faiss": (60_000, 3.0),
    "two_over_one": (60_000, 2.5),
    "candidates_over_default": (1_000_000, 0.5),
    "approximate_over_exact": (1_000_000, 0.05),
    "memory_1m_gib": (None, 2.2),
    "memory_10m_gib": (None, 14.0),
    "open_1m_s": (None, 5.0),
    "slope": (None, 1.05),
}
"""What each figure is to be at most, and with how many exemplars, where that matters."""


@click.command("scale")
@click.option(
    "--sizes",
    default=SIZES,
    show_default=True,
    help="Numbers of exemplars; of more than 2,000,000 approximate search alone, in 14 GiB. 10000000 takes 75 GB.",
)
@click.option("--dimension", type=click.IntRange(min=32), default=512, show_default=True, help="Of φ, 16 divides it.")
@click.option("--approximate/--exact-only", default=True, help="Build approximate indexes too; HNSW takes long.")
@click.option("--factory", "factories", multiple=True, help="FAISS factory strings instead of the usual; repeatable.")
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Of single searches.")
@click.option("--memory", default="2GiB", show_default=True, help="Bound under which memory is counted.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the indexes there, for another run.")
@out_option
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON, one object a line.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a picture of time against exemplars, log-log.")
def command(sizes: str, out: Path, *, as_json: bool, plot: Path | None, **options: Any) -> None:
    """How does every path grow with the number of exemplars? Features are drawn as a trained network's lie.

    Each path runs beside FAISS called directly, in turn. A run that was interrupted goes on where it stopped.

    \b
    Examples:
      engine bench scale --out scale.jsonl --plot scale.png
      engine bench scale --sizes 10000,60000 --factory IVF1024,SQ8 --out scale.jsonl --json
    """
    check_folders(out, plot)
    try:
        counts = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise InputError(f"sizes: expected whole numbers separated by commas, got {sizes!r}") from None
    dimension = options["dimension"]
    if dimension % 16 or min(counts) < 2 * BATCH:
        raise InputError(f"expected a dimension that 16 divides, and at least {2 * BATCH} exemplars")
    settings = {"benchmark": "scale", "data_set": "drawn", **options, **describe_run()}
    settings["folder"] = str(options["folder"])
    with (
        progress_bar() as progress,
        RecordFile.open(out, settings, KEY, ("benchmark", "data_set")) as records,
    ):
        measure_scale(records, counts, progress=progress, **options)
    found = read_records(out).records
    for line in figures_of(found):
        click.echo(json.dumps(line) if as_json else _said(line))
    if plot:
        plot_scale(found, plot)


def measure_scale(
    records: RecordFile,
    sizes: Sequence[int],
    *,
    dimension: int,
    approximate: bool = True,
    factories: Sequence[str] = (),
    repeats: int = 20,
    memory: str = "2GiB",
    folder: Path | None = None,
    progress: Progress = silent,
) -> None:
    """Every path over indexes of these sizes; one record for each, but for those that are there."""
    with _kept(folder) as kept:
        for number, n in enumerate(sizes):
            progress("sizes", number, len(sizes))
            path = kept / f"drawn-{n}-{dimension}.idx"
            run = Measured(records, path, n=n, dimension=dimension, repeats=repeats)
            if not path.exists():
                run.once("build", partial(build_drawn, path, exemplars=n, dimension=dimension))
            if n > EXACT_UP_TO:
                if approximate:
                    run.large(factories)
                continue
            run.opened(memory)
            run.searched()
            if n <= REDUCED_UP_TO:
                run.reduced()
            if approximate:
                run.approximate(factories)
        progress("sizes", len(sizes), len(sizes))


def figures_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Ratios of medians, an object for each number of exemplars and each approximate index, and the growth."""
    lines: list[dict[str, Any]] = []
    for n, d in sorted({(record["exemplars"], record["dimension"]) for record in records}):
        own = {record["path"]: record for record in records if (record["exemplars"], record["dimension"]) == (n, d)}
        lines.append({"exemplars": n, "dimension": d} | _ratios(own) | _percentiles(own) | _opened(own, n))
        for path, record in own.items():
            if "exact_seconds" in record:
                lines.append({"exemplars": n, "dimension": d, "path": path} | _beside_exact(record))
    for d in sorted({record["dimension"] for record in records}):
        defaults = [record for record in records if (record["path"], record["dimension"]) == ("default", d)]
        points = sorted((record["exemplars"], statistics.median(record["seconds"])) for record in defaults)
        if len(points) > 1:
            n, seconds = np.log(np.array(points)).T
            lines.append({"dimension": d, "slope": float(np.polyfit(n, seconds, 1)[0])})
    return lines


def _ratios(own: dict[str, Record]) -> dict[str, float]:
    medians = {path: statistics.median(record["seconds"]) for path, record in own.items()}
    ratios = {
        "default_over_faiss": ("default", "faiss flat"),
        "default_batch_over_faiss": (f"default, {BATCH}", f"faiss flat, {BATCH}"),
        "two_over_one": ("two clients", "one client"),
        "candidates_over_default": ("1,000 candidates", "default beside candidates"),
    }
    return {
        name: medians[path] / medians[base] for name, (path, base) in ratios.items() if {path, base} <= medians.keys()
    }


def _percentiles(own: dict[str, Record]) -> dict[str, float]:
    if "default" not in own:
        return {}
    p50, p99 = 1e3 * np.percentile(own["default"]["seconds"], (50, 99))
    return {"default_p50_ms": float(p50), "default_p99_ms": float(p99)}


def _opened(own: dict[str, Record], n: int) -> dict[str, float]:
    size = f"{n // 1_000_000}m" if n >= 1_000_000 else f"{n // 1000}k"
    found = {}
    for path, record in own.items():
        if path in ("opened", "opened, approximate"):
            found[f"open_{size}_s"] = record["open_s"]
        if path.startswith(("opened, memory", "opened, approximate")):
            found[f"memory_{size}_gib"] = record["memory_mib"] / 1024
    return found


def _beside_exact(record: Record) -> dict[str, float]:
    over = statistics.median(record["seconds"]) / statistics.median(record["exact_seconds"])
    if "tuned" not in record:
        return {"reduced_over_exact": over, "recall_clean": record["recall_clean"]}
    tuned = record["tuned"]
    return {
        "approximate_over_exact": over,
        "recall_clean": tuned["recall_clean"],
        "recall_noise": tuned["recall_noise"],
        "approximate_over_faiss": statistics.median(record["seconds"]) / statistics.median(record["faiss_seconds"]),
    }


def _said(line: dict[str, Any]) -> str:
    """As people read it: the bar where there is one for so many exemplars."""
    words = []
    for name, value in line.items():
        wanted, bar = BARS.get(name, (None, None))
        counts = bar is not None and wanted in (None, line.get("exemplars"))
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        words.append(f"{name} {shown}" + (f" (bar {bar:g})" if counts else ""))
    return ", ".join(words)


def plot_scale(records: Sequence[Record], path: Path) -> None:
    """Median seconds of single searches against the number of exemplars, log-log.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the picture needs the 'bench' extra: pip install 'tmm-engine[bench]'") from None
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    lines = {
        "faiss flat": "FAISS flat, cosine",
        "cosine": "cosine",
        "default": "default, exact",
        "1,000 candidates": "TMM-NN, 1,000 candidates",
        f"faiss flat, {BATCH}": f"FAISS flat, {BATCH} queries",
        f"default, {BATCH}": f"default, {BATCH} queries",
    }
    for kind, said in lines.items():
        points = [(own["exemplars"], statistics.median(own["seconds"])) for own in records if own["path"] == kind]
        if points:
            axes.loglog(*zip(*sorted(points), strict=True), marker="o", label=said)
    best: dict[int, float] = {}
    for own in records:
        if "tuned" in own and min(own["tuned"]["recall_clean"], own["tuned"]["recall_noise"]) >= RECALL:
            best[own["exemplars"]] = min(own["seconds"][0], best.get(own["exemplars"], np.inf))
    if best:
        points = sorted(best.items())
        axes.loglog(
            *zip(*points, strict=True), marker="s", color="black", label=f"default, approximate, recall ≥ {RECALL}"
        )
    axes.set(xlabel="exemplars", ylabel="seconds, median")
    axes.grid(which="both", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


@contextmanager
def _kept(folder: Path | None) -> Iterator[Path]:
    """A folder for indexes: the one that is named, or one that goes."""
    if folder is not None:
        folder.mkdir(exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


BENCHMARK = Benchmark(command)
