"""Do the neighbours of queries nobody has seen stay the same under noise, and of the same kind?

A held-out query has no true exemplar; what its method answers to the clean query stands in for it, and its label.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import click
import numpy as np
from jaxtyping import Float32, Int64

from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.loading import load_held_out, parse_few, parse_methods
from tmm_engine.bench.noise import Family, Perturbation
from tmm_engine.bench.options import check_folders, held_out_options, k_option, methods_option, out_option
from tmm_engine.bench.records import Record, RecordFile
from tmm_engine.bench.retrievers import Recogniser, Retriever, top
from tmm_engine.bench.self_retrieval import scores_under
from tmm_engine.bench.tables import NONE, count, difference, folded, grouped, mean, plain_text, rate, table
from tmm_engine.cli.display import progress_bar
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.exemplars import ExemplarStore

KEY = ("query", "perturbation", "method")
RIVAL = "cosine,stretch=true"  # what the others are compared with, where it was measured
DEFAULT = (
    "brightness 0.4,contrast 0.4,gaussian 2.5,gaussian 5,blur 1,jpeg 15,shift 2,rotation 10,crop 0.85,occlusion 0.25"
)


@click.command("unseen")
@click.argument("source")
@held_out_options
@methods_option
@k_option
@click.option("--perturbations", default=DEFAULT, show_default=True, help="Each a family and a level, by commas.")
@out_option
def command(source: str, **options: Any) -> None:
    """Do the neighbours of held-out queries stay the same under noise? Overlap, labels, copies seen where none is.

    \b
    Examples:
      engine bench unseen mnist --root data --model resnet18 --weights mnist.safetensors --out unseen.jsonl
      engine bench unseen cifar10/ --weights c.safetensors --model resnet18 --queries 100 \\
          --methods 'cosine;cosine,stretch=true;robust;robust,views=1' --out runs/unseen.jsonl
    """
    perturbations, methods = parse_few(options["perturbations"]), parse_methods(options["methods"])
    check_folders(options["out"])
    with progress_bar() as progress:
        held = load_held_out(source, options, progress)
        settings = {"k": options["k"], "query_source": held.source}
        with held.suite.records(options["out"], "unseen", methods, KEY, **settings) as records:
            measure_unseen(
                held.suite.retrievers(methods, progress=progress),
                held.queries,
                held.labels,
                held.suite.store,
                records,
                perturbations=perturbations,
                classifier=held.suite.classifier,
                k=options["k"],
                seed=options["seed"],
                progress=progress,
            )
    click.echo(f"{options['out']}: {len(held.queries)} queries from {held.source}, {len(methods)} methods")


def measure_unseen(
    retrievers: Sequence[Retriever],
    queries: Float32[np.ndarray, "q c h w"],
    labels: Int64[np.ndarray, "q"],
    exemplars: ExemplarStore,
    record_file: RecordFile,
    *,
    perturbations: Sequence[Perturbation],
    classifier: Classifier,
    k: int = 10,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Append a record for every query × perturbation × method that has none yet; the clean query comes first.

    A record holds ``overlap`` of the top k with the method's own for the clean query, in [0, 1], ``label_precision``
    (share of the k with the query's label), ``knn_correct`` (whether most of them have it; ties go to the nearest) and
    ``recognised``: whether the method took the query for a copy of an exemplar, wrongly; null where it does not
    recognise copies. That of the clean query holds its ``neighbours`` too.

    Args:
        retrievers: All see the same queries and the same noise.
        queries: Pixels in [0, 1]; none is an exemplar.
        labels: One per query, in the exemplars' classes.
        exemplars: What the retrievers search, row by row.
        record_file: Opened with KEY.
        perturbations: What is done to each.
        classifier: Whose features PGD moves.
        k: Neighbours looked at.
        seed: Of the noise; each query draws its own.
        progress: Told of searches done.

    Raises:
        InputError: no such k.
    """
    if not 1 <= k <= len(exemplars):
        raise InputError(f"expected k from 1 to {len(exemplars)}, the number of exemplars, got {k}")
    clean = Perturbation(Family.CLEAN, 0.0)
    ordered = [clean, *(one for one in perturbations if one != clean)]
    total, done = len(queries) * len(ordered), 0
    for query, (image, label) in enumerate(zip(queries, labels.tolist(), strict=True)):
        noise = int(np.random.SeedSequence((seed, query)).generate_state(1)[0])
        answers: dict[str, list[str]] = {}
        for perturbation in ordered:
            key = {"query": query, "perturbation": perturbation.name}
            known = {one.name: record_file.find(**key, method=one.name) for one in retrievers}
            answers |= {name: found["neighbours"] for name, found in known.items() if found and perturbation is clean}
            missing = [one for one in retrievers if known[one.name] is None]
            for retriever, scores in scores_under(perturbation, image, missing, seed=noise, classifier=classifier):
                rows = top(scores, exemplars.ids, k)
                ids, found = exemplars.ids[rows].tolist(), exemplars.labels[rows].tolist()
                before = answers.setdefault(retriever.name, ids)
                about = {"family": str(perturbation.family), "level": perturbation.level, "method": retriever.name}
                measured = {
                    "overlap": len(set(ids) & set(before)) / k,
                    "label_precision": found.count(label) / k,
                    "knn_correct": Counter(found).most_common(1)[0][0] == label,
                    "recognised": _recognised(retriever, perturbation, image, noise, classifier),
                }
                record_file.append(key | about | measured | ({"neighbours": ids} if perturbation is clean else {}))
            done += 1
            progress("searching", done, total)


