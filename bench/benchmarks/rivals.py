"""Every simple rival of mode robust on both jobs: the command, and what the report says."""

import fnmatch
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
import numpy as np
from jaxtyping import Float64, Int64

from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.loading import load_held_out, parse_few
from tmm_engine.bench.methods import Method
from tmm_engine.bench.options import check_folders, held_out_options, k_option, out_option
from tmm_engine.bench.plots import BASELINES, Curve, Panel, in_rows, styles_of
from tmm_engine.bench.records import Record
from tmm_engine.bench.rivals.measuring import KEY, UNSEEN, VERY_IMAGE, measure_presets, measure_rivals
from tmm_engine.bench.rivals.parts import SAMPLE
from tmm_engine.bench.rivals.roster import STRETCHED, Rival, roster
from tmm_engine.bench.statistics import bootstrap_interval, by_query, paired_difference
from tmm_engine.bench.suite import Suite
from tmm_engine.bench.tables import NONE, compared, folded, grouped, over_the_same, table
from tmm_engine.cli.display import progress_bar
from tmm_engine.index.descriptors.calibration import QUERIES, Calibrated, calibrate
from tmm_engine.index.descriptors.layers import find_layers
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.progress import Progress
from tmm_engine.options import RECOGNITION
from tmm_engine.rerank.settings import PRESETS

DEFAULT = (
    "brightness 0.4,contrast 0.4,gaussian 2.5,gaussian 5,blur 1,jpeg 15,shift 2,shift 4,rotation 10,crop 0.85,"
    "occlusion 0.25,saturation 0,hue 30,dark-noise 1,crop-blur 0.5"
)


@click.command("rivals")
@click.argument("source")
@held_out_options
@k_option
@click.option("--perturbations", default=DEFAULT, show_default=True, help="Each a family and a level, by commas.")
@click.option("--recognition", type=click.FloatRange(0.01, 1.0), help="Threshold of robust's gate instead of its own.")
@click.option(
    "--presets",
    help="Readings of TMM-NN as well, by semicolons, as for bench robustness: 'fast;paper'. Slow: one query at a time, "
    "and paper passes every exemplar through the network for each.",
)
@click.option("--ways", help="Only these, by semicolons; * is anything: 'l2;cosine*;layer?:4x4 whitened;robust,*'.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="A folder for what is looked at in the exemplars, so that a run that was cut off goes on. Default: not kept.",
)
@out_option
def command(source: str, **options: Any) -> None:
    """Is there a simpler way? Every layer, pixels, hashes, mixtures and re-rankings beside mode robust, on both jobs.

    \b
    Examples:
      engine bench rivals mnist --root data --model resnet18 --weights mnist.safetensors --out rivals.jsonl
      engine bench rivals cifar10/ --weights c.safetensors --model resnet18 --queries 100 --out runs/rivals.jsonl
      engine bench rivals mnist --root data --model resnet18 --weights mnist.safetensors --exemplars 60000 \\
          --ways 'l2;cosine;cosine,stretch=true;pixels*;robust,views=?' --keep runs/vectors --out runs/whole.jsonl
      engine bench rivals mnist --root data --model resnet18 --weights mnist.safetensors --queries 20 \\
          --ways 'cosine*;robust,views=4' --presets 'fast;paper' --perturbations 'gaussian 2.5' --out runs/tmm.jsonl
    """
    perturbations = parse_few(options["perturbations"])
    presets = _parse_presets(options["presets"])
    check_folders(options["out"])
    with progress_bar() as progress:
        held = load_held_out(source, options, progress, embedded=bool(presets))
        ways = among(roster(find_layers(held.suite.classifier)), options["ways"])
        calibrated = _calibrated(held.suite, progress)
        settings = {"k": options["k"], "query_source": held.source, "queries": options["queries"]}
        if options["recognition"] is not None:
            settings["recognition"] = options["recognition"]
        file = held.suite.records(options["out"], "rivals", presets, KEY, **settings, chosen=calibrated.report)
        with file as records:
            retrievers = held.suite.retrievers(presets, progress=progress)
            measure_rivals(
                held,
                calibrated,
                records,
                perturbations=perturbations,
                rivals=ways,
                k=options["k"],
                recognition=options["recognition"] or RECOGNITION,
                keep=options["keep"],
                progress=progress,
            )
            measure_presets(held, retrievers, records, perturbations=perturbations, k=options["k"], progress=progress)
    click.echo(f"{options['out']}: {options['queries']} exemplars and as many queries from {held.source}")


