"""How alike in meaning the neighbours of held-out queries are: by label, by structure, and to the eye (a gallery).

A held-out query has no true exemplar to find, so what counts is whether its neighbours show the same kind of thing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from jaxtyping import Float32, Int64

from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.gallery import SHOWN, draw_gallery
from tmm_engine.bench.loading import load_held_out, parse_methods
from tmm_engine.bench.options import check_folders, held_out_options, k_option, methods_option, out_option
from tmm_engine.bench.records import Record, RecordFile, read_records
from tmm_engine.bench.retrievers import Recogniser, Retriever, top
from tmm_engine.bench.ssim import ssim
from tmm_engine.bench.tables import NONE, count, grouped, mean, rate, table
from tmm_engine.cli.display import progress_bar
from tmm_engine.index.errors import InputError
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.exemplars import ExemplarStore

KEY = ("query", "method")
"""What tells the records of `measure_semantic` and of the oracle apart."""

Neighbours = Mapping[int, Mapping[str, Sequence[str]]]
"""Query -> method -> ids of its neighbours, nearest first."""


@click.command("semantic")
@click.argument("source")
@held_out_options
@methods_option
@k_option
@click.option(
    "--gallery", type=click.Path(path_type=Path), help="Write a picture of the first queries' top 3 (Fig. 4)."
)
@out_option
def command(source: str, **options: Any) -> None:
    """Do held-out queries find their own kind? Label precision, k-NN accuracy, SSIM, and a gallery (Fig. 4).

    \b
    Examples:
      engine bench semantic mnist --root data --model resnet18 --weights mnist.safetensors --out semantic.jsonl
      engine bench semantic photos/ --query-source more-photos/ --model resnet18 --weights w.safetensors \\
          --methods 'cosine;paper' --queries 20 --gallery gallery.png --out runs/semantic.jsonl
    """
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
        sets = neighbour_rows(options["out"], held.queries, held.suite.store)
        draw_gallery(
            sets, held.queries, held.labels, held.suite.store, options["gallery"], class_names=held.class_names
        )
    click.echo(f"{options['out']}: {len(held.queries)} queries from {held.source}, {len(methods)} methods")


def measure_semantic(
    retrievers: Sequence[Retriever],
    queries: Float32[np.ndarray, "q c h w"],
    labels: Int64[np.ndarray, "q"],
    exemplars: ExemplarStore,
    record_file: RecordFile,
    *,
    k: int = 10,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Search for queries that are not exemplars, and append one record for each query and method.

    A record holds ``query`` (position in ``queries``), ``method``, ``label``, ``label_precision`` (share of the k
    neighbours with the query's label), ``knn_correct`` (whether most of them have it; ties go to the nearest),
    ``ssim`` (mean SSIM of the query with its nearest three), ``recognised`` (whether the method took it for a copy of
    an exemplar, wrongly: it is held out; null where it does not recognise copies) and ``neighbours`` (k ids, nearest
    first). What the file has already is not measured again.

    Args:
        retrievers: The methods; their names are unique.
        queries: Pixels in [0, 1].
        labels: One per query, in the exemplars' classes.
        exemplars: What the retrievers search, row by row.
        record_file: Keyed by `KEY`.
        k: Neighbours, at most as many as there are exemplars.
        seed: Handed to every search.
        progress: Told of the searches done.

    Raises:
        InputError: names that are not unique, or no such k.
    """
    _check(retrievers, exemplars, k)
    done, total = 0, len(queries) * len(retrievers)
    for query, (image, label) in enumerate(zip(queries, labels.tolist(), strict=True)):
        for retriever in retrievers:
            if not record_file.done(query=query, method=retriever.name):
                rows = top(retriever.scores(image, seed=seed), exemplars.ids, k)
                found = {"label": label, "recognised": _recognised(retriever, image)}
                found |= _judged(image, label, rows, exemplars)
                record_file.append({"query": query, "method": retriever.name} | found)
            done += 1
            progress("searching", done, total)


