"""How long does every path take? The command; what it times is in `bench.latency`."""

from pathlib import Path
from typing import Any

import click

from tmm_engine.bench.benchmark import Benchmark
from tmm_engine.bench.latency import LatencyBench
from tmm_engine.bench.latency_report import plot_growth, print_latency
from tmm_engine.bench.loading import opened
from tmm_engine.bench.options import check_folders, classifier_options
from tmm_engine.cli.display import progress_bar


@click.command("latency")
@click.argument("source")
@classifier_options
@click.option(
    "--only",
    metavar="GROUP,…",
    default="",
    help="Of neighbours, triggers, forward, growth, agreement, reference, build, photographs.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Timings of each path.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write raw records, machine and versions.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a picture of time against exemplars.")
def command(source: str, **options: Any) -> None:
    """How long does every path take? Side by side, in one run, over SOURCE's exemplars: medians, spreads, ratios.

    \b
    Examples:
      engine bench latency mnist --root data --model resnet18 --weights mnist.safetensors
      engine bench latency photos/ --model resnet18 --weights w.safetensors --repeats 3 --json l.json --plot l.png
    """
    check_folders(options["json_path"], options["plot"])
    only = [name.strip() for name in options["only"].split(",") if name.strip()]
    images, classifier = opened(source, options)
    with progress_bar() as progress:
        measured = LatencyBench(images, classifier, repeats=options["repeats"], progress=progress).run(only)
    print_latency(measured)
    if options["json_path"]:
        measured.save(options["json_path"])
    if options["plot"]:
        plot_growth(measured, options["plot"])


BENCHMARK = Benchmark(command)
