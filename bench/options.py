"""Options that several commands of `engine bench` share. Nothing heavy is imported."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmm_engine.cli.options import Command, device_option, joined, numbers, source_options
from tmm_engine.index.errors import InputError

if TYPE_CHECKING:
    from tmm_engine.index.models.classifier import Classifier
    from tmm_engine.index.sources.records import ImageSource

classifier_options = joined(
    click.option("--model", metavar="NAME", required=True, help="Architecture, as for build-index."),
    click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint, as for build-index."),
    click.option("--mean", callback=numbers, metavar="R,G,B", help="As for build-index."),
    click.option("--std", callback=numbers, metavar="R,G,B", help="As for build-index."),
    source_options,
    device_option,
)


def sized(*, exemplars: int, queries: int) -> Callable[[Command], Command]:
    """Options for the data set, the classifier, and how much of it is measured by default."""
    return joined(
        classifier_options,
        click.option(
            "--exemplars", type=click.IntRange(min=2), default=exemplars, show_default=True, help="A random subset."
        ),
        click.option("--queries", type=click.IntRange(min=1), default=queries, show_default=True, help="Random ones."),
        click.option(
            "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of subset, queries, noise."
        ),
        click.option("--name", help="The data set's name in the report. Default: as the source calls itself."),
    )


query_options = joined(
    click.option("--query-split", help="Split that held-out queries are from. Default: test, if they are from SOURCE."),
    click.option("--query-source", help="Where held-out queries are from instead of SOURCE."),
)


def check_folders(*files: Path | None) -> None:
    """Before the first measurement, not after the last."""
    for path in files:
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: its folder does not exist; create it first")


def opened(source: str, options: dict[str, Any]) -> "tuple[ImageSource, Classifier]":
    """The source and the classifier that the options name."""
    from tmm_engine.backends import choose_device
    from tmm_engine.index.models.classifier import Classifier
    from tmm_engine.index.sources.opening import open_source

    images = open_source(source, split=options["split"], root=options["root"], limit=options["limit"])
    classifier = Classifier.from_architecture(
        options["model"],
        image_shape=images.natural_shape(),
        weights=options["weights"],
        mean=options["mean"],
        std=options["std"],
    )
    return images, classifier.to(choose_device(options["device"]))