def _parse_presets(text: str | None) -> list[Method]:
    """Of --presets."""
    if text is None:
        return []
    names = [part.strip() for part in text.split(";") if part.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"--presets: expected different ones, as in 'fast;paper', got {text!r}")
    for kind in (name.split(",")[0] for name in names):
        if kind not in PRESETS:
            raise InputError(
                f"--presets: nothing is called {kind!r}{nearest(kind, PRESETS)}; known: {', '.join(PRESETS)}"
            )
    return [Method.parse(name) for name in names]


def among(rivals: Sequence[Rival], patterns: str | None) -> list[Rival]:
    """Those of --ways, in the roster's order."""
    asked_for = ["*"] if patterns is None else [part.strip() for part in patterns.split(";") if part.strip()]
    for pattern in asked_for:
        if not fnmatch.filter([rival.name for rival in rivals], pattern):
            known = [rival.name for rival in rivals]
            raise InputError(f"--ways: nothing is called {pattern!r}{nearest(pattern, known)}")
    return [rival for rival in rivals if any(fnmatch.fnmatchcase(rival.name, pattern) for pattern in asked_for)]


def _calibrated(suite: Suite, progress: Progress) -> Calibrated:
    """As when an index is built, on exemplars that are no queries here."""
    rows = suite.order[::-1][:SAMPLE]
    return calibrate(
        suite.store.images(rows),
        suite.store.labels[rows],
        suite.classifier,
        queries=min(QUERIES, len(rows)),
        progress=progress,
    )


def section(run: Run, _: Sheet) -> list[str]:
    """What was chosen, then both jobs over all noise, the best first; intervals are over queries."""
    k = int(run.content.settings["k"])
    by_job = grouped(run.records, "job")
    chosen = run.content.settings["chosen"]
    weights = " + ".join(f"{weight:g} · {source}" for source, weight in chosen["robust"].items())
    blocks = [f"The engine chose {weights}; copies are recognised by {chosen['recogniser']}."]
    for (job,), records in by_job.items():
        blocks += [f"**Job: {job}** ({len(grouped(records, 'method'))} ways)"]
        blocks += compared(records, partial(_summary, job=job, k=k), met=("perturbation",))
    return [
        *blocks,
        f"Differences are to {STRETCHED}, paired by query and perturbation. Kept: of the top {k} for the clean query.",
    ]


def _summary(records: list[Record], *, job: str, k: int) -> list[str]:
    """A row for each way, the best first."""
    by_method = {method: cell for (method,), cell in grouped(records, "method").items()}
    row_of, rival = _very_image_row if job == VERY_IMAGE else _unseen_row, by_method.get(STRETCHED, [])
    rows = [row_of(method, cell, rival, k) for method, cell in by_method.items()]
    shown = [row for _, row in sorted(rows, key=itemgetter(0), reverse=True)]
    return [table(shown[:20]), *(folded("All ways", table(shown)) if len(shown) > 20 else [])]


def across(runs: list[Run], sheet: Sheet) -> list[str]:
    """Both jobs against each other: every way is a point, further right and higher is better."""
    panels = [_trade(run) for run in runs]
    groups = Sheet(sheet.folder, styles_of([name for name in GROUPS if name not in BASELINES]), sheet.pictures)
    title = "Both jobs under noise: every way is a point"
    return ["## Both jobs, all data sets", groups.draw("rivals-trade", title, in_rows(panels, 2))]


GROUPS = {  # shown as one, by the pattern of their names; the first that fits; the first lie on top
    "l2": "l2",
    "cosine": "cosine",
    STRETCHED: STRETCHED,
    "robust": "robust,views=4",
    "TMM-NN": "fast|fast,*|paper|paper,*",
    "mixtures, views, re-rankings": "*features*|robust*|recogniser*",
    "pixels": "pixels*",
    "one layer": "*:?x?*",
    "perceptual hashes": "*hash*",
}


