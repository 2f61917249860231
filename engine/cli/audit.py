"""The command `engine audit`. Nothing heavy is imported early."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tmm_engine.cli.options import device_option, model_option, size_in_bytes
from tmm_engine.cli.output import echo_json
from tmm_engine.index.errors import visible

if TYPE_CHECKING:
    from tmm_engine.auditing.findings import Audit, Known

OF_A_WHOLE_AUDIT = ("out", "overwrite", "only", "against", "sources", "rate", "k", "limit")
KINDS = ("duplicates", "leaks", "labels", "foreign", "unsure")


def kinds(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    """Parse `duplicates,labels`; every kind once."""
    chosen = KINDS if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for kind in chosen:
        if kind not in KINDS:
            raise click.BadParameter(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    return chosen


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for page, tables, decisions, Label Studio tasks.")
@click.option("--overwrite", is_flag=True, help="Replace an audit that is at --out.")
@click.option("--only", callback=kinds, metavar="KIND,…", help=f"What to look for: {', '.join(KINDS)}. Default: all.")
@click.option("--against", type=click.Path(path_type=Path), metavar="OTHER", help="An index to look for leaks from.")
@click.option("--sources", metavar="COLUMN", help="Of metadata: no image should be under two of its values.")
@click.option("--image", "images", multiple=True, help="Only say whether this image is in INDEX already; repeatable.")
@click.option("--where", metavar="SQL", help="Only exemplars that match, as for search.")
@click.option("--rate", type=float, default=0.1, show_default=True, help="Of false findings that is accepted, 0 to 1.")
@click.option("-k", type=click.IntRange(min=1), default=20, show_default=True, help="Neighbours that have a vote.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Of a kind, on the page.")
@click.option("--memory", callback=size_in_bytes, default="1GiB", show_default=True, help="What comparing may take.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line per finding.")
@model_option
@device_option
@click.pass_context
def audit(
    context: click.Context, /, index: Path, *, out: Path | None, images: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Find what is wrong with INDEX: near-duplicates, leaks, likely wrong labels, foreign images, unsure predictions.

    Nothing is changed. Every finding has a score, its neighbours, and a rule that made it one. With --image: is this
    image there already, also resized, recompressed, slightly cropped, turned or darkened?

    \b
    Examples:
      engine audit photos.idx --out audit
      engine audit photos.idx --only labels --json
      engine audit photos.idx --image query.png
    """
    from tmm_engine.auditing.writing import check_target, write_audit
    from tmm_engine.cli.display import progress_bar
    from tmm_engine.engine import Engine

    _check(context)
    if out is not None:
        check_target(out, overwrite=options["overwrite"])
    opening = {"model": options["model"], "device": options["device"], "backend": "torch"}
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar())
        engine = stack.enter_context(Engine.open(index, **opening))
        if images:
            among = engine if options["where"] is None else engine.matching(options["where"])
            known = among.copies_of(list(images), memory=options["memory"], progress=progress)
        else:
            against = options["against"] and stack.enter_context(Engine.open(options["against"], **opening))
            found = engine.audit(
                kinds=options["only"],
                k=options["k"],
                rate=options["rate"],
                against=against,
                sources=options["sources"],
                where=options["where"],
                memory=options["memory"],
                progress=progress,
            )
            written = (
                write_audit(found, engine, out, limit=options["limit"], overwrite=options["overwrite"]) if out else []
            )
    if images:
        _print_known(known, as_json=as_json)
        return
    _print(found, as_json=as_json)
    for path in written:
        click.echo(f"written: {path}", err=True)


def _check(context: click.Context) -> None:
    """Refuse what has no effect, and a rate out of range, before anything is opened."""
    options = context.params
    given = {
        parameter.name: parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name and context.get_parameter_source(parameter.name) == ParameterSource.COMMANDLINE
    }

    def refuse(names: Sequence[str], why: str) -> None:
        without = [given[name] for name in names if name in given]
        if without:
            verb = "has" if len(without) == 1 else "have"
            raise click.UsageError(f"{', '.join(without)} {verb} no effect {why}")

    if options["images"]:
        refuse(OF_A_WHOLE_AUDIT, "with --image, which is only looked up")
    if options["out"] is None:
        refuse(("overwrite", "limit"), "without --out")
    if "leaks" not in options["only"]:
        refuse(("against", "sources"), f"with --only {','.join(options['only'])}: they are for leaks")
    if options["only"] == ("unsure",):
        refuse(("rate",), "with --only unsure, which has a threshold of its own")
    if not 0 < options["rate"] < 1:
        raise click.BadParameter(f"expected a share above 0 and below 1, got {options['rate']:g}", param_hint="--rate")


def _print_known(known: "Sequence[Known]", *, as_json: bool) -> None:
    for each in known:
        if as_json:
            echo_json(each.to_json())
        else:
            best = each.evidence[0]
            said = f"is there already, as {best.id}" if each.there else f"is new; the nearest is {best.id}"
            click.echo(visible(f"{each.image}: {said} ({best.label}, alike {best.similarity:.2f})"))


def _print(found: "Audit", *, as_json: bool) -> None:
    if as_json:
        for finding in found.findings:
            echo_json(finding.to_json())
    else:
        for kind, rule in found.rules.items():
            click.echo(f"{kind}: {len(found.of(kind)):,} found ({rule.text})")
            suspicious = found.suspicious.get(kind, ())
            if suspicious:
                click.echo("  nothing certain; the most suspicious, which are no findings:")
            for finding in (*found.of(kind), *suspicious)[:3]:
                click.echo(visible(f"  {finding.score:.3f} {finding.id}: {finding.why}"))
    for note in found.notes:
        click.echo(visible(f"note: {note}"), err=True)
