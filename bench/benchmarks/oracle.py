"""A judge from outside looks at the neighbours that each method found (§4.6, Table 1 of the paper).

It sees a query and the neighbour sets of all methods blind: as A, B, C, …, in an order shuffled for every query. The
judge is a vision-language model behind any endpoint that speaks OpenAI's protocol, or SSIM, which needs no network.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import click
import numpy as np
from jaxtyping import Float32, Int64

from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.benchmarks.semantic import KEY, check_queries, neighbour_rows, read_neighbours
from tmm_engine.bench.judges import (
    Judge,
    NeighbourSet,
    SsimJudge,
    VisionJudge,
    make_pictures,
    make_question,
)
from tmm_engine.bench.loading import HeldOut, load_held_out
from tmm_engine.bench.options import check_folders, held_out_options
from tmm_engine.bench.records import RecordFile, read_records
from tmm_engine.bench.tables import count, grouped, mean, rate, table
from tmm_engine.cli.display import progress_bar
from tmm_engine.index.errors import InputError
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.exemplars import ExemplarStore

CHARACTERS_PER_TOKEN = 4
PICTURE_TOKENS, TILE_TOKENS, TILE = 85, 170, 512  # OpenAI's rule for GPT-4o, the dearest of the usual ones


@dataclass(frozen=True, slots=True)
class Estimate:
    """What asking a vision-language model would take.

    Attributes:
        requests: One per query.
        pictures: Of all requests.
        input_tokens: Of all requests; providers count differently, by up to a factor of three.
        price: For the input, in the currency of the price per million tokens; answers are some 50 tokens each.
    """

    requests: int
    pictures: int
    input_tokens: int
    price: float


@click.command("oracle")
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
def command(source: str, **options: Any) -> None:
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


def _judge(options: dict[str, Any]) -> Judge:

    if options["judge"] == "ssim":
        return SsimJudge()
    if options["judge_model"] is None:
        raise click.UsageError("Missing option '--judge-model': the vision judge needs one (or choose --judge ssim).")
    temperature = None if options["no_temperature"] else 0.0
    return VisionJudge(options["judge_model"], base_url=options["base_url"], temperature=temperature)


def _check_same(path: Path, settings: dict[str, Any], held: HeldOut) -> None:
    """The records' queries and exemplars are these.

    Raises:
        InputError: they are others, or not of every method for every query.
    """
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
    found = estimate(semantic, held.queries, held.suite.store, price_per_million=price or 0.0)
    text = f"{found.requests} requests, {found.pictures} pictures, about {found.input_tokens:,} input tokens"
    return text if price is None else f"{text}: about {found.price:.2f} at {price:g} per million"


def judge_neighbours(
    semantic: Path,
    queries: Float32[np.ndarray, "q c h w"],
    exemplars: ExemplarStore,
    judge: Judge,
    record_file: RecordFile,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Have the neighbour sets in the records of the semantic benchmark judged; append a record per query and method.

    A record holds ``query``, ``method``, ``alike`` (count, or None without a verdict), ``k``, ``preferred`` (bool or
    None), ``order`` (the methods as shown: A, B, C, …) and ``reason`` (why there is no verdict, or None).

    Args:
        semantic: Records of `bench.benchmarks.semantic.measure_semantic`.
        queries: As measured there, pixels in [0, 1].
        exemplars: As measured there.
        judge: Asked once per query, unless the file has its records already.
        record_file: Keyed by `bench.benchmarks.semantic.KEY`.
        seed: Of the order in which each query's sets are shown.
        progress: Told of the queries judged.

    Raises:
        InputError: the records are not of these queries and exemplars.
        OracleError: the judge cannot be asked; what it said before is in the file.
    """
    found = neighbour_rows(semantic, queries, exemplars)
    shown = _shown(found, exemplars, seed=seed)
    for done, (query, order, sets) in enumerate(shown, start=1):
        missing = [method for method in order if not record_file.done(query=query, method=method)]
        if missing:
            verdict = judge.judge(queries[query], sets)
        for method in missing:
            place = order.index(method)
            record_file.append(
                {
                    "query": query,
                    "method": method,
                    "alike": None if verdict.alike is None else verdict.alike[place],
                    "k": len(sets[place]),
                    "preferred": None if verdict.preferred is None else verdict.preferred[place],
                    "order": order,
                    "reason": verdict.reason,
                }
            )
        progress("judging", done, len(found))


def estimate(
    semantic: Path,
    queries: Float32[np.ndarray, "q c h w"],
    exemplars: ExemplarStore,
    *,
    price_per_million: float,
) -> Estimate:
    """What `judge_neighbours` with a `VisionJudge` would send, from the first query's request; nothing is sent.

    Args:
        semantic: Records of `bench.benchmarks.semantic.measure_semantic`.
        queries: As measured there, pixels in [0, 1].
        exemplars: As measured there.
        price_per_million: Price of a million input tokens.

    Raises:
        InputError: the records are not of these queries and exemplars.
    """
    found = neighbour_rows(semantic, queries, exemplars)
    query, _, sets = next(_shown(found, exemplars, seed=0))
    pictures = make_pictures(queries[query], sets)
    tiles = [-(-picture.width // TILE) * -(-picture.height // TILE) for picture in pictures]
    text = len(make_question(len(sets), len(sets[0]))) // CHARACTERS_PER_TOKEN
    tokens = len(found) * (text + sum(PICTURE_TOKENS + TILE_TOKENS * number for number in tiles))
    return Estimate(len(found), len(found) * len(pictures), tokens, tokens * price_per_million / 1e6)


def _shown(
    found: Mapping[int, Mapping[str, Int64[np.ndarray, "k"]]], exemplars: ExemplarStore, *, seed: int
) -> Iterator[tuple[int, list[str], list[NeighbourSet]]]:
    """Each query with the methods in the order in which they are shown, and their neighbours' images."""
    for query, sets in found.items():
        if len(sets) > len(ascii_uppercase) or len({len(rows) for rows in sets.values()}) != 1:
            raise InputError("expected at most 26 methods with equally many neighbours each; measure them in one run")
        methods = sorted(sets)
        order = [methods[place] for place in np.random.default_rng((seed, query)).permutation(len(methods))]
        yield query, order, [exemplars.images(sets[method]) for method in order]


def section(run: Run, _: Sheet) -> list[str]:
    """A row for each method."""
    rows = []
    for (method,), cell in grouped(run.records, "method").items():
        judged = [record | {"share": record["alike"] / record["k"]} for record in cell if record["alike"] is not None]
        rows.append(
            {
                "method": method,
                "queries": str(count(cell)),
                "judged alike": mean(judged, "share"),
                "preferred": rate([bool(record["preferred"]) for record in judged], judged),
                "no verdict": str(len(cell) - len(judged)),
            }
        )
    return [table(rows)]


FIELDS = ("query", "method", "alike", "k", "preferred")
BENCHMARK = Benchmark(command, Reported("A judge's view", KEY, FIELDS, section))
