"""What the report says of each benchmark: its records as tables and panels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tmm_engine.bench.noise import FAMILIES, Family, Noise
from tmm_engine.bench.plots import BASELINES, Curve, Panel, draw_panels
from tmm_engine.bench.records import Record, Records
from tmm_engine.bench.statistics import bootstrap_interval, by_query, paired_difference, share_at_least
from tmm_engine.bench.tables import NONE, count, folded, grouped, mean, plain_text, rate, table, values_of

GRID_POINTS = 200  # of a curve over radii
FIG3 = ("brightness", "gaussian")
SEED = "seed"  # a "radius" that is a control: the share of other seeds that change the top k


KINDS = {  # of a radius -> title, unit
    "gaussian": ("Gaussian noise", "L2 norm of the change in pixels"),
    "brightness": ("Brightness", "L2 norm of the change in pixels"),
    "adversarial": ("Adversarial direction", "L2 norm of the change in pixels"),
    "adaptive": ("Adaptive adversarial direction", "L2 norm of the change in pixels"),
    "feature": ("Features, closed form", "L2 norm of the change in the feature"),
    "margin": ("Margin bound, not certified", "L2 norm of the change in pixels"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One file: where it is, and what it holds."""

    path: Path
    content: Records

    @property
    def records(self) -> list[Record]:
        """Of all runs that wrote to the file."""
        return self.content.records

    @property
    def data_set(self) -> str:
        """As the settings name it."""
        return str(self.content.settings["data_set"])


@dataclass(frozen=True, slots=True)
class Sheet:
    """Where a section's pictures go, how the methods of all files look, and the pictures drawn so far."""

    folder: Path
    styles: dict[str, dict[str, Any]]
    pictures: list[Path] = field(default_factory=list)

    def draw(self, name: str, title: str, panels: Sequence[Sequence[Panel | None]]) -> str:
        """Write the picture; the Markdown that shows it."""
        path = self.folder / f"{name}.png"
        draw_panels(panels, path, title=title, styles=self.styles)
        self.pictures.append(path)
        return f"![{title}]({path.name})"


def _robustness(run: Run, sheet: Sheet) -> list[str]:
    noisy = [record for record in run.records if record["family"] != "clean"]
    blocks = ["### Over all noise", *_summary(run.records, noisy)]
    if panels := [_mrr_panel(run, family) for (family,) in grouped(noisy, "family")]:
        title = f"{run.data_set}: mean reciprocal rank of the true exemplar"
        blocks.append(sheet.draw(f"{run.path.stem}-mrr", title, _in_rows(panels, 4)))
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


def _summary(records: list[Record], noisy: list[Record]) -> list[str]:
    """A row for each method, the best first."""
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
                f"difference to {baseline or 'a baseline'}": _difference(group, by_method.get(baseline or "", [])),
                "overlap, noise": mean(group, "overlap"),
                "label precision, noise": mean(group, "label_precision"),
            }
        )
    note = (
        "Noise: the mean over queries of each query's mean over all perturbations but the clean one. The difference is "
        "in MRR under noise, paired by query, with the better of l2 and cosine. Overlap is with the method's own "
        "answer to the clean query."
    )
    return [table(rows), note]


def _difference(records: list[Record], baseline: list[Record]) -> str:
    """Paired, of what both have; a dash for the baseline itself, and where they have nothing in common."""
    found = {(record["query"], record["perturbation"]): record["reciprocal_rank"] for record in baseline}
    both = [record for record in records if (record["query"], record["perturbation"]) in found]
    if not both or records is baseline:
        return NONE
    values, queries = values_of(both, "reciprocal_rank")
    other = np.array([found[record["query"], record["perturbation"]] for record in both])
    return f"{paired_difference(values, other, queries):+z.2f}"


def _noise(family: str) -> Noise:
    """Of a family, also of one that a newer version has measured."""
    if family in list(Family):
        return FAMILIES[Family(family)]
    return replace(FAMILIES[Family.CLEAN], title=family.capitalize(), axis="level", clean=None)


def _in_rows(panels: Sequence[Panel], columns: int) -> list[Sequence[Panel]]:
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


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


def figure_3(runs: list[Run], sheet: Sheet) -> str | None:
    """Rows: brightness, Gaussian noise; columns: data sets."""
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
    return sheet.draw("fig3-robustness", "Mean reciprocal rank of the true exemplar", rows) if rows else None


def _radius(run: Run, sheet: Sheet) -> list[str]:
    control = [record for record in run.records if record["kind"] == SEED]
    known = [record for record in run.records if record["kind"] != SEED and record["radius"] is not None]
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
        blocks.append(sheet.draw(f"{run.path.stem}-curves", title, _in_rows(panels, 3)))
    if control:
        shares = [
            {"method": method, "share": mean(cell, "radius")} for (method,), cell in grouped(control, "method").items()
        ]
        blocks += ["Control: the share of other seeds that change the top k by themselves.", table(shares)]
    return blocks


def _semantic(run: Run, _: Sheet) -> list[str]:
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


def _taken_for_copies(cell: list[Record]) -> str:
    asked = [record for record in cell if record.get("recognised") is not None]
    return rate([record["recognised"] for record in asked], asked) if asked else NONE


def _ablation(run: Run, _: Sheet) -> list[str]:
    rows = []
    for (setting, value, method), cell in grouped(run.records, "setting", "value", "method").items():
        clean = [record for record in cell if record["perturbation"] == "clean"]
        noisy = [record for record in cell if record["perturbation"] != "clean"]
        rows.append(
            {
                "setting": setting,
                "value": plain_text(value),
                "method": method,
                "queries": str(count(cell)),
                "MRR, clean": mean(clean, "reciprocal_rank"),
                "MRR, noise": mean(noisy, "reciprocal_rank"),
                "top-1, noise": rate([record["rank"] == 0 for record in noisy], noisy),
                "label precision, noise": mean(noisy, "label_precision"),
            }
        )
    return [table(rows)]


def _ood(run: Run, _: Sheet) -> list[str]:
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


def _oracle(run: Run, _: Sheet) -> list[str]:
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


def _candidates(run: Run, _: Sheet) -> list[str]:
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


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Its title, the fields of its records, and what makes a section of one file."""

    title: str
    fields: tuple[str, ...]
    section: Callable[[Run, Sheet], list[str]]


BENCHMARKS = {
    "robustness": Benchmark(
        "Self-retrieval under noise",
        ("query", "perturbation", "family", "level", "method", "rank", "reciprocal_rank", "overlap", "label_precision"),
        _robustness,
    ),
    "radius": Benchmark("Robustness radius", ("query", "method", "kind", "radius", "censored"), _radius),
    "semantic": Benchmark("Held-out queries", ("query", "method", "label_precision", "knn_correct", "ssim"), _semantic),
    "ablation": Benchmark(
        "Ablation",
        ("setting", "value", "query", "perturbation", "method", "rank", "reciprocal_rank", "label_precision"),
        _ablation,
    ),
    "ood": Benchmark(
        "Foreign exemplars", ("query", "method", "foreign", "level", "outranked", "foreign_count", "bound"), _ood
    ),
    "oracle": Benchmark("A judge's view", ("query", "method", "alike", "k", "preferred"), _oracle),
    "candidates": Benchmark(
        "Candidate sets",
        ("query", "perturbation", "recall", "rank_query", "rank_global", "rank_cosine"),
        _candidates,
    ),
}
