"""What a candidate set gives up: how much of exact TMM's top 10 the candidates of each prefilter contain.

And what the global trigger gives up: the rank at which it, and the query's own trigger, find the true exemplar.
"""

from collections.abc import Sequence
from typing import Any

import click
import numpy as np
import torch
from jaxtyping import Int64
from rich.console import Console
from rich.table import Table

from tmm_engine.bench.attack import features_of
from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.loading import load_suite, parse_few, parse_methods
from tmm_engine.bench.noise import Image, Perturbation
from tmm_engine.bench.options import check_folders, out_option, perturbations_option, sized
from tmm_engine.bench.records import Record, RecordFile, read_records
from tmm_engine.bench.suite import Suite
from tmm_engine.bench.tables import count, grouped, mean, table
from tmm_engine.cli.display import progress_bar
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import in_turn
from tmm_engine.index.neighbours.search import Neighbours
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank.columns import global_columns
from tmm_engine.rerank.global_trigger import make_global_trigger
from tmm_engine.rerank.settings import preset
from tmm_engine.rerank.tmm import TmmNN

TOP = 10
SIZES = (200, 1_000, 5_000)
"""M, the numbers of candidates."""
KEY = ("query", "perturbation")


@click.command("candidates")
@click.argument("source")
@sized(exemplars=10_000, queries=20)
@perturbations_option
@out_option
def command(source: str, **options: Any) -> None:
    """What do candidate sets and the global trigger give up? Beside exact search with the query's own trigger.

    \b
    Example:
      engine bench candidates mnist --root data --model resnet18 --weights mnist.safetensors --out candidates.jsonl
    """
    perturbations, methods = parse_few(options["perturbations"]), parse_methods("paper")
    check_folders(options["out"])
    with progress_bar() as progress:
        suite = load_suite(source, options, progress)
        queries = suite.queries(options["queries"])
        with suite.records(options["out"], "candidates", methods, KEY) as records:
            measure_candidates(suite, queries, perturbations, records, progress=progress)
    print_candidates(read_records(options["out"]).records)


def measure_candidates(
    suite: Suite,
    queries: Int64[np.ndarray, "q"],
    perturbations: Sequence[Perturbation],
    record_file: RecordFile,
    *,
    progress: Progress = silent,
) -> None:
    """Exact searches for exemplars under every perturbation, and what each prefilter would have kept.

    A record holds ``recall``, the share of exact TMM's top 10 among the candidates, by prefilter and M
    (``"cosine 1000"``), and the ranks of the true exemplar, 0 is first: ``rank_query`` in the exact search with the
    query's own trigger, ``rank_global`` with the global one, ``rank_cosine`` by cosine similarity.

    Args:
        suite: Exemplars and classifier.
        queries: Rows of the suite's store.
        perturbations: What is done to each query.
        record_file: Opened with KEY; what it has already is not measured again.
        progress: Told of the searches done.
    """
    searches = _Searches(suite, progress)
    total, done = len(queries) * len(perturbations), 0
    for row in queries.tolist():
        image = suite.store.images(np.array([row]))[0].astype(np.float32) / np.float32(255.0)
        noise = int(np.random.SeedSequence((suite.seed, row)).generate_state(1)[0])
        for perturbation in perturbations:
            key = {"query": str(suite.store.ids[row]), "perturbation": perturbation.name}
            if not record_file.done(**key):
                query = perturbation.apply(image, seed=noise, embedding=features_of(suite.classifier))
                record_file.append(key | searches.measured(query, row))
            done += 1
            progress("searching", done, total)


