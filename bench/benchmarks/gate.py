"""Can an attack pass a query off as another exemplar? Aimed at what a method ranks and recognises copies by, together.

The attack moves the query towards the exemplar of another class that the method itself puts first, through all that the
method computes: symmetric views and both descriptors of mode robust, or the features of a plain metric.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import click
import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tmm_engine.bench.attack import pgd
from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.loading import load_held_out, parse_methods
from tmm_engine.bench.noise import Image
from tmm_engine.bench.options import check_folders, held_out_options, k_option, methods_option, out_option
from tmm_engine.bench.radii import derived
from tmm_engine.bench.records import Record, RecordFile
from tmm_engine.bench.retrievers import Recogniser, Retriever, rank_of, top
from tmm_engine.bench.tables import NONE, count, grouped, mean, plain_text, rate, table
from tmm_engine.cli.display import progress_bar
from tmm_engine.index.errors import InputError
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.memory import MemoryStore

KEY = ("job", "query", "bound", "method")
VERY_IMAGE, UNSEEN = "the very image", "unseen"


@dataclass(frozen=True)
class Query:
    """An image that is searched for.

    Attributes:
        job: VERY_IMAGE for an exemplar, UNSEEN for an image that is none.
        name: For the records.
        image: In [0, 1].
        label: In the exemplars' classes.
        row: Of the exemplar that it is, if it is one.
    """

    job: str
    name: str
    image: Image
    label: int
    row: int | None = None


def _bounds(_: click.Context, __: click.Parameter, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= bound < float("inf") for bound in found):
        raise click.BadParameter(f"expected L2 norms by commas, as in 0.5,1, got {text!r}")
    return found


@click.command("gate")
@click.argument("source")
@held_out_options
@methods_option
@k_option
@click.option(
    "--bounds",
    default="0.5,1,2.5",
    show_default=True,
    callback=_bounds,
    help="On the L2 norm of the attack, by commas.",
)
@out_option
def command(source: str, **options: Any) -> None:
    """Can an attack pass a query off as another exemplar? Towards a wrong one, on all that the method looks at.

    \b
    Examples:
      engine bench gate mnist --root data --model resnet18 --weights mnist.safetensors --queries 30 --out gate.jsonl
      engine bench gate cifar10/ --weights c.safetensors --model resnet18 --methods 'cosine,stretch=true;robust' \\
          --bounds 0.25,0.5 --out runs/gate.jsonl
    """
    methods = parse_methods(options["methods"])
    check_folders(options["out"])
    with progress_bar() as progress:
        held = load_held_out(source, options, progress)
        store = held.suite.store
        rows = held.suite.queries(options["queries"])
        pixels = store.images(rows).astype(np.float32) / np.float32(255.0)
        queries = [
            Query(VERY_IMAGE, str(store.ids[row]), image, int(store.labels[row]), int(row))
            for row, image in zip(rows, pixels, strict=True)
        ]
        queries += [
            Query(UNSEEN, f"{held.source} {number}", image, int(label))
            for number, (image, label) in enumerate(zip(held.queries, held.labels, strict=True))
        ]
        with held.suite.records(
            options["out"], "gate", methods, KEY, k=options["k"], query_source=held.source
        ) as records:
            measure_gate(
                held.suite.retrievers(methods, progress=progress),
                queries,
                store,
                records,
                bounds=options["bounds"],
                k=options["k"],
                seed=options["seed"],
                progress=progress,
            )
    click.echo(f"{options['out']}: {len(queries)} queries, {len(methods)} methods")


def measure_gate(
    retrievers: Sequence[Retriever],
    queries: Sequence[Query],
    exemplars: MemoryStore,
    record_file: RecordFile,
    *,
    bounds: Sequence[float],
    k: int = 10,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Append a record for every query × bound × method that has none yet; the bound 0 is the query as it is.

    A record holds the ``target`` and its ``rank`` (0 is first); ``first``: whether what was first for the clean query
    still is; ``overlap`` of the top k with those of the clean query; ``label_precision``: the share of the k best, the
    query itself left out, with its label; ``taken``: whether the query was taken for a copy of the target, and
    ``mistaken``: of any exemplar that it is not, both null where the method does not recognise copies.

    Args:
        retrievers: Each is attacked by itself.
        queries: Exemplars and others.
        exemplars: What the retrievers search, row by row.
        record_file: Opened with KEY.
        bounds: On the L2 norm of the change.
        k: Neighbours looked at.
        seed: Of the attack's start; each query of a job draws its own, the same for all methods and bounds.
        progress: Told of attacks done.

    Raises:
        InputError: no such k, or all exemplars are of a query's class.
    """
    if not 1 <= k < len(exemplars):
        raise InputError(f"expected k in [1, {len(exemplars) - 1}], fewer than the exemplars, got {k}")
    wanted = [0.0, *(bound for bound in dict.fromkeys(bounds) if bound)]
    total, done = len(queries) * len(retrievers) * len(wanted), 0
    numbers: Counter[str] = Counter()
    for query in queries:
        number, numbers[query.job] = numbers[query.job], numbers[query.job] + 1
        for retriever in retrievers:
            attack = _Attack(retriever, query, exemplars, k, derived(seed, number))
            for bound in wanted:
                key = {"job": query.job, "query": query.name, "bound": bound, "method": retriever.name}
                if not record_file.done(**key):
                    record_file.append(key | attack.measured(bound))
                done += 1
                progress("attacking", done, total)


