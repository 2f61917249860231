"""Options that several commands of `engine bench` share. Nothing heavy is imported."""

from collections.abc import Callable
from pathlib import Path

import click

from tmm_engine.cli.options import Command, device_option, joined, numbers, source_options
from tmm_engine.index.errors import InputError

BASELINES = "l2;cosine;robust"
FEW_PERTURBATIONS = "clean,brightness 0.5,gaussian 2.5,gaussian 5"

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
methods_option = click.option(
    "--methods",
    default=BASELINES,
    show_default=True,
    help="Separated by semicolons: l2, cosine, robust, a preset; with settings: 'cosine,stretch=true;robust,views=1'.",
)
k_option = click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="Neighbours looked at.")
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Records as JSON lines; a rerun goes on with them. Global triggers are kept beside them, in .triggers.",
)
perturbations_option = click.option(
    "--perturbations",
    default=FEW_PERTURBATIONS,
    show_default=True,
    help="Of the queries, each a family and a level, separated by commas.",
)
suite_options = joined(sized(exemplars=2000, queries=50), methods_option, k_option, out_option)
held_out_options = joined(sized(exemplars=2000, queries=50), query_options)


def check_folders(*files: Path | None) -> None:
    """Before the first measurement, not after the last."""
    for path in files:
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: its folder does not exist; create it first")