class _Searches:
    """Exact search, its global trigger, and the prefilters, over the exemplars of a suite."""

    def __init__(self, suite: Suite, progress: Progress) -> None:
        self._classifier, store = suite.classifier, suite.store
        rows = np.arange(len(store))
        source = ArraySource(store.images(rows), store.labels, name=suite.data_set)
        self._config = preset("paper")
        shared = make_global_trigger(source, self._classifier, self._config, progress=progress)
        self._by_global = shared.as_asked_of(self._config)
        self._store = MemoryStore.of(source, self._classifier, columns=global_columns(shared, self._classifier))
        self._tmm = TmmNN(self._classifier, self._store, global_trigger=shared)
        self._nearest = {metric: Neighbours(self._store, metric) for metric in Metric}

    def measured(self, image: Image, row: int) -> Record:
        """Recall and ranks of one query, whose true exemplar is in this row."""
        n = len(self._store)
        query = torch.from_numpy(image).to(self._classifier.device)
        with torch.inference_mode():
            features = self._classifier.features(query[None]).cpu().numpy()
        exact = self._tmm.rank(query, k=n, config=self._config).rows
        rankings = {str(metric): found.search(features, k=n)[0][0] for metric, found in self._nearest.items()}
        rankings["union"] = in_turn((rankings["l2"], rankings["cosine"]))
        rankings["global"] = self._tmm.rank(query, k=n, config=self._by_global).rows
        recall = {
            f"{prefilter} {size}": len(np.intersect1d(ranking[:size], exact[:TOP])) / TOP
            for prefilter, ranking in rankings.items()
            for size in SIZES
            if size < n
        }
        named = {"query": exact, "global": rankings["global"], "cosine": rankings["cosine"]}
        ranks = {f"rank_{name}": int(np.flatnonzero(ranking == row)[0]) for name, ranking in named.items()}
        return {"recall": recall} | ranks


def summarise(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each perturbation: mean recall of every prefilter and M, and median ranks of the true exemplar."""
    rows = []
    for name in dict.fromkeys(record["perturbation"] for record in records):
        chosen = [record for record in records if record["perturbation"] == name]
        recall = {key: float(np.mean([record["recall"][key] for record in chosen])) for key in chosen[0]["recall"]}
        ranks = {
            f"median rank, {kind}": float(np.median([record[f"rank_{kind}"] for record in chosen]))
            for kind in ("query", "global", "cosine")
        }
        rows.append({"perturbation": name, "queries": len(chosen)} | recall | ranks)
    return rows


def print_candidates(records: Sequence[Record]) -> None:
    """The summary as a table on stdout: a column for each perturbation."""
    columns = summarise(records)
    table = Table("", *(column["perturbation"] for column in columns), box=None)
    for name in list(columns[0])[2:]:
        recall = not name.startswith("median")
        label = f"recall, {name}" if recall else f"{name} trigger" if "cosine" not in name else name
        table.add_row(label, *(f"{column[name]:.2f}" if recall else f"{column[name]:,.1f}" for column in columns))
    console = Console()
    console.print(table)
    console.print(
        f"{columns[0]['queries']} queries; recall of exact TMM's top {TOP} in the candidates; rank 0 is first",
        highlight=False,
    )


def section(run: Run, _: Sheet) -> list[str]:
    """Recall of each prefilter, and ranks, for each perturbation."""
    rows = []
    for (perturbation,), cell in grouped(run.records, "perturbation").items():
        recalled = {
            name: [{"query": r["query"], "recall": r["recall"][name]} for r in cell] for name in cell[0]["recall"]
        }
        rows.append(
            {"perturbation": perturbation, "queries": str(count(cell))}
            | {f"recall, {name}": mean(found, "recall") for name, found in recalled.items()}
            | {
                f"median rank, {kind}": f"{np.median([record[f'rank_{kind}'] for record in cell]):,g}"
                for kind in ("query", "global", "cosine")
            }
        )
    return [table(rows), "Recall: the share of exact TMM's top 10 that is among the M candidates of a prefilter."]


FIELDS = ("query", "perturbation", "recall", "rank_query", "rank_global", "rank_cosine")
BENCHMARK = Benchmark(command, Reported("Candidate sets", KEY, FIELDS, section))
