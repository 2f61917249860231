"""Foreign exemplars mixed in: how often does one outrank the true exemplar? (§3.4.6.)

The query is a perturbed exemplar, which stays in the set. With M foreign exemplars in it the paper bounds the
probability that any of them outranks the true one by

    M · exp(−Δ² / 2σ²)

==============  ==================================================================================================
symbol          estimated here, for each query, perturbation and method by itself
==============  ==================================================================================================
M               how many foreign exemplars there are
Δ               the true exemplar's score minus the mean of the foreign exemplars' scores
σ               the standard deviation of the foreign exemplars' scores
==============  ==================================================================================================

This is a union bound over Gaussian tails: it assumes that foreign scores are Gaussian (or have tails no heavier), which
nothing guarantees, and Δ and σ come from the very scores whose order is observed. So an observed rate above the bound
says that the assumption fails, not that the bound's proof does. Clipped to [0, 1]; where Δ is not above 0 it says
nothing, and is 1.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from jaxtyping import Float, Int64, UInt8

from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.loading import load_suite, parse_few, parse_methods
from tmm_engine.bench.noise import Perturbation
from tmm_engine.bench.options import check_folders, perturbations_option, suite_options
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.retrievers import Retriever, make_retrievers, rank_of
from tmm_engine.bench.self_retrieval import scores_under
from tmm_engine.bench.suite import Suite
from tmm_engine.bench.tables import count, grouped, mean, plain_text, rate, table
from tmm_engine.cli.display import progress_bar
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.sources.records import ImageRecord, ImageSource
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.index.types import ImageShape
from tmm_engine.rerank.columns import StretchedColumn

KEY = ("query", "level", "method", "foreign")
NOISE = "noise"  # the name of foreign exemplars of uniform noise


@click.command("ood")
@click.argument("source")
@suite_options
@click.option("--foreign", required=True, metavar="OTHER", help="Images that do not belong: a source, or 'noise'.")
@click.option("--foreign-split", metavar="SPLIT", help="Split of OTHER. Default: train.")
@click.option("--foreign-root", type=click.Path(path_type=Path), help="Where OTHER is, if it is a data set's name.")
@click.option("--foreign-count", type=click.IntRange(min=1), default=500, show_default=True, help="A random subset.")
@perturbations_option
def command(source: str, **options: Any) -> None:
    """How often does a foreign exemplar outrank the true one? Beside it, the paper's bound (§3.4.6).

    OTHER is brought to the shape of SOURCE; 'noise' means images of uniform noise.

    \b
    Examples:
      engine bench ood mnist --root data --model resnet18 --weights mnist.safetensors --foreign noise --out noise.jsonl
      engine bench ood mnist --root data --model resnet18 --weights mnist.safetensors --foreign cifar10/ \\
          --methods 'cosine;paper' --queries 20 --out runs/foreign.jsonl
    """
    perturbations, methods = parse_few(options["perturbations"]), parse_methods(options["methods"])
    check_folders(options["out"])
    other, count, seed = options["foreign"], options["foreign_count"], options["seed"]
    where = {"split": options["foreign_split"], "root": options["foreign_root"]}
    foreign = None if other == NOISE else open_source(other, **where)
    with progress_bar() as progress:
        suite = load_suite(source, options, progress)
        shape, queries = suite.classifier.image_shape, suite.queries(options["queries"])
        if foreign is None:
            images = noise_images(count, shape, seed=seed)
        else:
            images = foreign_images(foreign, count, suite.classifier.target, seed=seed, progress=progress)
        store = mixed(suite, images)
        with suite.records(options["out"], "ood", methods, KEY, foreign_count=len(images)) as records:
            measure_foreign(
                make_retrievers(methods, suite.classifier, store, triggers=suite.triggers, progress=progress),
                queries,
                store,
                perturbations,
                records,
                foreign=foreign.name if foreign else NOISE,
                foreign_count=len(images),
                classifier=suite.classifier,
                seed=seed,
                progress=progress,
            )
    click.echo(f"{options['out']}: {len(queries)} queries, {len(images)} foreign exemplars, {len(methods)} methods")


def noise_images(count: int, shape: ImageShape, *, seed: int) -> UInt8[np.ndarray, "m c h w"]:
    """Images of independent uniform pixels."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def foreign_images(
    source: ImageSource, count: int, shape: Target, *, seed: int, progress: Progress = silent
) -> UInt8[np.ndarray, "m c h w"]:
    """A seeded random subset of a source's readable images, brought to a shape; all where there are fewer.

    Raises:
        InputError: no image can be read.
    """
    images: list[UInt8[np.ndarray, "c h w"]] = []
    for record in source.read(shape):
        if isinstance(record, ImageRecord):
            images.append(record.image)
        progress("reading foreign images", len(images), len(source))
    if not images:
        raise InputError(f"{source.name}: no image could be read")
    return np.stack([images[row] for row in np.random.default_rng(seed).permutation(len(images))[:count]])


