"""How far can a query move before its top k changes? Measured for every query, method and kind of radius."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from typing import Any

import click
import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, Shaped

from tmm_engine.bench.attack import features_of
from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.loading import load_held_out, load_suite, parse_methods
from tmm_engine.bench.noise import Image
from tmm_engine.bench.options import check_folders, query_options, suite_options
from tmm_engine.bench.plots import Curve, Panel, in_rows
from tmm_engine.bench.radii import (
    QueryPath,
    Radius,
    adversarial_path,
    brightness_path,
    closed_form_radius,
    derived,
    empirical_radius,
    gaussian_path,
    margin_radius,
    require_k,
    seed_changes_top,
    set_of_top,
)
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.retrievers import Retriever
from tmm_engine.bench.statistics import bootstrap_interval, share_at_least
from tmm_engine.bench.tables import grouped, mean, table
from tmm_engine.cli.display import progress_bar
from tmm_engine.index.errors import InputError, member
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.progress import Progress, silent

KEY = ("query", "method", "kind", "direction")
"""What a record is found by: open the `RecordFile` with it."""
MARGIN_SAMPLES = 8
MARGIN_STEP = 0.1  # L2 norm in pixels
CONTROL_SEEDS = 4


class Kind(StrEnum):
    """What a record's radius is."""

    GAUSSIAN = "gaussian"  # `empirical_radius`, in L2 norm of pixels, and the next three
    BRIGHTNESS = "brightness"
    ADVERSARIAL = "adversarial"  # towards where PGD has moved φ(x): one path for all methods
    ADAPTIVE = "adaptive"  # towards where it has moved what the method ranks by
    FEATURE = "feature"  # `closed_form_radius`, in L2 norm of features
    MARGIN = "margin"  # `margin_radius`, in L2 norm of pixels
    SEED = "seed"  # not a radius: `seed_changes_top`, a share in [0, 1]


KINDS = {  # of a radius -> title, unit
    "gaussian": ("Gaussian noise", "L2 norm of the change in pixels"),
    "brightness": ("Brightness", "L2 norm of the change in pixels"),
    "adversarial": ("Adversarial direction", "L2 norm of the change in pixels"),
    "adaptive": ("Adaptive adversarial direction", "L2 norm of the change in pixels"),
    "feature": ("Features, closed form", "L2 norm of the change in the feature"),
    "margin": ("Margin bound, not certified", "L2 norm of the change in pixels"),
}


GRID_POINTS = 200  # of a curve over radii


@click.command("radius")
@click.argument("source")
@suite_options
@click.option("--directions", type=click.IntRange(min=1), default=2, show_default=True, help="Gaussian ones a query.")
@click.option(
    "--kinds",
    default="gaussian,brightness,adversarial,adaptive,feature,margin,seed",
    show_default=True,
    help="Of radius, separated by commas. Two lead straight to an attack's end: adversarial, on the plain features; "
    "adaptive, on what the method ranks by.",
)
@click.option("--skip", type=click.IntRange(min=0), default=0, help="Leave out the first so many random queries.")
@click.option("--held-out", is_flag=True, help="Queries that are no exemplars, instead of exemplars.")
@query_options
def command(source: str, **options: Any) -> None:
    """How far can a query move before its top k changes? The robustness radius of Definition 1 (§3.4).

    \b
    Examples:
      engine bench radius mnist --root data --model resnet18 --weights mnist.safetensors --queries 20 --out r.jsonl
      engine bench radius mnist --root data --model resnet18 --weights mnist.safetensors --held-out --out held.jsonl
    """
    _check_queries(options)
    kinds = [member(Kind, kind.strip()) for kind in options["kinds"].split(",")]
    methods = parse_methods(options["methods"])
    check_folders(options["out"])
    with progress_bar() as progress:
        if options["held_out"]:
            held = load_held_out(source, options, progress)
            suite, images, numbers = held.suite, held.queries, np.arange(len(held.queries))
            names, about = [f"{held.source} {number}" for number in numbers], {"query_source": held.source}
        else:
            suite, about = load_suite(source, options, progress), {}
            numbers = suite.queries(options["queries"], skip=options["skip"])
            names = suite.store.ids[numbers].tolist()
            images = suite.store.images(numbers).astype(np.float32) / np.float32(255.0)
        with suite.records(options["out"], "radius", methods, KEY, k=options["k"], **about) as records:
            measure_radius(
                suite.retrievers(methods, progress=progress),
                images,
                names,
                suite.store.ids,
                records,
                classifier=suite.classifier,
                features=suite.store.features(np.arange(len(suite.store))),
                k=options["k"],
                numbers=numbers,
                kinds=kinds,
                directions=options["directions"],
                seed=options["seed"],
                progress=progress,
            )
    click.echo(f"{options['out']}: {len(images)} queries, {len(methods)} methods")