def _recognised(
    retriever: Retriever,
    perturbation: Perturbation,
    image: Float32[np.ndarray, "c h w"],
    seed: int,
    classifier: Classifier,
) -> bool | None:
    if not isinstance(retriever, Recogniser) or perturbation.family in (Family.PGD, Family.ADAPTIVE):
        return None
    found = retriever.recognised(perturbation.apply(image, seed=seed))
    return None if found is None else found.share >= 0.5


def section(run: Run, _: Sheet) -> list[str]:
    """Over all noise, a row for each method, the best overlap first; all perturbations folded away."""
    by_method = {method: cell for (method,), cell in grouped(run.records, "method").items()}
    rows = [_row(method, cell, by_method.get(RIVAL, [])) for method, cell in by_method.items()]
    rows.sort(key=lambda row: row["overlap, noise"], reverse=True)
    detail = [
        {
            "perturbation": plain_text(perturbation),
            "method": method,
            "overlap": mean(cell, "overlap"),
            "label precision": mean(cell, "label_precision"),
            "k-NN accuracy": rate([bool(record["knn_correct"]) for record in cell], cell),
        }
        for (perturbation, method), cell in grouped(run.records, "perturbation", "method").items()
    ]
    note = (
        "Overlap: the share of the top k that the method's own answer to the clean query has too. Differences are to "
        f"{RIVAL}, paired by query. Taken for copies: wrongly, for no query is an exemplar."
    )
    return [table(rows), note, *folded("Every perturbation", table(detail))]


def _row(method: str, cell: list[Record], rival: list[Record]) -> dict[str, str]:
    clean = [record for record in cell if record["family"] == "clean"]
    noisy = [record for record in cell if record["family"] != "clean"]
    asked = [record for record in cell if record["recognised"] is not None]
    return {
        "method": method,
        "queries": str(count(cell)),
        "overlap, noise": mean(noisy, "overlap"),
        "overlap, difference": difference(noisy, rival, "overlap"),
        "label precision, clean": mean(clean, "label_precision"),
        "label precision, noise": mean(noisy, "label_precision"),
        "label precision, difference": difference(noisy, rival, "label_precision"),
        "k-NN accuracy, noise": rate([bool(record["knn_correct"]) for record in noisy], noisy),
        "taken for copies": rate([bool(record["recognised"]) for record in asked], asked) if asked else NONE,
    }


FIELDS = ("query", "perturbation", "family", "method", "overlap", "label_precision", "knn_correct", "recognised")
BENCHMARK = Benchmark(command, Reported("Held-out queries under noise", KEY, FIELDS, section))