def _group(method: str) -> str | None:
    """What it is shown as; None: not at all."""
    fits = (name for name, some in GROUPS.items() if any(fnmatch.fnmatchcase(method, one) for one in some.split("|")))
    return next(fits, None)


def _trade(run: Run) -> Panel:
    k = int(run.content.settings["k"])
    points: dict[str, list[tuple[float, float]]] = {}
    _, comparable = over_the_same(run.records, "job", "perturbation")
    for (method,), records in grouped(comparable, "method").items():
        by_job = {job: _noisy(cell) for (job,), cell in grouped(records, "job").items()}
        found, _ = _over(by_job.get(VERY_IMAGE, []), "rank", lambda rank: 1 / (1 + rank))
        right, _ = _over(by_job.get(UNSEEN, []), "right", lambda hits: hits / k)
        group = _group(method)
        if group is not None and len(found) and len(right):
            points.setdefault(group, []).append((float(found.mean()), float(right.mean())))
    in_order = sorted(points, key=[*GROUPS][::-1].index)
    curves = {group: Curve(*map(list, zip(*points[group], strict=True))) for group in in_order}
    return Panel(run.data_set, "the very image: MRR", f"unseen: label@{k}", curves, joined=False)


Row = tuple[float, dict[str, str]]
"""What a row is sorted by, and its cells."""


def _very_image_row(method: str, cell: list[Record], rival: list[Record], _: int) -> Row:
    noisy = _noisy(cell)
    reciprocal = _over(noisy, "rank", lambda rank: 1 / (1 + rank))
    return _place(reciprocal), {
        "method": method,
        "MRR, noise": _interval(reciprocal),
        "difference": _difference(method, reciprocal, _over(_noisy(rival), "rank", lambda rank: 1 / (1 + rank))),
    }


def _unseen_row(method: str, cell: list[Record], rival: list[Record], k: int) -> Row:
    noisy = _noisy(cell)
    kept, right = (_over(noisy, field, lambda hits: hits / k) for field in ("kept", "right"))
    clean = _over([record for record in cell if record["family"] == "clean"], "right", lambda hits: hits / k)
    clean_rival = [record for record in rival if record["family"] == "clean"]
    taken = [record for record in cell if record["taken"] is not None]
    return _place(kept), {
        "method": method,
        "overlap, noise": _interval(kept),
        "difference": _difference(method, kept, _over(_noisy(rival), "kept", lambda hits: hits / k)),
        "label precision, clean": _interval(clean, ".3f"),
        "difference, clean": _difference(method, clean, _over(clean_rival, "right", lambda hits: hits / k)),
        "label precision, noise": _interval(right, ".3f"),
        "difference, noise": _difference(method, right, _over(_noisy(rival), "right", lambda hits: hits / k)),
        "taken for copies": f"{np.mean([flag for record in taken for flag in record['taken']]):.1%}" if taken else NONE,
    }


Values = tuple[Float64[np.ndarray, "m"], Int64[np.ndarray, "m"]]


def _noisy(records: list[Record]) -> list[Record]:
    return [record for record in records if record["family"] != "clean"]


def _over(records: list[Record], field: str, of: Any) -> Values:
    """A figure of every query under every perturbation, and the query's number; in an order of the perturbations'."""
    ordered = sorted(records, key=lambda record: record["perturbation"])
    values = [[of(value) for value in record[field]] for record in ordered]
    queries = [np.arange(len(record[field])) for record in ordered]
    if not values:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    return np.array(values, dtype=np.float64).ravel(), np.concatenate(queries)


def _interval(values: Values, spec: str = "") -> str:
    return format(bootstrap_interval(by_query(*values)), spec) if len(values[0]) else NONE


def _place(values: Values) -> float:
    """The mean; without values below all others."""
    return float(values[0].mean()) if len(values[0]) else -1.0


def _difference(method: str, own: Values, rival: Values) -> str:
    if method == STRETCHED or not len(own[0]) or len(own[0]) != len(rival[0]):
        return NONE
    return f"{paired_difference(own[0], rival[0], own[1]):+z.3f}"


FIELDS = ("job", "perturbation", "family", "method", "right")
BENCHMARK = Benchmark(command, Reported("Simple rivals", KEY, FIELDS, section, across=across))
