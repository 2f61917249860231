"""Draws the pictures of this site from the handwritten digits that come with the package.

make demo && .venv/bin/python docs/make_pictures.py demo-output/digits.idx

Needs matplotlib (extra `bench`). Look at what it draws before you commit it.
"""

import math
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from tmm_engine import Engine, Query
from tmm_engine.digits import load_digits
from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.descriptors.columns import describer_of
from tmm_engine.index.descriptors.views import symmetric_views
from tmm_engine.options import RECOGNITION
from tmm_engine.rerank import preset

mpl.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).parent / "pictures"
EXEMPLARS, SHOWN, ROW = 1400, 5, 300
RIGHT, WRONG, INK, FAINT = "#1a7f5a", "#c62f36", "#1f2933", "#6b7785"
BLUE, ORANGE = "#0b5fa5", "#c8670a"
plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": FAINT})


def changed(images, kind, seed=0, std=0.15):
    """float32 (n, 1, 8, 8) in [0, 1]: as they are, darkened, or darkened under noise of this standard deviation."""
    pixels = images[:, None].astype(np.float32) / 255
    if kind == "clean":
        return pixels
    if kind == "dark":
        return 0.4 * pixels
    noise = np.random.default_rng(seed).normal(0, std, pixels.shape)
    return np.clip(0.6 * pixels + noise, 0, 1).astype(np.float32)


def show(axes, pixels, *, frame=None, mark="", low=0.0, high=1.0):
    axes.imshow(np.asarray(pixels).squeeze(), cmap="gray", vmin=low, vmax=high)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=frame or "#cfd6dd", linewidth=2.5 if frame else 1, linestyle="--" if frame == WRONG else "-")
    if mark:
        axes.set_xlabel(mark, color=frame or FAINT, labelpad=3)


def save(figure, name):
    figure.savefig(OUT / f"{name}.png", dpi=110, facecolor="white", bbox_inches="tight", pad_inches=0.12)
    plt.close(figure)


