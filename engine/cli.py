"""The command `engine`: parse, one call, render. Answers go to stdout; progress, notes and errors to stderr.

Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted. Nothing heavy is imported before a command runs.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.commands_living import add, compact, delete, print_versions, repair, verify
from engine.options import (
    cache_option,
    device_option,
    model_option,
    modes,
    numbers,
    size,
    source_options,
)
from index.errors import InputError, TmmEngineError

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.query import Query
    from engine.results import FailedQuery, SearchResult
    from index.classifier import Classifier
    from index.progress import Progress
    from index.sources import ImageSource
    from rerank.config import TmmConfig

MODEL_OPTIONS = ("num_classes", "small_stem", "image_size", "channels", "mean", "std", "head")


class _Group(click.Group):
    """Turns the project's errors, and Ctrl-C, into one line on stderr and an exit code; finds `bench` when it is asked
    for.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), "bench"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "bench":
            from bench.cli import bench

            return bench
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TmmEngineError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="tmm-engine", message="%(package)s %(version)s")
def main() -> None:
    """Robust image retrieval: which known images does my classifier see as like this one?

    \b
    Examples:
      engine demo
      engine build-index photos/ photos.idx --model resnet18 --weights resnet18.safetensors
      engine search photos.idx query.png --mode tmm,l2,cosine --html answer.html
    """


for command in (add, delete, compact, verify, repair):
    main.add_command(command)


@main.command("build-index")
@click.argument("source")
@click.argument("index", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--weights", type=click.Path(path_type=Path), help="Checkpoint: safetensors, or torch.load(weights_only=True)."
)
@source_options
@click.option("--num-classes", type=click.IntRange(min=2), help="Classes of the head. Default: as the checkpoint says.")
@click.option(
    "--small-stem/--standard-stem",
    default=None,
    help="First convolution 3x3, stride 1. Default: as the checkpoint says.",
)
@click.option("--image-size", callback=size, metavar="N|HxW", help="Default: the first image's, at most 224.")
@click.option(
    "--channels", type=click.Choice(["1", "3"]), help="Convert images to grey or RGB. Default: as the first image."
)
@click.option("--mean", callback=numbers, metavar="R,G,B", help="Normalisation mean of pixels in [0, 1]. Default: 0.")
@click.option("--std", callback=numbers, metavar="R,G,B", help="Normalisation standard deviation. Default: 1.")
@click.option("--head", metavar="NAME", help="The final linear layer, where it is not found by itself.")
@click.option(
    "--neighbours", default="Flat", show_default=True, metavar="FACTORY", help="FAISS factory string; Flat is exact."
)
@click.option(
    "--overwrite", is_flag=True, help="Replace an index that is there; it stays usable until the new one is whole."
)
@click.option(
    "--global-trigger/--no-global-trigger",
    default=True,
    show_default=True,
    help="Also store features under one trigger for all, which the default search needs; doubles the building time.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of the global trigger: a TMM setting, e.g. blend=added; repeatable.",
)
@click.option(
    "--compare-backends",
    is_flag=True,
    help="Export to ONNX, time it against PyTorch, and let searches use the faster.",
)
@click.option("--strict", is_flag=True, help="Fail at an unreadable image instead of skipping it.")
@device_option
def build_index_command(source: str, index: Path, **options: Any) -> None:
    """Build INDEX from the images in SOURCE and a classifier.

    SOURCE is a folder of class folders, a flat folder (labels are then the model's predictions), a Parquet file or
    folder of shards in the Hugging Face image layout, or mnist, cifar10, svhn, gtsrb with --root.

    \b
    Examples:
      engine build-index photos/ photos.idx --model resnet18 --weights resnet18.safetensors --image-size 224
      engine build-index cifar10/ cifar.idx --split train --model resnet18 --small-stem --weights cifar.pt \\
          --mean .4914,.4822,.4465 --std .2470,.2435,.2616
      engine build-index mnist mnist.idx --root data --model mypackage.models:make_net --overwrite
    """
    from engine.backends import choose_device
    from engine.building import build_index
    from engine.display import progress_bar
    from engine.engine import Engine
    from index.sources import open_source
    from index.target import check_target
    from rerank.config import DEFAULT_PRESET, preset

    if options["settings"] and not options["global_trigger"]:
        raise click.UsageError("--set goes with --global-trigger: no other part of a build has TMM settings")
    check_target(index, overwrite=options["overwrite"])
    device = choose_device(options["device"])
    images = open_source(source, split=options["split"], root=options["root"], limit=options["limit"])
    classifier = _classifier(images, options).to(device)
    config = preset(DEFAULT_PRESET).with_settings(list(options["settings"]))
    with progress_bar() as progress:
        report = build_index(
            images,
            index,
            classifier,
            global_trigger=config if options["global_trigger"] else None,
            overwrite=options["overwrite"],
            neighbours=options["neighbours"],
            strict=options["strict"],
            progress=progress,
        )
    for image in report.skipped:
        click.echo(f"skipped {image.id}: {image.reason}", err=True)
    if report.skipped_count:
        click.echo(f"{report.skipped_count} images could not be read and were skipped", err=True)
    if options["compare_backends"]:
        with Engine.open(index, model=options["model"], device=options["device"]) as engine:
            speeds = engine.compare_backends()
        click.echo(", ".join(f"{name}: {speed:,.0f} images/s" for name, speed in speeds.items()), err=True)
    labels = "labels predicted by the model" if report.labels_predicted else "labels given"
    click.echo(f"{index}: {report.exemplars:,} exemplars of {images.name}, {labels}")


