"""The commands `engine bench …`. Nothing heavy is imported before one runs."""

from pathlib import Path
from typing import Any

import click

from tmm_engine.bench.judge_cli import oracle, semantic
from tmm_engine.bench.options import check_folders, classifier_options, opened, sized
from tmm_engine.bench.quality_cli import (
    ablation,
    ood,
    out_option,
    parse_few,
    parse_methods,
    perturbations_option,
    radius,
    robustness,
)
from tmm_engine.cli.options import device_option, source_options
from tmm_engine.index.errors import IndexStateError


@click.group()
def bench() -> None:
    """Measure the engine, honestly.

    \b
    Example:
      engine bench latency mnist --root data --model resnet18 --weights mnist.safetensors --json latency.json
    """


@bench.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", metavar="NAME", default="resnet18", show_default=True, help="torchvision's, or vit_tiny_32.")
@click.option("--small-stem", is_flag=True, help="First convolution 3×3 with stride 1: better for small images.")
@click.option("--epochs", type=click.IntRange(min=1), default=6, show_default=True)
@click.option("--batch", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--lr", type=float, default=2e-3, show_default=True, help="Largest of the one-cycle schedule.")
@click.option("--flip/--no-flip", default=False, help="Mirror half of the images: not for digits or signs.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--test-source", help="Where to measure accuracy. Default: the split 'test' of SOURCE.")
@source_options
@device_option
def train(source: str, out: Path, **options: Any) -> None:
    """Train a classifier on the labelled images in SOURCE, write it to OUT (safetensors), print its accuracy.

    \b
    Examples:
      engine bench train mnist mnist.safetensors --root data --epochs 3
      engine bench train cifar10/ cifar10.safetensors --split train --small-stem --flip
      engine bench train photos/ photos.safetensors --test-source more-photos/
    """
    from tmm_engine.backends import choose_device
    from tmm_engine.bench.train import LabelledImages, TrainConfig, accuracy, train_classifier
    from tmm_engine.cli.display import progress_bar
    from tmm_engine.index.sources.opening import open_source

    check_folders(out)
    names = ("small_stem", "epochs", "batch", "lr", "flip", "seed")
    config = TrainConfig(architecture=options["model"], **{name: options[name] for name in names})
    apart = options["test_source"] is not None  # then SOURCE need not have splits: it may be a folder
    held_out = open_source(options["test_source"] or source, split=None if apart else "test", root=options["root"])
    split = options["split"] or (None if apart else "train")
    images = open_source(source, split=split, root=options["root"], limit=options["limit"])
    with progress_bar() as progress:
        test = LabelledImages.read(held_out, progress=progress)
        data = LabelledImages.read(images, progress=progress)
        classifier = train_classifier(data, config, device=choose_device(options["device"]), progress=progress)
        classifier.save(out)
    share = accuracy(classifier, test)
    click.echo(f"{out}: {share:.2%} of the {len(test):,} images of {held_out.name}, trained on {len(data):,}")


@bench.command()
@click.argument("source")
@classifier_options
@click.option(
    "--only",
    metavar="GROUP,…",
    default="",
    help="Of neighbours, triggers, forward, growth, agreement, reference, build.",
)
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
    from tmm_engine.bench.latency import LatencyBench
    from tmm_engine.bench.latency_report import plot_growth, print_latency
    from tmm_engine.cli.display import progress_bar

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


@bench.command()
@click.argument("source")
@sized(exemplars=10_000, queries=20)
@perturbations_option
@out_option
def candidates(source: str, **options: Any) -> None:
    """Measure what candidate sets and the global trigger give up against exact search with the query's trigger.

    \b
    Example:
      engine bench candidates mnist --root data --model resnet18 --weights mnist.safetensors --out candidates.jsonl
    """
    from tmm_engine.bench.candidates import KEY, measure_candidates, print_candidates
    from tmm_engine.bench.loading import load_suite
    from tmm_engine.bench.records import read_records
    from tmm_engine.cli.display import progress_bar

    perturbations, methods = parse_few(options["perturbations"]), parse_methods("paper")
    check_folders(options["out"])
    with progress_bar() as progress:
        suite = load_suite(source, options, progress)
        queries = suite.queries(options["queries"])
        with suite.records(options["out"], "candidates", methods, KEY) as records:
            measure_candidates(suite, queries, perturbations, records, progress=progress)
    print_candidates(read_records(options["out"]).records)


@bench.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for page and pictures. Default: FOLDER/report.")
def report(folder: Path, out: Path | None) -> None:
    """Turn all records (*.jsonl) in FOLDER into one page of Markdown with tables, intervals and plots.

    \b
    Example:
      engine bench report runs --out report
    """
    from tmm_engine.bench.report import write_report

    for written in write_report(folder, out or folder / "report"):
        click.echo(written)


@bench.command()
@click.option("--trials", type=click.IntRange(min=0), default=200, show_default=True, help="Writers killed.")
@click.option("--cases", type=click.IntRange(min=0), default=2100, show_default=True, help="Hostile inputs generated.")
@click.option("--searches", type=click.IntRange(min=1), default=500, show_default=True, help="In one process.")
@click.option("--rows", type=click.IntRange(min=10), default=2000, show_default=True, help="That a filter leaves.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def reliability(*, as_json: bool, **options: int) -> None:
    """Kill writers, damage files, fill disks, feed hostile input; count what was lost or wrong. Exit code 1 if any.

    \b
    Examples:
      engine bench reliability --json
      engine bench reliability --trials 10 --cases 70 --searches 50 --rows 200
    """
    from tmm_engine.bench.reliability.bench import ReliabilityBench, print_reliability
    from tmm_engine.cli.display import progress_bar

    with progress_bar() as progress:
        result = ReliabilityBench(**options, progress=progress).run()
    print_reliability(result, as_json=as_json)
    if result.failures:
        raise IndexStateError(f"{len(result.failures)} failures, see above")


for command in (robustness, radius, semantic, oracle, ablation, ood):
    bench.add_command(command)