def draw_modes(engine, images, labels):
    """A query, clean, dark and noisy, and its neighbours by two modes."""
    kinds = {"clean": "as it is", "dark": "darkened", "noisy": "darkened,\nunder noise"}
    figure, grid = plt.subplots(
        3, 2 * SHOWN + 2, figsize=(10.4, 3.7), width_ratios=[1.15, *[1] * SHOWN, 0.25, *[1] * SHOWN]
    )
    for row, (kind, title) in enumerate(kinds.items()):
        pixels = changed(images[ROW : ROW + 1], kind)[0]
        show(grid[row, 0], pixels)
        grid[row, 0].set_ylabel(title, rotation=0, ha="right", va="center", labelpad=8)
        grid[row, SHOWN + 1].axis("off")
        for mode, start in (("robust", 1), ("cosine", SHOWN + 2)):
            for place, hit in enumerate(engine.search(Query("", pixels, None), k=SHOWN, mode=mode).hits):
                right = hit.label == labels[ROW]
                mark = "✓ itself" if int(hit.id) == ROW else f"{'✓' if right else '✗'} {hit.class_name}"
                shown = images[int(hit.id)] / 255
                show(grid[row, start + place], shown, frame=RIGHT if right else WRONG, mark=mark)
                grid[row, start + place].xaxis.label.set_size(7)
    grid[0, 0].set_title("query", fontsize=10)
    for title, column in (("five nearest by robust", SHOWN // 2 + 1), ("by cosine", SHOWN + 2 + SHOWN // 2)):
        grid[0, column].set_title(title, fontsize=10)
    save(figure, "modes")


def draw_views(images):
    """What mode robust makes of a query before the network sees it."""
    pixels = torch.from_numpy(changed(images[ROW : ROW + 1], "dark"))
    drawn = [("query", pixels), ("contrast stretched", stretch_contrast(pixels))]
    names = ("view 1: itself", "view 2: blurred", "view 3: moved down", "view 4: moved up")
    drawn += list(zip(names, symmetric_views(pixels, 4), strict=True))
    figure, grid = plt.subplots(1, len(drawn), figsize=(10.4, 2.0))
    for axes, (name, picture) in zip(grid, drawn, strict=True):
        show(axes, picture.numpy())
        axes.set_title(name, fontsize=9)
    save(figure, "views")


def draw_layers(report):
    """How well each layer finds mildly changed images again."""
    found = report["recognisers"]
    figure, axes = plt.subplots(figsize=(6.4, 1.9))
    names = [each["layer"] for each in found]
    shares = [each["mrr"] for each in found]
    colours = [BLUE if name == report["recogniser"] else "#b8c4cf" for name in names]
    axes.barh(names, shares, color=colours, height=0.65)
    for place, share in enumerate(shares):
        axes.text(share + 0.008, place, f"{share:.2f}", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("mean reciprocal rank of the original (1: always first)")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "layers")


def ratios(describer, kept, images):
    """Distance of each image to the nearest exemplar over that to the second nearest."""
    queries = describer.of_stored(np.rint(255 * images).astype(np.uint8), describer.descriptors.recogniser)
    alike = np.sort(queries @ kept.T, axis=1)[:, -2:]
    return [math.sqrt(max(0, 1 - first) / max(1e-9, 1 - second)) for second, first in alike]


def draw_gate(engine, index, images):
    """Lowe's ratio, of copies and of images that are none."""
    describer = describer_of(index, engine.classifier)
    kept = np.stack(engine.to_arrow(columns=["copy_feature"])["copy_feature"].to_numpy())
    copies = ratios(describer, kept, changed(images[:400], "noisy", std=0.03))
    others = ratios(describer, kept, changed(images[EXEMPLARS:], "clean"))
    figure, axes = plt.subplots(figsize=(6.4, 2.5))
    for values, colour, label in (
        (others, ORANGE, "digits that the index has not"),
        (copies, BLUE, "exemplars, darkened under noise"),
    ):
        shares = np.full(len(values), 100 / len(values))
        axes.hist(values, np.linspace(0, 1, 41), weights=shares, color=colour, alpha=0.75, label=label)
    axes.axvline(RECOGNITION, color=INK, linewidth=1.2, linestyle=":")
    axes.text(RECOGNITION - 0.01, axes.get_ylim()[1] * 0.92, "taken for copies", ha="right", fontsize=8)
    axes.set_xlabel("distance to the nearest exemplar ÷ distance to the second nearest")
    axes.set_ylabel("% of them")
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "gate")
    return np.mean(np.array(copies) < RECOGNITION), np.mean(np.array(others) < RECOGNITION)


def draw_trigger(engine, images):
    """TMM-NN's trigger, and what it makes of query and exemplar."""
    query = changed(images[ROW : ROW + 1], "clean")[0]
    answer = engine.search(Query("", query, None), k=1, mode="tmm", config=preset("paper"))
    size = float(np.abs(answer.trigger).max())
    drawn = (
        ("query", query, 0, 1),
        ("its trigger", answer.trigger, -size, size),
        ("query + trigger", answer.triggered_query, 0, 1),
    )
    figure, grid = plt.subplots(1, 3, figsize=(5.2, 1.9))
    for axes, (name, picture, low, high) in zip(grid, drawn, strict=True):
        show(axes, picture, low=low, high=high)
        axes.set_title(name, fontsize=9)
    save(figure, "trigger")


def main(index):
    OUT.mkdir(exist_ok=True)
    images, labels = load_digits()
    with Engine.open(index, device="cpu") as engine:
        draw_modes(engine, images, labels)
        draw_views(images)
        draw_layers(describer_of(index, engine.classifier).descriptors.report)
        copies, others = draw_gate(engine, index, images)
        draw_trigger(engine, images)
    print(f"taken for copies: {copies:.1%} of the changed exemplars, {others:.1%} of the others")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
