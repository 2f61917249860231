"""The command `engine`: parse, one call, render. Answers go to stdout; progress, notes and errors to stderr.

Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted. Nothing heavy is imported before a command runs.
"""

import sys
from pathlib import Path
from typing import Any

import click

from tmm_engine import __version__
from tmm_engine.cli.audit import audit
from tmm_engine.cli.build import build_index
from tmm_engine.cli.classify import classify
from tmm_engine.cli.living import add, compact, delete, print_versions, relabel, repair, tune_neighbours, verify
from tmm_engine.cli.options import model_option
from tmm_engine.cli.output import as_output_can, echo_json
from tmm_engine.cli.search import search
from tmm_engine.cli.serve import serve
from tmm_engine.cli.syncing import sync
from tmm_engine.cli.wording import for_command_line
from tmm_engine.index.errors import TmmEngineError


class _Group(click.Group):
    """Turns the project's errors, and Ctrl-C, into one line on stderr and an exit code; finds `bench` when it is asked
    for.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), "bench"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "bench":
            from tmm_engine.bench.cli import bench

            return bench
        return super().get_command(ctx, cmd_name)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with as_output_can():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TmmEngineError as error:
            click.echo(f"error: {for_command_line(str(error))}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, message="tmm-engine %(version)s")
def main() -> None:
    """Robust image retrieval: which known images does my classifier see as like this one?

    \b
    Examples:
      engine demo
      engine build-index photos/ photos.idx --model resnet18 --weights resnet18.safetensors
      engine search photos.idx query.png --mode tmm,l2,cosine --html answer.html
    """


for command in (
    build_index, search, classify, audit, add, sync, delete, relabel, compact, tune_neighbours, verify, repair, serve
):  # fmt: skip
    main.add_command(command)


@main.command("export-onnx")
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@model_option
def export_onnx_command(index: Path, out: Path, model: str | None) -> None:
    """Write the backbone of INDEX as ONNX graphs into the folder OUT, and check them against PyTorch.

    clean.onnx takes images (uint8) and gives features; triggered.onnx also takes a trigger, the two weights of the
    blend and the bounds of the clamp. The number of images is free.

    \b
    Example:
      engine export-onnx photos.idx photos-onnx
    """
    from tmm_engine.backends import require_onnx
    from tmm_engine.engine import Engine
    from tmm_engine.rerank.onnx_backbone import export_onnx

    require_onnx()
    with Engine.open(index, model=model, device="cpu", backend="torch") as engine:
        report = export_onnx(engine.classifier, out)
    for path in report.paths:
        click.echo(f"{path}: {report.sizes[path.name] / 1e6:.1f} MB, opset {report.opset}")
    click.echo(f"largest difference from PyTorch: {report.difference:.1e} of the largest feature", err=True)


@main.command()
@click.argument("index", type=click.Path(path_type=Path), required=False)
@click.option("--versions", is_flag=True, help="Every version of INDEX that can be opened, oldest first.")
@click.option("--version", type=click.IntRange(min=1), help="An older version of INDEX.")
@click.option("--system", is_flag=True, help="Versions and devices of this machine.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object; of --versions one a line.")
def info(index: Path | None, *, versions: bool, version: int | None, system: bool, as_json: bool) -> None:
    """Say what INDEX holds, or what this machine offers.

    \b
    Examples:
      engine info photos.idx
      engine info photos.idx --versions
      engine info --system --json
    """
    from tmm_engine.cli.display import print_descriptors, print_fields
    from tmm_engine.info import describe_index, describe_system

    if index is None and not system:
        raise click.UsageError("give an INDEX, or --system")
    if versions and index is not None:
        print_versions(index, as_json=as_json)
        return
    fields = (describe_index(index, version=version) if index else {}) | (describe_system() if system else {})
    if as_json:
        echo_json(fields)
    else:
        descriptors = fields.pop("descriptors", None)
        if index is not None and descriptors is None:
            fields["descriptors"] = "none: mode robust needs an index built with --views 1 or more"
        print_fields(fields)
        if descriptors is not None:
            print_descriptors(descriptors)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("engine-demo"),
    show_default=True,
    help="Folder for what it makes.",
)
@click.option(
    "--queries", type=click.IntRange(1, 100), default=8, show_default=True, help="How many queries are shown."
)
def demo(out: Path, queries: int) -> None:
    """Train a small model on handwritten digits, index them, and compare the modes, clean and darkened.

    Offline: the digits come with this package. Takes about a minute.

    \b
    Example:
      engine demo --out engine-demo
    """
    from tmm_engine.cli.display import progress_bar
    from tmm_engine.demo import run_demo

    with progress_bar() as progress:
        outcome = run_demo(out, queries=queries, progress=progress)
    outcome.print()


if __name__ == "__main__":
    sys.exit(main())
