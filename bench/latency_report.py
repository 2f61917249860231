"""A latency run as tables and a picture."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tmm_engine.bench.latency import Latency
from tmm_engine.describing import DEFAULT_VIEWS
from tmm_engine.index.errors import InputError

BARS = {  # figure -> (bound, whether it is a lower one)
    "exact_over_forward": (1.15, False),
    "exact_over_forward_and_trigger": (1.5, False),
    "bf16_over_fp32_forward": (0.65, False),
    "bf16_agreement": (0.98, True),
    "reference_over_exact": (4.0, True),
    "trigger_over_eager": (0.5, False),
    "batched_trigger": (0.4, False),
    "candidates_over_exact": (0.15, False),
    "global_over_exact": (0.03, False),
    "peak_mib": (600.0, False),
    "slope": (1.05, False),
    "l2_over_faiss": (1.5, False),
    "cosine_over_faiss": (1.5, False),
    "build_over_forward": (0.8, True),
    "build_passes": (1.1 * (1 + DEFAULT_VIEWS), False),
    "robust_over_faiss": (3.0, False),
    "photographs_build_over_slower_part": (0.8, True),
}


def print_latency(latency: Latency) -> None:
    """Paths with median and spread, then figures beside their bars, on stdout."""
    console = Console()
    table = Table("path", "exemplars", "median", "fastest", "slowest", "times", box=None, title_justify="left")
    for path, exemplars in latency.paths():
        seconds = latency.seconds(path, exemplars)
        cells = (f"{1000 * value:,.1f} ms" for value in (np.median(seconds), min(seconds), max(seconds)))
        table.add_row(path, f"{exemplars:,}", *cells, str(len(seconds)))
    console.print(table)
    figures = Table("figure", "value", "bar", "", box=None)
    for name, value in latency.figures.items():
        bound, lower = BARS.get(name, (None, False))
        met = "" if bound is None else "met" if (value >= bound if lower else value <= bound) else "missed"
        bar = "" if bound is None else f"{'≥' if lower else '≤'} {bound:g}"
        figures.add_row(name, f"{value:,.4g}", bar, met)
    console.print()
    console.print(figures)
    machine = latency.machine
    console.print(f"\n{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")


def plot_growth(latency: Latency, path: Path) -> None:
    """Time against the number of exemplars, log-log, with the fitted slope.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need the 'bench' extra: pip install 'tmm-engine[bench]'") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    slope = latency.figures.get("slope")  # none for a single size
    paths = {
        "exact by size": "exact" if slope is None else f"exact, slope {slope:.2f}",
        "candidates": "1,000 candidates",
        "global": "global trigger",
    }
    for name, label in paths.items():
        sizes = [exemplars for found, exemplars in latency.paths() if found == name]
        medians = [latency.median(name, size) for size in sizes]
        spread = [
            [median - min(latency.seconds(name, size)) for median, size in zip(medians, sizes, strict=True)],
            [max(latency.seconds(name, size)) - median for median, size in zip(medians, sizes, strict=True)],
        ]
        axes.errorbar(sizes, medians, yerr=spread, marker="o", capsize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="exemplars", ylabel="seconds a query, trigger included")
    sizes = sorted({exemplars for name, exemplars in latency.paths() if name in paths})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
