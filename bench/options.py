"""Options that several commands of `engine bench` share. Nothing heavy is imported."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.options import device_option, joined, numbers, source_options
from index.errors import InputError

if TYPE_CHECKING:
    from index.classifier import Classifier
    from index.sources import ImageSource

classifier_options = joined(
    click.option("--model", metavar="NAME", required=True, help="Architecture, as for build-index."),
    click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint, as for build-index."),
    click.option("--mean", callback=numbers, metavar="R,G,B", help="As for build-index."),
    click.option("--std", callback=numbers, metavar="R,G,B", help="As for build-index."),
    source_options,
    device_option,
)


def check_folders(*files: Path | None) -> None:
    """Before the first measurement, not after the last."""
    for path in files:
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: its folder does not exist; create it first")


def opened(source: str, options: dict[str, Any]) -> "tuple[ImageSource, Classifier]":
    """The source and the classifier that the options name."""
    from engine.backends import choose_device
    from index.classifier import Classifier
    from index.sources import open_source

    images = open_source(source, split=options["split"], root=options["root"], limit=options["limit"])
    classifier = Classifier.from_architecture(
        options["model"],
        image_shape=images.natural_shape(),
        weights=options["weights"],
        mean=options["mean"],
        std=options["std"],
    )
    return images, classifier.to(choose_device(options["device"]))