def mixed(suite: Suite, foreign: UInt8[np.ndarray, "m c h w"]) -> MemoryStore:
    """The suite's exemplars in their rows, and behind them the foreign ones, labelled as the model sees them."""
    store, source = suite.store, ArraySource(foreign, ids=[f"foreign/{row:08d}" for row in range(len(foreign))])
    others = MemoryStore.of(source, suite.classifier, columns=[StretchedColumn(suite.classifier)])
    rows, other_rows = np.arange(len(store)), np.arange(len(others))
    return MemoryStore(
        np.concatenate([store.images(rows), foreign]),
        {
            name: np.concatenate([store.features(rows, column=name), others.features(other_rows, column=name)])
            for name in store.feature_columns
        },
        np.concatenate([store.labels, others.labels]),
        ids=[*map(str, store.ids), *map(str, others.ids)],
        label_is_predicted=np.concatenate([store.label_is_predicted, others.label_is_predicted]),
    )


def outranking_bound(true: float, foreign: Float[np.ndarray, "m"]) -> float:
    """M · exp(−Δ² / 2σ²), clipped to [0, 1], with Δ and σ as the module estimates them; 1 where Δ is not above 0.

    Args:
        true: The true exemplar's score.
        foreign: The foreign exemplars' scores, at least one.
    """
    precise = foreign.astype(np.float64)
    gap, sigma = true - float(precise.mean()), float(precise.std())
    if gap <= 0:
        return 1.0
    return min(1.0, len(foreign) * math.exp(-(gap**2) / (2 * sigma**2))) if sigma > 0 else 0.0


def measure_foreign(
    retrievers: Sequence[Retriever],
    queries: Int64[np.ndarray, "q"],
    store: MemoryStore,
    perturbations: Sequence[Perturbation],
    record_file: RecordFile,
    *,
    foreign: str,
    foreign_count: int,
    classifier: Classifier,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Append a record for every query × perturbation × method that has none yet.

    A record holds ``level`` (the perturbation's name), ``foreign``, ``foreign_count`` (M), ``outranked`` (how many
    foreign exemplars come before the true one, ties by id) and ``bound``.

    Args:
        retrievers: Over the mixed store.
        queries: Rows of true exemplars.
        store: As `mixed` makes it: the foreign exemplars last.
        perturbations: What is done to each query.
        record_file: Opened with KEY.
        foreign: What the foreign exemplars are called.
        foreign_count: How many there are.
        classifier: Whose features PGD moves.
        seed: Of the noise; each query draws its own, the same as in self-retrieval.
        progress: Told of searches done.
    """
    first = len(store) - foreign_count
    total, done = len(queries) * len(perturbations), 0
    for row in queries.tolist():
        image = store.images(np.array([row]))[0].astype(np.float32) / np.float32(255.0)
        noise = int(np.random.SeedSequence((seed, row)).generate_state(1)[0])
        beside = np.array([row, *range(first, len(store))])  # the true exemplar and its foreign rivals
        for perturbation in perturbations:
            key = {"query": str(store.ids[row]), "level": perturbation.name, "foreign": foreign}
            missing = [one for one in retrievers if not record_file.done(**key, method=one.name)]
            for retriever, scores in scores_under(perturbation, image, missing, seed=noise, classifier=classifier):
                rivals = scores[beside]
                found = {
                    "outranked": rank_of(rivals, store.ids[beside], 0),
                    "foreign_count": foreign_count,
                    "bound": outranking_bound(float(rivals[0]), rivals[1:]),
                }
                record_file.append(key | {"method": retriever.name} | found)
            done += 1
            progress("searching", done, total)


def section(run: Run, _: Sheet) -> list[str]:
    """Observed rates beside the bound."""
    records = [record | {"rate": record["outranked"] / record["foreign_count"]} for record in run.records]
    rows = [
        {
            "foreign": plain_text(foreign),
            "level": plain_text(level),
            "method": method,
            "queries": str(count(cell)),
            "observed rate": mean(cell, "rate", spec="z.3f"),
            "mean bound": mean(cell, "bound", spec="z.3f"),
            "queries with any": rate([record["outranked"] > 0 for record in cell], cell),
        }
        for (foreign, level, method), cell in grouped(records, "foreign", "level", "method").items()
    ]
    note = (
        "Rate: the share of foreign exemplars that are ahead, as a mean over queries, for the pairs of one query are "
        "not independent. The last column: the share of queries for which any foreign exemplar is."
    )
    return [table(rows), note]


FIELDS = ("query", "method", "foreign", "level", "outranked", "foreign_count", "bound")
BENCHMARK = Benchmark(command, Reported("Foreign exemplars", KEY, FIELDS, section))
