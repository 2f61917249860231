"""Does a perturbed exemplar still find itself? The command, and what the report says."""

from dataclasses import replace
from typing import Any

import click
import numpy as np

from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.loading import load_suite, parse_methods, parse_perturbations
from tmm_engine.bench.noise import FAMILIES, Family, Noise
from tmm_engine.bench.options import check_folders, suite_options
from tmm_engine.bench.plots import BASELINES, Curve, Panel, in_rows
from tmm_engine.bench.records import Record
from tmm_engine.bench.self_retrieval import KEY, measure_self_retrieval
from tmm_engine.bench.statistics import bootstrap_interval, by_query
from tmm_engine.bench.tables import (
    compared,
    count,
    difference,
    folded,
    grouped,
    mean,
    plain_text,
    rate,
    table,
    values_of,
)
from tmm_engine.cli.display import progress_bar

FIG3 = ("brightness", "gaussian")
NOTE = (
    "Noise: the mean over queries of each query's mean over all perturbations but the clean one. The difference is in "
    "MRR under noise, paired by query, with the better of l2 and cosine. Overlap is with the method's own answer to "
    "the clean query."
)


@click.command("robustness")
@click.argument("source")
@suite_options
@click.option("--skip", type=click.IntRange(min=0), default=0, help="Leave out the first so many random queries.")
@click.option(
    "--families",
    default="brightness,gaussian,contrast,blur,jpeg,shift,pgd",
    show_default=True,
    help="Perturbations, separated by commas. Two are attacks: pgd, one for all methods, moves the plain features; "
    "adaptive, one for each method and as slow, moves what that method ranks by (it does not aim at recognition).",
)
@click.option(
    "--levels", multiple=True, metavar="FAMILY=L,L,…", help="Levels of a family instead of its own; repeatable."
)
def command(source: str, **options: Any) -> None:
    """Does a perturbed exemplar still find itself? Rank, overlap and labels against noise (Figs. 3, 6, §4.9).

    \b
    Examples:
      engine bench robustness mnist --root data --model resnet18 --weights mnist.safetensors --out runs/mnist.jsonl
      engine bench robustness cifar10/ --weights c.safetensors --model resnet18 --methods 'cosine;paper' \\
          --families brightness,gaussian --levels gaussian=1,2.5,5 --queries 20 --out runs/cifar.jsonl
    """
    perturbations = parse_perturbations(options["families"], options["levels"])
    methods = parse_methods(options["methods"])
    check_folders(options["out"])
    with progress_bar() as progress:
        suite = load_suite(source, options, progress)
        queries = suite.queries(options["queries"], skip=options["skip"])
        with suite.records(options["out"], "robustness", methods, KEY, k=options["k"]) as records:
            measure_self_retrieval(
                suite.retrievers(methods, progress=progress),
                queries,
                suite.store,
                perturbations,
                records,
                classifier=suite.classifier,
                k=options["k"],
                seed=options["seed"],
                progress=progress,
            )
    click.echo(f"{options['out']}: {len(queries)} queries, {len(perturbations)} perturbations, {len(methods)} methods")


def section(run: Run, sheet: Sheet) -> list[str]:
    """Means over all noise, curves over each family, tables of all levels."""
    noisy = [record for record in run.records if record["family"] != "clean"]
    blocks = ["### Over all noise", *compared(run.records, _summary, met=("query", "perturbation")), NOTE]
    if panels := [_mrr_panel(run, family) for (family,) in grouped(noisy, "family")]:
        title = f"{run.data_set}: mean reciprocal rank of the true exemplar"
        blocks += [sheet.draw(f"{run.path.stem}-mrr", title, in_rows(panels, 4)), *_fewer_queries([run])]
    for (family,), group in grouped(run.records, "family").items():
        rows = [
            {
                "level": plain_text(level),
                "method": method,
                "queries": str(count(cell)),
                "top-1": rate([record["rank"] == 0 for record in cell], cell),
                "median rank": f"{np.median([record['rank'] for record in cell]):,g}",
                "MRR": mean(cell, "reciprocal_rank"),
                "overlap": mean(cell, "overlap"),
                "label precision": mean(cell, "label_precision"),
            }
            for (level, method), cell in grouped(group, "level", "method").items()
        ]
        blocks += folded(_noise(family).title, table(rows))
    return blocks