def _check_queries(options: dict[str, Any]) -> None:
    held_out = options["held_out"]
    for name in ("query_split", "query_source"):
        if options[name] is not None and not held_out:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --held-out: without it queries are exemplars")
    if held_out and options["skip"]:
        raise click.UsageError("--skip leaves out exemplars as queries: with --held-out there are none")


def measure_radius(
    retrievers: Sequence[Retriever],
    images: Float32[np.ndarray, "q c h w"],
    names: Sequence[str],
    ids: Shaped[np.ndarray, "n"],
    record_file: RecordFile,
    *,
    classifier: Classifier,
    features: Float32[np.ndarray, "n d"],
    numbers: Int64[np.ndarray, "q"],
    k: int = 10,
    kinds: Sequence[Kind] = tuple(Kind),
    directions: int = 3,
    largest_norm: float = 5.0,
    tolerance: float = 0.02,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Append a record for every query, retriever, kind of radius and direction that the file does not have yet.

    A record is ``{"query", "method", "kind", "direction", "radius", "censored", "evaluations"}``. See `Kind` for what
    ``radius`` is; it is null where it is infinite. ``censored``: the radius is larger than that. ``evaluations``: how
    often the retriever was run. Only Gaussian noise has more than direction 0.

    Args:
        retrievers: What is compared; the kind `Kind.FEATURE` is for those named 'l2' and 'cosine' only.
        images: The queries, in [0, 1]; exemplars or not.
        names: Of the queries, for the records.
        ids: Of all exemplars.
        record_file: Opened with `KEY`.
        classifier: φ.
        features: φ of all exemplars.
        numbers: Of the queries: the seeds of their noise.
        k: Size of the set; fewer than n.
        kinds: Of radius.
        directions: Of Gaussian noise, for each query.
        largest_norm: L2 norm at which paths of noise end; darkening ends at 0.05 of the brightness.
        tolerance: Of a radius along a path, in L2 norm.
        seed: Of directions and retrievers.
        progress: Told of radii done.

    Raises:
        InputError: k is not in [1, n), or there is not one name and number per query.
    """
    require_k(k, len(ids))
    if not len(images) == len(names) == len(numbers):
        raise InputError(
            f"expected a name and a number for each of {len(images)} queries, got {len(names)} and {len(numbers)}"
        )
    precise = features.astype(np.float64)
    total = len(images) * sum(len(list(_kinds(retriever, kinds, directions))) for retriever in retrievers)
    done = 0
    for number, name, image in zip(numbers.tolist(), names, images, strict=True):
        query = _Query(image, number, ids, classifier, precise, k, largest_norm, tolerance, seed)
        for retriever in retrievers:
            for kind, direction in _kinds(retriever, kinds, directions):
                key = {"query": name, "method": retriever.name, "kind": str(kind), "direction": direction}
                if not record_file.done(**key):
                    radius = query.radius(retriever, kind, direction)
                    found = {"radius": radius.value, "censored": radius.censored, "evaluations": radius.evaluations}
                    record_file.append(key | found)
                done += 1
                progress("radii", done, total)


def section(run: Run, sheet: Sheet) -> list[str]:
    """Medians and curves of every kind; the control of seeds apart."""
    control = [record for record in run.records if record["kind"] == Kind.SEED]
    known = [record for record in run.records if record["kind"] != Kind.SEED and record["radius"] is not None]
    rows, panels = [], []
    for (kind,), group in grouped(known, "kind").items():
        title, unit = KINDS.get(kind, (kind.capitalize(), "L2 norm"))
        grid = np.linspace(0, max(record["radius"] for record in group), GRID_POINTS)
        curves = {}
        for (method,), cell in grouped(group, "method").items():
            smallest = [min(found, key=lambda record: record["radius"]) for found in grouped(cell, "query").values()]
            radii = np.array([record["radius"] for record in smallest], dtype=np.float64)
            censored = np.array([record["censored"] for record in smallest], dtype=bool)
            curves[method] = Curve(grid.tolist(), share_at_least(radii, censored, grid).tolist())
            median = bootstrap_interval(radii, np.median)
            least = "≥ " if (radii[censored] <= median.estimate).any() else ""
            rows.append(
                {
                    "kind": title,
                    "method": method,
                    "queries": str(len(radii)),
                    "median radius": f"{least}{median}",
                    "censored": str(censored.sum()),
                }
            )
        panels.append(Panel(title, unit, "share of queries", curves))
    note = (
        "Of each query the smallest radius over its directions; those without a finite one are left out. Censored: "
        "nothing changed up to that radius, so that a median of such radii is a lower bound (≥)."
    )
    blocks = [table(rows), note]
    if panels:
        title = f"{run.data_set}: share of queries whose top k stays the same up to ε"
        blocks.append(sheet.draw(f"{run.path.stem}-curves", title, in_rows(panels, 3)))
    if control:
        shares = [
            {"method": method, "share": mean(cell, "radius")} for (method,), cell in grouped(control, "method").items()
        ]
        blocks += ["Control: the share of other seeds that change the top k by themselves.", table(shares)]
    return blocks


def _kinds(retriever: Retriever, kinds: Sequence[Kind], directions: int) -> Iterator[tuple[Kind, int]]:
    for kind in kinds:
        if kind is not Kind.FEATURE or retriever.name in list(Metric):
            for direction in range(directions if kind is Kind.GAUSSIAN else 1):
                yield kind, direction


@dataclass(frozen=True, eq=False)
class _Query:
    image: Image
    number: int
    ids: Shaped[np.ndarray, "n"]
    classifier: Classifier
    features: Float64[np.ndarray, "n d"]
    k: int
    largest_norm: float
    tolerance: float
    seed: int

    @cached_property
    def adversarial(self) -> QueryPath:
        return adversarial_path(self.image, embedding=features_of(self.classifier), largest_norm=self.largest_norm)

    @cached_property
    def feature(self) -> Float64[np.ndarray, "d"]:
        with torch.no_grad():
            return features_of(self.classifier)(torch.tensor(self.image)[None])[0].double().cpu().numpy()

    def radius(self, retriever: Retriever, kind: Kind, direction: int) -> Radius:
        match kind:
            case Kind.FEATURE:
                metric = Metric(retriever.name)
                value = closed_form_radius(self.feature, self.features, k=self.k, metric=metric)
                return Radius(value, censored=False, evaluations=0)
            case Kind.MARGIN:
                margin = margin_radius(
                    retriever, self.image, k=self.k, samples=MARGIN_SAMPLES, step_norm=MARGIN_STEP, seed=self.seed
                )
                return Radius(margin.value, censored=False, evaluations=1 + MARGIN_SAMPLES)
            case Kind.SEED:
                seeds = range(self.seed, self.seed + CONTROL_SEEDS)
                share = seed_changes_top(retriever, self.image, ids=self.ids, k=self.k, seeds=seeds)
                return Radius(share, censored=False, evaluations=CONTROL_SEEDS)
            case _:
                return self._along(self._path(retriever, kind, direction), retriever)

    def _path(self, retriever: Retriever, kind: Kind, direction: int) -> QueryPath:
        match kind:
            case Kind.GAUSSIAN:
                noise = derived(self.seed, self.number, direction)
                return gaussian_path(self.image, seed=noise, largest_norm=self.largest_norm)
            case Kind.BRIGHTNESS:
                return brightness_path(self.image)
            case Kind.ADVERSARIAL:
                return self.adversarial
            case Kind.ADAPTIVE:
                return adversarial_path(self.image, embedding=retriever.embedding, largest_norm=self.largest_norm)
        raise AssertionError(f"{kind} is not found along a path")

    def _along(self, path: QueryPath, retriever: Retriever) -> Radius:
        top_set = partial(set_of_top, retriever, ids=self.ids, k=self.k, seed=self.seed)
        return empirical_radius(top_set, path, tolerance=self.tolerance)


FIELDS = ("query", "method", "kind", "radius", "censored")
BENCHMARK = Benchmark(command, Reported("Robustness radius", KEY, FIELDS, section))