def read_neighbours(semantic: Path) -> dict[int, dict[str, list[str]]]:
    """The neighbour sets in the records of `measure_semantic`: query -> method -> ids, nearest first.

    Raises:
        InputError: not such records, none, or not of every method for every query (an interrupted run).
    """
    sets: dict[int, dict[str, list[str]]] = {}
    try:
        for record in read_records(semantic).records:
            sets.setdefault(record["query"], {})[record["method"]] = record["neighbours"]
    except KeyError as missing:
        raise InputError(f"{semantic}: expected records of the semantic benchmark, got one without {missing}") from None
    methods = {method for found in sets.values() for method in found}
    lacking = [query for query, found in sets.items() if found.keys() != methods]
    if lacking or not sets:
        problem = f"query {lacking[0]} lacks methods" if lacking else "there are none"
        raise InputError(
            f"{semantic}: expected neighbours by every method, but {problem}; run the benchmark to its end"
        )
    return dict(sorted(sets.items()))


def rows_of(ids: Sequence[str], rows: Mapping[str, int]) -> Int64[np.ndarray, "k"]:
    """The rows of exemplars, by the row of every id.

    Raises:
        InputError: there is no exemplar of an id.
    """
    try:
        return np.array([rows[name] for name in ids], dtype=np.int64)
    except KeyError as missing:
        raise InputError(
            f"no exemplar has the id {missing}; give the exemplars that the records were made with"
        ) from None


def neighbour_rows(
    semantic: Path, queries: Float32[np.ndarray, "q c h w"], exemplars: ExemplarStore
) -> dict[int, dict[str, Int64[np.ndarray, "k"]]]:
    """As `read_neighbours`, each set as rows of the exemplars.

    Raises:
        InputError: as `read_neighbours`, or the records are not of these queries and exemplars.
    """
    found = read_neighbours(semantic)
    check_queries(found, queries)
    row_of = {name: row for row, name in enumerate(exemplars.ids)}
    return {query: {method: rows_of(ids, row_of) for method, ids in sets.items()} for query, sets in found.items()}


def check_queries(sets: Neighbours, queries: Float32[np.ndarray, "q c h w"]) -> None:
    """Refuse queries that cannot be those of the records.

    Raises:
        InputError: the records have a query that is not there.
    """
    if max(sets) >= len(queries):
        raise InputError(
            f"expected the queries that the records were made with, but they have query {max(sets)} and there are only "
            f"{len(queries)}; give the same source, number and seed"
        )


def section(run: Run, _: Sheet) -> list[str]:
    """A row for each method."""
    rows = [
        {
            "method": method,
            "queries": str(count(cell)),
            "label precision": mean(cell, "label_precision"),
            "k-NN accuracy": rate([bool(record["knn_correct"]) for record in cell], cell),
            "SSIM of the top 3": mean(cell, "ssim"),
            "taken for copies": _taken_for_copies(cell),
        }
        for (method,), cell in grouped(run.records, "method").items()
    ]
    return [table(rows)]


def _recognised(retriever: Retriever, image: Float32[np.ndarray, "c h w"]) -> bool | None:
    found = retriever.recognised(image) if isinstance(retriever, Recogniser) else None
    return None if found is None else found.share >= 0.5


def _judged(
    image: Float32[np.ndarray, "c h w"], label: int, rows: Int64[np.ndarray, "k"], exemplars: ExemplarStore
) -> dict[str, Any]:
    labels = exemplars.labels[rows].tolist()
    nearest = exemplars.images(rows[:SHOWN]).astype(np.float32) / 255
    return {
        "label_precision": labels.count(label) / len(labels),
        "knn_correct": Counter(labels).most_common(1)[0][0]
        == label,  # of equally common, the first counted: the nearest
        "ssim": float(ssim(image, nearest).mean()),
        "neighbours": exemplars.ids[rows].tolist(),
    }


def _check(retrievers: Sequence[Retriever], exemplars: ExemplarStore, k: int) -> None:
    names = [retriever.name for retriever in retrievers]
    if len(set(names)) != len(names):
        raise InputError(f"expected methods with names of their own, got {', '.join(names)}; leave out the repeated")
    if not 1 <= k <= len(exemplars):
        raise InputError(f"expected k from 1 to {len(exemplars)}, the number of exemplars, got {k}")


def _taken_for_copies(cell: list[Record]) -> str:
    asked = [record for record in cell if record.get("recognised") is not None]
    return rate([record["recognised"] for record in asked], asked) if asked else NONE


FIELDS = ("query", "method", "label_precision", "knn_correct", "ssim")
BENCHMARK = Benchmark(command, Reported("Held-out queries", KEY, FIELDS, section))
