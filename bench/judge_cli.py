"""The commands of `engine bench` about held-out queries: what is found for them, and what a judge says of it.

Nothing heavy is imported at first.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmm_engine.bench.options import check_folders, query_options, sized
from tmm_engine.bench.quality_cli import k_option, methods_option, out_option, parse_methods
from tmm_engine.cli.options import joined
from tmm_engine.index.errors import InputError

if TYPE_CHECKING:
    from tmm_engine.bench.loading import HeldOut
    from tmm_engine.bench.oracle import Judge

held_out_options = joined(sized(exemplars=2000, queries=50), query_options)


@click.command()
@click.argument("source")
@held_out_options
@methods_option
@k_option
@click.option(
    "--gallery", type=click.Path(path_type=Path), help="Write a picture of the first queries' top 3 (Fig. 4)."
)
@out_option
def semantic(source: str, **options: Any) -> None:
    """Do held-out queries find their own kind? Label precision, k-NN accuracy, SSIM, and a gallery (Fig. 4).

    \b
    Examples:
      engine bench semantic mnist --root data --model resnet18 --weights mnist.safetensors --out semantic.jsonl
      engine bench semantic photos/ --query-source more-photos/ --model resnet18 --weights w.safetensors \\
          --methods 'cosine;paper' --queries 20 --gallery gallery.png --out runs/semantic.jsonl
    """
    from tmm_engine.bench.loading import load_held_out
    from tmm_engine.bench.semantic import KEY, draw_gallery, measure_semantic
    from tmm_engine.cli.display import progress_bar

    methods = parse_methods(options["methods"])
    check_folders(options["out"], options["gallery"])
    with progress_bar() as progress:
        held = load_held_out(source, options, progress)
        settings = {"k": options["k"], "query_source": held.source}
        with held.suite.records(options["out"], "semantic", methods, KEY, **settings) as records:
            measure_semantic(
                held.suite.retrievers(methods, progress=progress),
                held.queries,
                held.labels,
                held.suite.store,
                records,
                k=options["k"],
                seed=options["seed"],
                progress=progress,
            )
    if options["gallery"]:
        names, gallery = held.class_names, options["gallery"]
        draw_gallery(options["out"], held.queries, held.labels, held.suite.store, gallery, class_names=names)
    click.echo(f"{options['out']}: {len(held.queries)} queries from {held.source}, {len(methods)} methods")


@click.command()
@click.argument("source")
@held_out_options
@click.option(
    "--semantic",
    type=click.Path(path_type=Path),
    required=True,
    help="Records of `engine bench semantic`, made with the same SOURCE and options.",
)
@click.option("--judge", type=click.Choice(["vision", "ssim"]), default="vision", show_default=True)
@click.option("--judge-model", metavar="NAME", help="Of the vision judge, as its endpoint calls it.")
@click.option("--base-url", metavar="URL", help="Of an endpoint that speaks OpenAI's protocol; it usually ends in /v1.")
@click.option("--no-temperature", is_flag=True, help="Do not ask for temperature 0: reasoning models refuse it.")
@click.option("--dry-run", is_flag=True, help="Ask nobody; say what it would take.")
@click.option("--price", type=click.FloatRange(min=0), help="Of a million input tokens, for --dry-run.")
@click.option("--out", type=click.Path(path_type=Path), help="Records as JSON lines; a rerun goes on with them.")
def oracle(source: str, **options: Any) -> None:
    """What does a judge from outside say of the neighbours? Blind, in an order shuffled for every query (Table 1).

    The judge is a vision-language model, whose key is in the environment variable OPENAI_API_KEY, or SSIM, which needs
    no network.

    \b
    Examples:
      engine bench oracle mnist --root data --model resnet18 --weights mnist.safetensors --semantic semantic.jsonl \\
          --judge ssim --out oracle.jsonl
      engine bench oracle mnist --root data --model resnet18 --weights mnist.safetensors --semantic semantic.jsonl \\
          --dry-run --price 2.5
      engine bench oracle mnist --root data --model resnet18 --weights mnist.safetensors --semantic semantic.jsonl \\
          --judge-model my-model --base-url http://localhost:8000/v1 --out oracle.jsonl
    """
    from tmm_engine.bench.loading import load_held_out
    from tmm_engine.bench.oracle import judge_neighbours
    from tmm_engine.bench.records import read_records
    from tmm_engine.bench.semantic import KEY
    from tmm_engine.cli.display import progress_bar

    found = read_records(options["semantic"])
    if options["out"] is None and not options["dry_run"]:
        raise click.UsageError("Missing option '--out' (or ask for a --dry-run).")
    check_folders(options["out"])
    judge = None if options["dry_run"] else _judge(options)
    with progress_bar() as progress:
        held = load_held_out(source, options, progress)
    _check_same(options["semantic"], found.settings, held)
    if judge is None:
        click.echo(_estimated(held, options["semantic"], options["price"]))
        return
    model = options["judge_model"] if options["judge"] == "vision" else None
    compared = {name: method for run in found.runs for name, method in run["methods"].items()}
    settings = {"judge": options["judge"], "judge_model": model, "compared": compared}
    with held.suite.records(options["out"], "oracle", [], KEY, **settings) as records, progress_bar() as progress:
        judge_neighbours(
            options["semantic"],
            held.queries,
            held.suite.store,
            judge,
            records,
            seed=options["seed"],
            progress=progress,
        )
    judged = read_records(options["out"]).records
    silent = len({record["query"] for record in judged if record["alike"] is None})
    click.echo(f"{options['out']}: {len({record['query'] for record in judged})} queries, {silent} without a verdict")


def _judge(options: dict[str, Any]) -> "Judge":
    from tmm_engine.bench.oracle import SsimJudge, VisionJudge

    if options["judge"] == "ssim":
        return SsimJudge()
    if options["judge_model"] is None:
        raise click.UsageError("Missing option '--judge-model': the vision judge needs one (or choose --judge ssim).")
    temperature = None if options["no_temperature"] else 0.0
    return VisionJudge(options["judge_model"], base_url=options["base_url"], temperature=temperature)


def _check_same(path: Path, settings: dict[str, Any], held: "HeldOut") -> None:
    """The records' queries and exemplars are these.

    Raises:
        InputError: they are others, or not of every method for every query.
    """
    from tmm_engine.bench.semantic import check_queries, read_neighbours

    here = {
        "data_set": held.suite.data_set,
        "fingerprint": held.suite.classifier.fingerprint,
        "exemplars": len(held.suite.store),
        "seed": held.suite.seed,
        "query_source": held.source,
    }
    for name, value in here.items():
        if settings.get(name) != value:
            raise InputError(
                f"{path}: expected records of {name} {value!r}, got {settings.get(name)!r} (give the source and "
                "options that they were made with)"
            )
    check_queries(read_neighbours(path), held.queries)


def _estimated(held: "HeldOut", semantic: Path, price: float | None) -> str:
    from tmm_engine.bench.oracle import estimate

    found = estimate(semantic, held.queries, held.suite.store, price_per_million=price or 0.0)
    text = f"{found.requests} requests, {found.pictures} pictures, about {found.input_tokens:,} input tokens"
    return text if price is None else f"{text}: about {found.price:.2f} at {price:g} per million"