@dataclass(frozen=True)
class _Attack:
    retriever: Retriever
    query: Query
    exemplars: MemoryStore
    k: int
    seed: int

    def measured(self, bound: float) -> Record:
        """What the method answers to the query moved so far."""
        image = self.query.image if bound == 0 else self._moved(bound)
        scores = self.retriever.scores(image)
        best, before = self._best(scores), self._best(self._clean)
        others = top(scores, self.exemplars.ids, self.k, without=self.query.row)
        return {
            "target": str(self.exemplars.ids[self._target]),
            "rank": rank_of(scores, self.exemplars.ids, self._target),
            "first": bool(best[0] == before[0]),
            "overlap": len(set(best.tolist()) & set(before.tolist())) / self.k,
            "label_precision": float((self.exemplars.labels[others] == self.query.label).mean()),
        } | self._taken(image)

    @cached_property
    def _clean(self) -> Float[np.ndarray, "n"]:
        return self.retriever.scores(self.query.image)

    @cached_property
    def _target(self) -> int:
        """The best of another class."""
        wrong = np.flatnonzero(self.exemplars.labels != self.query.label)
        if not len(wrong):
            raise InputError(f"{self.query.name}: expected exemplars of another class to move it to, got none")
        return int(wrong[top(self._clean[wrong], self.exemplars.ids[wrong], 1)[0]])

    @cached_property
    def _towards(self) -> Float[Tensor, "1 e"]:
        image = self.exemplars.images(np.array([self._target])).astype(np.float32) / np.float32(255.0)
        with torch.no_grad():
            return self.retriever.embedding(torch.from_numpy(image))

    def _moved(self, bound: float) -> Image:
        start = np.random.default_rng(self.seed)
        moved = pgd(self.query.image, start, self.retriever.embedding, bound=bound, towards=self._towards)
        return np.clip(moved, 0, 1)  # rounding may have left the range

    def _best(self, scores: Float[np.ndarray, "n"]) -> Int64[np.ndarray, "k"]:
        return top(scores, self.exemplars.ids, self.k)

    def _taken(self, image: Image) -> dict[str, bool | None]:
        found = self.retriever.recognised(image) if isinstance(self.retriever, Recogniser) else None
        if found is None:
            return {"taken": None, "mistaken": None}
        copy = found.share >= 0.5
        return {"taken": copy and found.row == self._target, "mistaken": copy and found.row != self.query.row}


def section(run: Run, _: Sheet) -> list[str]:
    """A table for each job: by bound and method."""
    blocks = []
    for (job,), records in grouped(run.records, "job").items():
        cells = sorted(grouped(records, "bound", "method").items(), key=lambda cell: cell[0][0])
        rows = [{"bound": plain_text(bound), "method": method} | _row(cell) for (bound, method), cell in cells]
        blocks += [f"**Job: {job}**", table(rows)]
    note = (
        "Each method meets its own attack, towards the exemplar of another class that it puts first, through all that "
        "it looks at. Passed off: that exemplar is first. Taken: for a copy of it; mistaken: for a copy of any "
        "exemplar that the query is not."
    )
    return [*blocks, note]


def _row(cell: list[Record]) -> dict[str, str]:
    asked = [record for record in cell if record["taken"] is not None]

    def share(field: str) -> str:
        return rate([bool(record[field]) for record in asked], asked) if asked else NONE

    return {
        "queries": str(count(cell)),
        "passed off": rate([record["rank"] == 0 for record in cell], cell),
        "taken": share("taken"),
        "mistaken": share("mistaken"),
        "first kept": rate([bool(record["first"]) for record in cell], cell),
        "overlap": mean(cell, "overlap"),
        "label precision": mean(cell, "label_precision"),
    }


FIELDS = ("job", "query", "bound", "method", "rank", "first", "overlap", "label_precision", "taken", "mistaken")
BENCHMARK = Benchmark(command, Reported("Attacks aimed at the gate", KEY, FIELDS, section))
