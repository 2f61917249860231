"""Curves, or points, of several methods in a grid of panels: what reports of benchmarks need of pictures."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmm_engine.index.errors import InputError

# Okabe and Ito's colours, told apart by colour-blind eyes, a brown and a grey; their yellow is too faint on white.
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F4F24", "#808080")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BASELINES = {"l2": "#000000", "cosine": "#0072B2"}
PANEL_INCHES, TITLE_CHARACTERS = (3.4, 2.9), 36


@dataclass(frozen=True, slots=True)
class Curve:
    """Points from left to right and, where they have them, the bounds of their intervals."""

    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes; y is a share or another figure in [0, 1].

    Attributes:
        title: What is shown.
        x_label: With its unit.
        y_label: What the height is.
        curves: By method.
        falling: Whether x runs from large to small.
        joined: Whether lines join the points.
    """

    title: str
    x_label: str
    y_label: str
    curves: dict[str, Curve]
    falling: bool = False
    joined: bool = True


def styles_of(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash of each method; the baselines' colours never change."""
    others = [method for method in methods if method not in BASELINES]
    styles = {method: {"color": colour, "marker": ".", "ls": "--"} for method, colour in BASELINES.items()}
    for number, method in enumerate(others):
        lap, place = divmod(number, len(COLOURS))
        styles[method] = {
            "color": COLOURS[place],
            "marker": MARKERS[number % len(MARKERS)],
            "ls": ("-", "-.", ":")[lap % 3],
        }
    return styles


def draw_panels(
    grid: Sequence[Sequence[Panel | None]], path: Path, *, title: str, styles: dict[str, dict[str, Any]]
) -> None:
    """Write a PNG of panels in rows, None for an empty place, with one legend below them all.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need the 'bench' extra: pip install 'tmm-engine[bench]'") from None
    columns = max(len(row) for row in grid)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(max(columns * width, 5), len(grid) * height + 1), layout="constrained")
    shown: dict[str, Any] = {}
    for panels, row in zip(grid, figure.subplots(len(grid), columns, squeeze=False), strict=True):
        for place, axes in enumerate(row):
            panel = panels[place] if place < len(panels) else None
            if panel is None:
                axes.set_visible(False)
                continue
            shown |= _draw(axes, panel, styles)
    ordered = [method for method in styles if method in shown]
    figure.suptitle(title, fontweight="bold")
    figure.legend(
        [shown[method] for method in ordered],
        ordered,
        loc="outside lower center",
        ncols=min(len(ordered), max(columns, 2)),
        frameon=False,
    )
    figure.savefig(path, dpi=150)


def _draw(axes: Any, panel: Panel, styles: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The line of each method."""
    lines = {}
    for method, curve in panel.curves.items():
        style = dict(styles[method])
        if not panel.joined:
            style["ls"] = ""
        elif len(curve.x) > 20:
            style["marker"] = ""
        (lines[method],) = axes.plot(curve.x, curve.y, **style, markersize=4.5, linewidth=1.6)
        if curve.low and curve.high:
            axes.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label, ylim=(-0.03, 1.03))
    axes.set_title(textwrap.fill(panel.title, TITLE_CHARACTERS), fontsize="medium")
    axes.grid(visible=True, alpha=0.25)
    if panel.falling:
        axes.invert_xaxis()
    return lines


def in_rows(panels: Sequence[Panel], columns: int) -> list[Sequence[Panel]]:
    """So many beside each other."""
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]
