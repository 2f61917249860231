"""The commands that change or check an index: add, delete, compact, verify, repair. Nothing heavy is imported early."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmm_engine.cli.options import device_option, model_option, opened_source, source_options
from tmm_engine.cli.output import echo_json

if TYPE_CHECKING:
    from tmm_engine.index.store.changes import ChangeReport

index_argument = click.argument("index", type=click.Path(path_type=Path))


@click.command()
@index_argument
@click.argument("source")
@source_options
@click.option("--replace", is_flag=True, help="Images whose id is there take the old one's place, instead of an error.")
@click.option("--id-prefix", default="", help="Put before the ids of the images in SOURCE.")
@click.option("--strict", is_flag=True, help="Fail at an unreadable image instead of skipping it.")
@model_option
@device_option
def add(index: Path, source: str, **options: Any) -> None:
    """Add the images in SOURCE to INDEX, as its next version.

    SOURCE is what build-index takes. Labels are matched by name, and new ones become labels of INDEX; metadata columns
    that it does not have stay empty.

    \b
    Examples:
      engine add photos.idx more-photos/
      engine add photos.idx corrected/ --replace
      engine add photos.idx holiday/ --id-prefix holiday/
    """
    from tmm_engine.cli.display import progress_bar, say_agreement, say_remarks, say_skipped
    from tmm_engine.engine import Engine

    images = opened_source(source, options)
    with (
        Engine.open(index, model=options["model"], device=options["device"], backend="torch") as engine,
        progress_bar() as progress,
    ):
        report = engine.add(
            images,
            replace=options["replace"],
            strict=options["strict"],
            id_prefix=options["id_prefix"],
            progress=progress,
        )
    say_skipped(report)
    say_remarks(report.remarks)
    say_agreement(report)
    _say(index, report, f"{report.added:,} added, {report.replaced:,} replaced")


@click.command()
@index_argument
@click.option("--id", "ids", multiple=True, help="An exemplar; repeatable.")
@click.option("--where", metavar="SQL", help="All that match, as in \"label = 'cat' AND path LIKE '%tmp%'\".")
@click.option("--from", "listed", type=click.Path(path_type=Path), metavar="FILE", help="Of ids, one a line.")
def delete(index: Path, ids: tuple[str, ...], where: str | None, listed: Path | None) -> None:
    """Remove exemplars from INDEX, as its next version. Older versions keep them until `compact --discard-versions`.

    \b
    Examples:
      engine delete photos.idx --id cat/001.png --id cat/002.png
      engine delete photos.idx --where "label = 'cat' AND predicted <> 'cat'"
      engine delete photos.idx --from audit/decisions/delete-duplicates.txt
    """
    from tmm_engine.index.store.changes import delete_exemplars
    from tmm_engine.relabelling import read_ids

    if (bool(ids) or listed is not None) == (where is not None):
        raise click.UsageError("give either --id or --from, or --where")
    if listed is not None:
        ids = (*ids, *read_ids(listed))
    report = delete_exemplars(index, ids=ids, where=where)
    _say(index, report, f"{report.deleted:,} deleted")


@click.command()
@index_argument
@click.option(
    "--from", "table", type=click.Path(path_type=Path), metavar="FILE", required=True, help="CSV: columns id, label."
)
@model_option
@device_option
def relabel(index: Path, table: Path, model: str | None, device: str) -> None:
    """Give exemplars of INDEX other labels, as its next version.

    \b
    Example:
      engine relabel photos.idx --from audit/decisions/relabel.csv
    """
    from tmm_engine.cli.display import progress_bar, say_remarks
    from tmm_engine.engine import Engine
    from tmm_engine.relabelling import read_labels

    labels = read_labels(table)
    with Engine.open(index, model=model, device=device, backend="torch") as engine, progress_bar() as progress:
        report = engine.relabel(labels, progress=progress)
    say_remarks(report.remarks)
    _say(index, report, f"{report.replaced:,} relabelled")


@click.command()
@index_argument
@click.option(
    "--discard-versions",
    is_flag=True,
    help="Remove all older versions too; what other processes still have open of them is gone then.",
)
def compact(index: Path, *, discard_versions: bool) -> None:
    """Write the exemplars of INDEX anew, without deleted ones and in few files. Answers stay the same.

    \b
    Examples:
      engine compact photos.idx
      engine compact photos.idx --discard-versions
    """
    from tmm_engine.index.store.changes import compact as compact_index

    _say(index, compact_index(index, discard_versions=discard_versions), "compacted")


@click.command("tune-neighbours")
@index_argument
@click.option(
    "--recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.98,
    show_default=True,
    help="Share of the exact answer that is to be found, of exemplars as they are and of changed ones.",
)
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="Neighbours in an answer.")
@click.option(
    "--factory",
    "factories",
    multiple=True,
    metavar="FACTORY",
    help="A FAISS factory string to try, as IVF256,SQ8; repeatable. Default: those that suit so many exemplars.",
)
@click.option("--sample", type=click.IntRange(min=1), default=100, show_default=True, help="Exemplars searched for.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@model_option
@device_option
def tune_neighbours(index: Path, *, as_json: bool, model: str | None, device: str, **options: Any) -> None:
    """Choose how INDEX is searched approximately, by measurement on itself, and store it there.

    A sample of its exemplars is searched for, as they are and changed (noise, darkness, blur, shift, rotation, crop).
    The fastest that finds enough is taken, which may be exact search (Flat).

    \b
    Examples:
      engine tune-neighbours photos.idx --recall 0.98
      engine tune-neighbours photos.idx --factory HNSW32 --factory IVF256,PQ32
    """
    from tmm_engine.cli.display import progress_bar
    from tmm_engine.engine import Engine

    with Engine.open(index, model=model, device=device, backend="torch") as engine, progress_bar() as progress:
        tuned = engine.tune_neighbours(progress=progress, **options)
    if as_json:
        echo_json(tuned.to_json())
    else:
        click.echo(f"{index}: {tuned.sentence()}")


@click.command()
@index_argument
@click.option("--sample", type=click.IntRange(min=0), default=256, show_default=True, help="Features computed again.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line per finding.")
@model_option
def verify(index: Path, *, sample: int, as_json: bool, model: str | None) -> None:
    """Check INDEX: every file, every exemplar, features of a sample, caches. Exit code 1 if answers could be wrong.

    \b
    Example:
      engine verify photos.idx
    """
    from tmm_engine.cli.display import progress_bar
    from tmm_engine.index.errors import IndexStateError
    from tmm_engine.verify import verify_index

    with progress_bar() as progress:
        done = verify_index(index, model=model, sample=sample, progress=progress)
    for finding in done.findings:
        kind = "harmless: " if finding.harmless else ""
        if as_json:
            echo_json(finding.to_json())
        else:
            click.echo(f"{kind}{finding.what} — {finding.remedy}")
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    looked = f"{done.files:,} files, {done.exemplars:,} exemplars, {done.recomputed:,} computed again"
    if not done.sound:
        raise IndexStateError(f"{index} is damaged, see above ({looked})")
    click.echo(f"{index} is sound: {looked}", err=as_json)


@click.command()
@index_argument
@model_option
def repair(index: Path, model: str | None) -> None:
    """Rebuild what can be rebuilt of INDEX: caches, and features from images. Images are never touched.

    \b
    Example:
      engine repair photos.idx
    """
    from tmm_engine.cli.display import progress_bar
    from tmm_engine.verify import repair_index

    with progress_bar() as progress:
        done = repair_index(index, model=model, progress=progress)
    for line in done or ["nothing was to be repaired"]:
        click.echo(line)


def _say(index: Path, report: "ChangeReport", what: str) -> None:
    click.echo(f"{index}: {what}; version {report.version}, {report.exemplars:,} exemplars")


def print_versions(index: Path, *, as_json: bool) -> None:
    """Every version of an index: one JSON line each, or a table."""
    from tmm_engine.cli.display import print_table
    from tmm_engine.versions import versions_of

    found = versions_of(index)
    if as_json:
        for version in found:
            echo_json(version.to_json())
    else:
        print_table([version.to_json() for version in found])
