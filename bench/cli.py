"""The commands `engine bench …`. Nothing heavy is imported before one runs."""

from pathlib import Path
from typing import Any

import click

from engine.cli import device_option, source_options


@click.group()
def bench() -> None:
    """Measure the engine, honestly.

    \b
    Example:
      engine bench latency mnist --root data --model resnet18 --weights mnist.safetensors --json latency.json
    """


@bench.command()
@click.argument("source")
@click.option("--model", metavar="NAME", required=True, help="Architecture, as for build-index.")
@click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint, as for build-index.")
@source_options
@device_option
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Timings of each path.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write raw records, machine and versions.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a picture of time against exemplars.")
def latency(source: str, **options: Any) -> None:
    """Time every path side by side in one run over the exemplars in SOURCE: medians, spreads, ratios.

    \b
    Examples:
      engine bench latency mnist --root data --model resnet18 --weights mnist.safetensors
      engine bench latency photos/ --model resnet18 --weights w.safetensors --repeats 3 --json l.json --plot l.png
    """
    from bench.latency import LatencyBench
    from bench.latency_report import plot_growth, print_latency
    from engine.display import progress_bar
    from engine.engine import choose_device
    from index.classifier import Classifier
    from index.sources import open_source

    images = open_source(source, split=options["split"], root=options["root"], limit=options["limit"])
    classifier = Classifier.from_architecture(
        options["model"], image_shape=images.natural_shape(), weights=options["weights"]
    ).to(choose_device(options["device"]))
    with progress_bar() as progress:
        measured = LatencyBench(images, classifier, repeats=options["repeats"], progress=progress).run()
    print_latency(measured)
    if options["json_path"]:
        measured.save(options["json_path"])
    if options["plot"]:
        plot_growth(measured, options["plot"])