def across(runs: list[Run], sheet: Sheet) -> list[str]:
    """The paper's Fig. 3. Rows: brightness, Gaussian noise; columns: data sets."""
    grid = [
        [
            _mrr_panel(run, family, title=f"{run.data_set}: {_noise(family).title}")
            if any(record["family"] == family for record in run.records)
            else None
            for run in runs
        ]
        for family in FIG3
    ]
    rows = [row for row in grid if any(row)]
    if not rows:
        return []
    title = "## Brightness and Gaussian noise, all data sets (the paper's Fig. 3)"
    return [
        title,
        sheet.draw("fig3-robustness", "Mean reciprocal rank of the true exemplar", rows),
        *_fewer_queries(runs),
    ]


def _fewer_queries(runs: list[Run]) -> list[str]:
    """Says which curves are over fewer queries than others of their panel."""
    said = []
    for run in runs:
        queries = {method: count(group) for (method,), group in grouped(run.records, "method").items()}
        most = max(queries.values(), default=0)
        fewer = [f"{method} {number}" for method, number in queries.items() if number < most]
        said += [f"{run.data_set}: {', '.join(fewer)} (the others {most})"] if fewer else []
    return [f"Curves over fewer queries: {'; '.join(said)}."] if said else []


def _summary(records: list[Record]) -> list[str]:
    """A row for each method, the best first."""
    noisy = [record for record in records if record["family"] != "clean"]
    by_method = {method: group for (method,), group in grouped(noisy, "method").items()}
    scores = {method: by_query(*values_of(group, "reciprocal_rank")).mean() for method, group in by_method.items()}
    baseline = max((method for method in BASELINES if method in scores), key=scores.__getitem__, default=None)
    rows = []
    for method in sorted(scores, key=scores.__getitem__, reverse=True):
        group = by_method[method]
        clean = [record for record in records if (record["method"], record["family"]) == (method, "clean")]
        rows.append(
            {
                "method": method,
                "queries": str(count(group)),
                "MRR, clean": mean(clean, "reciprocal_rank"),
                "MRR, noise": mean(group, "reciprocal_rank"),
                f"difference to {baseline or 'a baseline'}": difference(
                    group, by_method.get(baseline or "", []), "reciprocal_rank"
                ),
                "overlap, noise": mean(group, "overlap"),
                "label precision, noise": mean(group, "label_precision"),
            }
        )
    return [table(rows)]


def _noise(family: str) -> Noise:
    """Of a family, also of one that a newer version has measured."""
    if family in list(Family):
        return FAMILIES[Family(family)]
    return replace(FAMILIES[Family.CLEAN], title=family.capitalize(), axis="level", clean=None)


def _mrr_panel(run: Run, family: str, *, title: str | None = None) -> Panel:
    noise = _noise(family)
    curves = {}
    for (method,), group in grouped(run.records, "method").items():
        points = {level: cell for (name, level), cell in grouped(group, "family", "level").items() if name == family}
        clean = [record for record in group if record["family"] == "clean"]
        if points and clean and noise.clean is not None:
            points.setdefault(noise.clean, clean)
        if points:
            found = [
                (level, bootstrap_interval(by_query(*values_of(cell, "reciprocal_rank"))))
                for level, cell in sorted(points.items(), key=lambda point: point[0])
            ]
            curves[method] = Curve(
                [level for level, _ in found],
                [interval.estimate for _, interval in found],
                [interval.low for _, interval in found],
                [interval.high for _, interval in found],
            )
    return Panel(title or noise.title, noise.axis, "MRR", curves, falling=noise.falling)


FIELDS = ("query", "perturbation", "family", "level", "method", "rank", "reciprocal_rank", "overlap", "label_precision")
BENCHMARK = Benchmark(command, Reported("Self-retrieval under noise", KEY, FIELDS, section, across=across))