@main.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, metavar="[IMAGE]...", type=click.Path(path_type=Path))
@click.option("--id", "ids", multiple=True, help="An exemplar of the index as the query; repeatable.")
@click.option("--source", help="Queries from a data set, as build-index takes it.")
@source_options
@click.option(
    "--mode",
    "modes",
    default="tmm",
    show_default=True,
    callback=modes,
    help="tmm, l2, cosine, or several: tmm,l2,cosine.",
)
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many exemplars to return.")
@click.option(
    "--candidates", type=click.IntRange(min=1), help="tmm: score only so many, chosen by --prefilter. Default: all."
)
@click.option(
    "--prefilter",
    default="union",
    show_default=True,
    help="l2, cosine, union of both, or global where the index has a global trigger.",
)
@click.option("--preset", default="robust", show_default=True, help="tmm: paper or robust.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="tmm: change a setting, e.g. blend=added; repeatable.",
)
@click.option("--seed", type=click.IntRange(min=0), help="tmm: seed of trigger and tuning. Default: the preset's, 0.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="tmm: fp32, or bf16, which is faster and scores the best again in fp32.",
)
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="tmm: torch, onnx, or auto: what build-index --compare-backends found faster, else torch.",
)
@click.option(
    "--together",
    is_flag=True,
    help="tmm: optimise all queries' triggers jointly; several times as fast, and slightly other triggers.",
)
@click.option("--where", metavar="SQL", help="Only exemplars that match, as in \"label = 3 AND path LIKE '%cat%'\".")
@click.option("--version", type=click.IntRange(min=1), help="An older version of INDEX; see info --versions.")
@click.option("--verify", is_flag=True, help="Compare every file with what was written before the first search.")
@click.option(
    "--stretch/--no-stretch",
    default=None,
    help="Stretch the queries' contrast first. Default: as the preset says for tmm, not for l2 and cosine.",
)
@cache_option
@click.option("--json", "as_json", is_flag=True, help="One JSON line per query and mode instead of tables.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a self-contained page of queries and neighbours.")
@click.option("--png", type=click.Path(path_type=Path), help="Write a picture of queries and neighbours.")
@model_option
@device_option
def search(index: Path, images: tuple[Path, ...], **options: Any) -> None:
    """Find the exemplars of INDEX that the model sees as most like each IMAGE (files or folders).

    An image among several that cannot be searched with has an error in its place; the exit code is then 1.

    \b
    Examples:
      engine search photos.idx query.png -k 5
      engine search photos.idx query.png --where "label = 3" --version 2
      engine search photos.idx queries/ --mode tmm,l2,cosine --html answer.html --png answer.png
      engine search photos.idx --id cat/001.png --candidates 2000 --json
      engine search mnist.idx --source mnist --root data --split test --limit 3 --set blend=added
    """
    from engine.display import print_failure, print_result, progress_bar
    from engine.engine import Engine
    from engine.report import write_html, write_png
    from engine.results import FailedQuery
    from rerank.config import preset

    if not (images or options["ids"] or options["source"]):
        raise click.UsageError("no query: give image files or folders, --id, or --source")
    for path in (options["html"], options["png"]):
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: its folder does not exist; create it first")
    seed = [] if options["seed"] is None else [f"seed={options['seed']}"]
    config = preset(options["preset"]).with_settings([*options["settings"], *seed])
    opened = Engine.open(
        index,
        model=options["model"],
        device=options["device"],
        cache_bytes=options["cache_images"],
        precision=options["precision"],
        backend=options["backend"],
        version=options["version"],
        verify=options["verify"],
    )
    with opened as engine:
        if "tmm" in options["modes"]:
            click.echo(f"tmm on {engine.backend}", err=True)
        queries = _queries(engine, images, options)
        with progress_bar() as progress:
            results = _answers(engine, queries, options, config=config, progress=progress)
    for result in results:
        if options["as_json"]:
            click.echo(json.dumps(result.to_json(), ensure_ascii=False))
        elif isinstance(result, FailedQuery):
            print_failure(result)
        else:
            print_result(result)
    answered = [result for result in results if not isinstance(result, FailedQuery)]
    if options["html"] and answered:
        write_html(answered, options["html"], index_name=index.name)
    if options["png"] and answered:
        write_png(answered, options["png"])
    for path in filter(None, (options["html"], options["png"])):
        click.echo(f"wrote {path}", err=True)
    if len(answered) < len(results):
        raise InputError(f"{len(results) - len(answered)} of {len(results)} answers failed; see their places")


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
    from engine.backends import require_onnx
    from engine.engine import Engine
    from rerank.onnx_backbone import export_onnx

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
    from engine.display import print_fields
    from engine.info import describe_index, describe_system

    if index is None and not system:
        raise click.UsageError("give an INDEX, or --system")
    if versions and index is not None:
        print_versions(index, as_json=as_json)
        return
    fields = (describe_index(index, version=version) if index else {}) | (describe_system() if system else {})
    if as_json:
        click.echo(json.dumps(fields, ensure_ascii=False))
    else:
        print_fields(fields)


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
    """Train a small model on handwritten digits, index them, and compare tmm, l2 and cosine, clean and darkened.

    Offline: the digits come with scikit-learn. Takes about a minute.

    \b
    Example:
      engine demo --out engine-demo
    """
    from engine.demo import run_demo
    from engine.display import progress_bar

    with progress_bar() as progress:
        outcome = run_demo(out, queries=queries, progress=progress)
    outcome.print()


