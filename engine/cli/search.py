"""The command search. Nothing heavy is imported early."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmm_engine.cli.options import (
    cache_option,
    device_option,
    model_option,
    modes,
    opened_source,
    ratio,
    ray_asked,
    ray_options,
    size_in_bytes,
    source_options,
)
from tmm_engine.cli.output import echo_json
from tmm_engine.cli.remote import is_address, remote_answers
from tmm_engine.cli.settings import CommandWithSettings
from tmm_engine.index.errors import InputError

if TYPE_CHECKING:
    from tmm_engine.engine import Engine
    from tmm_engine.index.progress import Progress
    from tmm_engine.options import SearchOptions
    from tmm_engine.query import Query
    from tmm_engine.rerank.settings import TmmConfig
    from tmm_engine.results import FailedQuery, SearchResult


OF_TMM = {
    "candidates": None,
    "prefilter": None,
    "preset": None,
    "settings": (),
    "seed": None,
    "together": False,
    "precision": "fp32",
    "backend": "auto",
}
"""What is of mode tmm alone, and its value where it was not given."""
FLAGS = {"settings": "set"}


@click.command(cls=CommandWithSettings)
@click.argument("index")
@click.argument("images", nargs=-1, metavar="[IMAGE]...", type=click.Path(path_type=Path))
@click.option("--id", "ids", multiple=True, help="An exemplar of the index as the query; repeatable.")
@click.option("--source", help="Queries from a data set, as build-index takes it.")
@source_options
@click.option(
    "--mode",
    "modes",
    callback=modes,
    help="robust, tmm, l2, cosine, or several: robust,tmm,l2. Default: robust, or tmm where an option of tmm is given.",
)
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many exemplars to return.")
@click.option(
    "--candidates", type=click.IntRange(min=1), help="tmm: score only so many, chosen by --prefilter. Default: all."
)
@click.option(
    "--prefilter",
    help="Of --candidates: l2, cosine, union of both, robust where the index has descriptors, or global where it has a "
    "global trigger. Default: union.",
)
@click.option("--preset", help="tmm: paper, or fast where the index has a global trigger. Default: paper.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="tmm: change a setting, e.g. blend=added; repeatable. They are listed below.",
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
@click.option(
    "--alone",
    is_flag=True,
    help="Pass each query through the network alone, as tmm does: bit for bit the answer that it has without others.",
)
@click.option(
    "--where", metavar="SQL", help="Only exemplars that match, as in \"label = 'Tom' AND predicted = 'cat'\"."
)
@click.option("--version", type=click.IntRange(min=1), help="An older version of INDEX; see info --versions.")
@click.option("--verify", is_flag=True, help="Compare every file with what was written before the first search.")
@click.option(
    "--stretch/--no-stretch",
    default=None,
    help="Stretch the queries' contrast first. robust always does; tmm as its preset says; l2 and cosine do not.",
)
@click.option(
    "--recognition",
    callback=ratio,
    metavar="RATIO|off",
    help="Answer for a query as for the nearest exemplar, if its distance is below this part of the second nearest's. "
    "Default: 0.7 for robust, as the preset says for tmm (fast: 0.8), off for l2 and cosine.",
)
@click.option(
    "--explain",
    is_flag=True,
    help="Say why: the nearest exemplars of another class, prototypes, and what pulled the decision most; on the page "
    "(--html) and in --json.",
)
@cache_option
@click.option(
    "--memory", callback=size_in_bytes, help="What the process may hold between searches, as 2GiB. Default: no bound."
)
@click.option(
    "--search-precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="Look at all exemplars, in these numbers, and at the best again in fp32. Default: as the index was tuned.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line per query and mode instead of tables.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a self-contained page of queries and neighbours.")
@click.option("--out", type=click.Path(path_type=Path), help="Write a Parquet file with a row for every neighbour.")
@click.option("--png", type=click.Path(path_type=Path), help="Write a picture of queries and neighbours.")
@model_option
@device_option
@ray_options
def search(index: str, images: tuple[Path, ...], **options: Any) -> None:
    """Find the exemplars of INDEX that the model sees as most like each IMAGE (files or folders).

    INDEX may be one of a server (engine serve): http://HOST:PORT/NAME; its key, if it has one, is in the environment's
    TMM_ENGINE_API_KEY or TMM_ENGINE_READ_ONLY_API_KEY. An image among several that cannot be searched with has an error
    in its place; the exit code is then 1.

    \b
    Examples:
      engine search photos.idx query.png -k 5
      engine search photos.idx query.png --where "label = 'cat'" --version 2
      engine search photos.idx queries/ --mode robust,l2,cosine --html answer.html --png answer.png
      engine search /nfs/photos.idx query.png --mode tmm --ray head:6379
      engine search photos.idx query.png --explain --html why.html
      engine search http://localhost:8000/photos query.png
      engine search photos.idx --id cat/001.png --mode tmm --candidates 2000 --json
      engine search mnist.idx --source mnist --root data --split test --limit 3 --mode tmm --set blend=added
    """
    from tmm_engine.cli.display import progress_bar
    from tmm_engine.engine import Engine

    if not (images or options["ids"] or options["source"]):
        raise click.UsageError("no query: give image files or folders, --id, or --source")
    for name in ("split", "root", "image_column", "label_column"):
        if options[name] is not None and not options["source"]:
            raise click.UsageError(f"--{name.replace('_', '-')} has no effect without --source")
    if options["out"] is not None and options["out"].suffix.lower() != ".parquet":
        raise click.UsageError(f"--out: expected a file name that ends in .parquet, got {options['out'].name}")
    for path in (options["html"], options["png"], options["out"]):
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: its folder does not exist; create it first")
    asked = _asked(options)
    if is_address(index):
        results = remote_answers(index, images, asked, options)
        _finish(results, options, index_name=index)
        return
    opened = Engine.open(
        Path(index),
        model=options["model"],
        device=options["device"],
        cache_bytes=options["cache_images"],
        precision=options["precision"],
        backend=options["backend"],
        version=options["version"],
        verify=options["verify"],
        memory=options["memory"],
        search_precision=options["search_precision"],
        ray=ray_asked(options),
    )
    with opened as engine:
        if "tmm" in options["modes"]:
            click.echo(f"tmm on {engine.backend}", err=True)
        queries = _queries(engine, images, options)
        with progress_bar() as progress:
            results = _answers(engine, queries, asked, progress)
    _finish(results, options, index_name=Path(index).name)


def _finish(results: "list[SearchResult | FailedQuery]", options: dict[str, Any], *, index_name: str) -> None:
    """Show them; the exit code says whether there were answers to all."""
    from tmm_engine.results import FailedQuery

    _show(results, options, index_name=index_name)
    failed = sum(isinstance(result, FailedQuery) for result in results)
    if failed:
        raise InputError(f"{failed} of {len(results)} answers failed; see their places")


def _asked(options: dict[str, Any]) -> "list[SearchOptions]":
    """The options of a search in each mode; those of one mode are refused where only others are asked for."""
    from tmm_engine.options import SearchOptions

    given = [name for name, default in OF_TMM.items() if options[name] != default]
    if options["modes"] is None:
        options["modes"] = ("tmm",) if given else ("robust",)
    if given and "tmm" not in options["modes"]:
        flag = f"--{FLAGS.get(given[0], given[0])}"
        raise click.UsageError(f"{flag} has no effect with --mode {','.join(options['modes'])}: it is an option of tmm")
    shared = {name: options[name] for name in ("k", "stretch", "recognition", "where", "explain")}
    tmm = {name: options[name] for name in ("candidates", "prefilter", "together")} | {"config": _config(options)}
    if options["alone"] and options["modes"] == ("tmm",):
        raise click.UsageError("--alone has no effect with --mode tmm, which passes each query alone")
    others = {"alone": options["alone"]}
    return [SearchOptions(mode=mode, **shared, **(tmm if mode == "tmm" else others)) for mode in options["modes"]]


def _config(options: dict[str, Any]) -> "TmmConfig":
    """The preset with --set and --seed; what speeds up a pass is refused where there is none."""
    from tmm_engine.rerank.settings import DEFAULT_PRESET, IndexTrigger, preset

    seed = [] if options["seed"] is None else [f"seed={options['seed']}"]
    config = preset(options["preset"] or DEFAULT_PRESET).with_settings([*options["settings"], *seed])
    for name in ("precision", "backend"):
        if isinstance(config.trigger, IndexTrigger) and options[name] != OF_TMM[name]:
            raise click.UsageError(
                f"--{name} has no effect with the index's trigger (trigger=global): no exemplar passes the network, "
                f"its features are stored"
            )
    return config


def _queries(engine: "Engine", paths: tuple[Path, ...], options: dict[str, Any]) -> "list[Query | FailedQuery]":
    """Every query of a search, decoded, or what is wrong with it; a bad one that is alone is an error at once."""
    from tmm_engine.cli.display import say_remarks
    from tmm_engine.index.errors import ImageError
    from tmm_engine.index.labels import Vocabulary
    from tmm_engine.index.sources.records import remarks_of
    from tmm_engine.query import queries_from
    from tmm_engine.results import FailedQuery

    queries = queries_of(engine, paths, limit=options["limit"])
    queries += [engine.exemplar(id_) for id_ in options["ids"]]
    if options["source"]:
        source = opened_source(options["source"], options)
        vocabulary = Vocabulary(engine.class_names, engine.label_names[len(engine.class_names) :])
        queries += queries_from(source, engine.classifier.target, vocabulary=vocabulary)
        say_remarks(remarks_of(source))
    if len(queries) == 1 and isinstance(queries[0], FailedQuery):
        raise ImageError(queries[0].error)
    return queries


def queries_of(engine: "Engine", paths: tuple[Path, ...], *, limit: int | None) -> "list[Query | FailedQuery]":
    """The images of files and folders, decoded, or what is wrong with them."""
    from tmm_engine.cli.display import say_remarks
    from tmm_engine.index.errors import ImageError, printable
    from tmm_engine.index.sources.opening import open_source
    from tmm_engine.index.sources.records import remarks_of
    from tmm_engine.query import as_query, queries_from
    from tmm_engine.results import FailedQuery

    shape = engine.classifier.target
    queries: list[Query | FailedQuery] = []
    for path in paths:
        if path.is_dir():
            source = open_source(path, limit=limit)
            queries += queries_from(source, shape, prefix=f"{printable(path)}/")
            say_remarks(remarks_of(source))
            continue
        try:
            queries.append(as_query(path, shape=shape, name=printable(path)))
        except ImageError as error:
            queries.append(FailedQuery(printable(path), str(error)))
    return queries


def _answers(
    engine: "Engine", queries: "list[Query | FailedQuery]", asked: "list[SearchOptions]", progress: "Progress"
) -> "list[SearchResult | FailedQuery]":
    """The answer to every query in every mode, query by query; a query that is alone raises its error."""
    from tmm_engine.query import Query

    good: list[Any] = [query for query in queries if isinstance(query, Query)]
    search = engine.search if len(queries) == 1 else engine.search_each
    by_mode = [search(good, options, progress=progress) for options in asked]
    answers = iter(zip(*by_mode, strict=True))
    results: list[SearchResult | FailedQuery] = []
    for query in queries:
        results += next(answers) if isinstance(query, Query) else [query]
    return results


def _show(results: "list[SearchResult | FailedQuery]", options: dict[str, Any], *, index_name: str) -> None:
    """As lines or tables on stdout, and as the files that were asked for."""
    from tmm_engine.cli.display import print_failure, print_result
    from tmm_engine.results import FailedQuery
    from tmm_engine.views.page import write_html
    from tmm_engine.views.picture import write_png
    from tmm_engine.views.table import write_parquet

    for result in results:
        if options["as_json"]:
            echo_json(result.to_json())
        elif isinstance(result, FailedQuery):
            print_failure(result)
        else:
            print_result(result)
    if options["html"]:
        write_html(results, options["html"], index_name=index_name)
    if options["png"]:
        write_png(results, options["png"])
    if options["out"]:
        write_parquet(results, options["out"])
    for path in filter(None, (options["html"], options["png"], options["out"])):
        click.echo(f"wrote {path}", err=True)
