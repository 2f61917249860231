"""The command sync. Nothing heavy is imported early."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmm_engine.cli.options import device_option, model_option, opened_source, source_options
from tmm_engine.index.errors import visible

if TYPE_CHECKING:
    from tmm_engine.index.store.syncing import SyncReport


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("source")
@source_options
@click.option("--delete", is_flag=True, help="Remove exemplars that SOURCE has no image of. Default: they stay.")
@click.option("--dry-run", is_flag=True, help="Say what would happen, a line for each image, and change nothing.")
@click.option("--id-prefix", default="", help="Put before the ids of the images in SOURCE; other exemplars stay.")
@click.option("--strict", is_flag=True, help="Fail at an unreadable image instead of leaving it as it was.")
@model_option
@device_option
def sync(index: Path, source: str, **options: Any) -> None:
    """Bring INDEX to what SOURCE is now: new images are added, changed ones replaced, missing ones removed (--delete).

    Images that are what INDEX holds do not pass the model. Where nothing has changed there is no new version.

    \b
    Examples:
      engine sync photos.idx photos/
      engine sync photos.idx photos/ --delete --dry-run
    """
    from tmm_engine.cli.display import progress_bar, say_agreement, say_remarks
    from tmm_engine.engine import Engine

    images = opened_source(source, options)
    with (
        Engine.open(index, model=options["model"], device=options["device"], backend="torch") as engine,
        progress_bar() as progress,
    ):
        report = engine.sync(
            images,
            delete=options["delete"],
            dry_run=options["dry_run"],
            strict=options["strict"],
            id_prefix=options["id_prefix"],
            progress=progress,
        )
    say_remarks(report.remarks)
    _print_notes(report, delete=options["delete"])
    say_agreement(report)
    if report.dry_run:
        _print_plan(report)
    same_pixels = report.added + report.replaced - report.embedded
    of_these = f" ({same_pixels:,} only in label or metadata)" if same_pixels else ""
    what = (
        f"{report.added:,} added, {report.replaced:,} replaced{of_these}, {report.deleted:,} deleted, "
        f"{report.unchanged:,} unchanged; {report.embedded:,} through the model"
    )
    state = "would be the result (dry run)" if report.dry_run else f"version {report.version}"
    click.echo(f"{index}: {what}; {state}, {report.exemplars:,} exemplars")


def _print_notes(report: "SyncReport", *, delete: bool) -> None:
    from tmm_engine.cli.display import say_skipped

    say_skipped(report)
    if report.unreadable_ids:
        click.echo(f"{len(report.unreadable_ids):,} of them are in the index and stay as they were", err=True)
    if report.labels_predicted and (report.added or report.replaced):
        click.echo("the source has no labels: what is added gets the model's predictions", err=True)
    if report.missing_ids and not delete:
        click.echo(f"{len(report.missing_ids):,} exemplars are missing from the source and stay (--delete)", err=True)


def _print_plan(report: "SyncReport") -> None:
    for what, ids in (
        ("add", report.added_ids),
        ("replace", report.replaced_ids),
        ("delete", report.missing_ids if report.deleted else ()),
    ):
        for id_ in ids:
            click.echo(visible(f"{what} {id_}"))
