"""The command classify. Nothing heavy is imported early."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmm_engine.cli.options import (
    MODES,
    cache_option,
    device_option,
    model_option,
    opened_source,
    ratio,
    source_options,
)
from tmm_engine.cli.output import echo_json
from tmm_engine.index.errors import InputError

if TYPE_CHECKING:
    from tmm_engine.classifying.classification import Classification, Classifications
    from tmm_engine.engine import Engine
    from tmm_engine.index.progress import Progress
    from tmm_engine.query import Query
    from tmm_engine.results import FailedQuery


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, metavar="[IMAGE]...", type=click.Path(path_type=Path))
@click.option(
    "--calibration",
    metavar="SOURCE",
    help="Labelled images, as build-index takes them, that neither INDEX nor the model's training has seen: answers "
    "are held to them, now and later.",
)
@click.option("--name", help="Of the calibration that INDEX keeps. Default: the mode's.")
@click.option("--leave-one-out", is_flag=True, help="Go by the exemplars themselves, even where a calibration is kept.")
@source_options
@click.option(
    "--mode", type=click.Choice(MODES), default="robust", show_default=True, help="What ranks the neighbours."
)
@click.option(
    "-k", type=click.IntRange(min=1), default=10, show_default=True, help="Exemplars of each class that are looked at."
)
@click.option("--alpha", type=float, default=0.05, show_default=True, help="How often a set may miss the right class.")
@click.option(
    "--outliers",
    type=float,
    default=0.01,
    show_default=True,
    help="Unlike everything is what at most this share of calibration images is as far from its nearest class.",
)
@click.option("--where", metavar="SQL", help="Only exemplars that match, as of search.")
@click.option("--stretch/--no-stretch", default=None, help="As of search.")
@click.option("--recognition", callback=ratio, metavar="RATIO|off", help="As of search.")
@click.option("--preset", help="tmm: as of search.")
@click.option("--explain", is_flag=True, help="Say why, in --json: see search.")
@cache_option
@click.option("--json", "as_json", is_flag=True, help="One JSON line per image instead of a table.")
@click.option("--out", type=click.Path(path_type=Path), help="Write a Parquet file with a row for every image.")
@model_option
@device_option
def classify(index: Path, images: tuple[Path, ...], **options: Any) -> None:
    """Say the class of each IMAGE (files or folders) by its neighbours in INDEX, and how far to trust it.

    Credibility is small where an image is like nothing of any class, confidence where another class is as likely. The
    set holds the right class as often as --alpha says, of images like those of --calibration. What is unlike
    everything, or has not exactly one class in its set, is marked: no answer.

    \b
    Examples:
      engine classify photos.idx query.png
      engine classify photos.idx queries/ --calibration held-out/ --alpha 0.1 --json
      engine classify photos.idx --calibration held-out/ --mode cosine --name november
      engine classify photos.idx queries/ --mode cosine --name november --out classes.parquet
    """
    from tmm_engine.cli.display import progress_bar
    from tmm_engine.engine import Engine
    from tmm_engine.results import FailedQuery

    _check(images, options)
    asked = _asked(options)
    with (
        Engine.open(
            index, model=options["model"], device=options["device"], cache_bytes=options["cache_images"]
        ) as engine,
        progress_bar() as progress,
    ):
        if options["calibration"] is not None:
            _calibrate(engine, index, asked, options, progress)
        answers = _answers(engine, images, asked, options, progress) if images else []
    _show(answers, options)
    failed = sum(isinstance(answer, FailedQuery) for answer in answers)
    if failed:
        raise InputError(f"{failed} of {len(answers)} images could not be classified; see their places")


def _check(images: tuple[Path, ...], options: dict[str, Any]) -> None:
    """Refuse what has no effect, and thresholds out of range, before anything is opened."""
    from tmm_engine.classifying.classifying import Doubt

    if not images and options["calibration"] is None:
        raise click.UsageError("nothing to do: give image files or folders, or --calibration")
    if options["leave_one_out"] and (options["name"] or options["calibration"]):
        raise click.UsageError("--leave-one-out goes without a calibration: leave out --calibration and --name")
    for name in ("split", "root", "image_column", "label_column"):
        if options[name] is not None and options["calibration"] is None:
            raise click.UsageError(f"--{name.replace('_', '-')} has no effect without --calibration")
    if not images and (options["out"] or options["as_json"]):
        raise click.UsageError("--out and --json have no effect without images")
    if options["preset"] and options["mode"] != "tmm":
        raise click.UsageError(f"--preset has no effect with --mode {options['mode']}: it is an option of tmm")
    out = options["out"]
    if out is not None and out.suffix.lower() != ".parquet":
        raise click.UsageError(f"--out: expected a file name that ends in .parquet, got {out.name}")
    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"{out}: its folder does not exist; create it first")
    Doubt(alpha=options["alpha"], outliers=options["outliers"])


def _asked(options: dict[str, Any]) -> Any:
    from tmm_engine.options import SearchOptions

    names = ("mode", "k", "stretch", "recognition", "where", "explain")
    tmm = {"config": options["preset"]} if options["preset"] else {}
    return SearchOptions(**{name: options[name] for name in names}, **tmm)


def _calibrate(engine: "Engine", index: Path, asked: Any, options: dict[str, Any], progress: "Progress") -> None:
    from tmm_engine.cli.display import say_remarks
    from tmm_engine.index.sources.records import remarks_of

    source = opened_source(options["calibration"], options)
    made = engine.calibrate(source, asked, name=options["name"], progress=progress)
    say_remarks(remarks_of(source))
    say_remarks(made.notes)
    click.echo(f"{index}: calibration {made.name!r} of {len(made):,} images of {made.source} is kept", err=True)


def _answers(
    engine: "Engine", paths: tuple[Path, ...], asked: Any, options: dict[str, Any], progress: "Progress"
) -> "list[Classification | FailedQuery]":
    """In the order of the images; what cannot be classified has its error in its place."""
    from tmm_engine.cli.display import say_remarks
    from tmm_engine.cli.search import queries_of
    from tmm_engine.query import Query, answered

    limit = None if options["calibration"] else options["limit"]
    queries = queries_of(engine, paths, limit=limit)
    together: list[str] = []  # what is to be said of all answers
    told = {
        "alpha": options["alpha"],
        "outliers": options["outliers"],
        "calibration": "leave-one-out" if options["leave_one_out"] else options["name"],
    }

    def ask(some: "Sequence[Query]") -> "Classifications":
        found = engine.classify([*some], asked, progress=progress, **told)
        together.extend(found.notes)
        return found

    answers = iter(answered([query for query in queries if isinstance(query, Query)], ask))
    say_remarks(together)
    return [next(answers) if isinstance(query, Query) else query for query in queries]


def _show(answers: "list[Classification | FailedQuery]", options: dict[str, Any]) -> None:
    from tmm_engine.cli.display import print_classified

    if options["as_json"]:
        for answer in answers:
            echo_json(answer.to_json())
    elif answers:
        print_classified(answers)
    if options["out"]:
        from tmm_engine.views.classified import write_classified

        write_classified(answers, options["out"])
        click.echo(f"wrote {options['out']}", err=True)