def _classifier(source: "ImageSource", options: dict[str, Any]) -> "Classifier":
    """The classifier that the options of build-index describe, for images of the source."""
    from index.classifier import Classifier

    channels, height, width = source.natural_shape()
    if options["channels"]:
        channels = int(options["channels"])
    if options["image_size"]:
        height, width = options["image_size"]
    if options["model"] is None:
        ignored = [name for name in MODEL_OPTIONS if options[name] is not None]
        if ignored:
            raise click.UsageError(f"--{ignored[0].replace('_', '-')} needs --model NAME")
        if options["weights"] is None:
            raise InputError(
                "no model: pass --model NAME with --weights FILE, or --weights of a file saved by this program"
            )
        return Classifier.load(options["weights"])
    return Classifier.from_architecture(
        options["model"],
        image_shape=(channels, height, width),
        weights=options["weights"],
        num_classes=options["num_classes"],
        small_stem=options["small_stem"],
        head=options["head"],
        mean=options["mean"],
        std=options["std"],
    )


def _queries(engine: "Engine", paths: tuple[Path, ...], options: dict[str, Any]) -> "list[Query | FailedQuery]":
    """Every query of a search, decoded, or what is wrong with it; a bad one that is alone is an error at once."""
    from engine.query import as_query, queries_from
    from engine.results import FailedQuery
    from index.errors import ImageError
    from index.sources import open_source

    shape = engine.store.image_shape
    queries: list[Query | FailedQuery] = []
    for path in paths:
        if path.is_dir():
            queries += queries_from(open_source(path, limit=options["limit"]), shape, prefix=f"{path}/")
            continue
        try:
            queries.append(as_query(path, shape=shape, name=str(path)))
        except ImageError as error:
            queries.append(FailedQuery(str(path), str(error)))
    queries += [engine.exemplar(id_) for id_ in options["ids"]]
    if options["source"]:
        source = open_source(options["source"], split=options["split"], root=options["root"], limit=options["limit"])
        queries += queries_from(source, shape)
    if len(queries) == 1 and isinstance(queries[0], FailedQuery):
        raise ImageError(queries[0].error)
    return queries


def _answers(
    engine: "Engine",
    queries: "list[Query | FailedQuery]",
    options: dict[str, Any],
    *,
    config: "TmmConfig",
    progress: "Progress",
) -> "list[SearchResult | FailedQuery]":
    """The answer to every query in every mode, query by query; a query that is alone raises its error."""
    from engine.query import Query

    good = [query for query in queries if isinstance(query, Query)]
    search = engine.search if len(queries) == 1 else engine.search_each
    by_mode = [
        search(
            good,  # type: ignore[arg-type]
            k=options["k"],
            mode=mode,
            candidates=options["candidates"],
            prefilter=options["prefilter"],
            config=config,
            together=options["together"],
            stretch=options["stretch"],
            where=options["where"],
            progress=progress,
        )
        for mode in options["modes"]
    ]
    answers = iter(zip(*by_mode, strict=True))
    results: list[SearchResult | FailedQuery] = []
    for query in queries:
        results += next(answers) if isinstance(query, Query) else [query]
    return results


if __name__ == "__main__":
    sys.exit(main())
