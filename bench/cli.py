"""The commands `engine bench …`. Nothing heavy is imported before one runs."""

from pathlib import Path
from typing import Any

import click

from tmm_engine.bench.options import check_folders
from tmm_engine.bench.registry import SUMMARIES, load
from tmm_engine.cli.options import device_option, source_options


class _Benchmark(click.Command):
    """Known by its name and its summary: the real command is imported when it is to run, or to show its help."""

    def __init__(self, name: str) -> None:
        super().__init__(name, short_help=SUMMARIES[name])
        self._name = name

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        return load(self._name).command.make_context(*args, **kwargs)


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


for name in SUMMARIES:
    bench.add_command(_Benchmark(name))
