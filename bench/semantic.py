"""How alike in meaning the neighbours of held-out queries are: by label, by structure, and to the eye (a gallery).

A held-out query has no true exemplar to find, so what counts is whether its neighbours show the same kind of thing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from tmm_engine.bench.records import RecordFile, read_records
from tmm_engine.bench.retrievers import Recogniser, Retriever, top
from tmm_engine.bench.ssim import ssim
from tmm_engine.index.errors import InputError
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.images import to_uint8
from tmm_engine.index.store.exemplars import ExemplarStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEY = ("query", "method")
"""What tells the records of `measure_semantic` and of `bench.oracle` apart."""

SHOWN = 3  # neighbours of each method that SSIM and the gallery look at
CELL_INCHES = 0.78
LONGEST_NAME = 12  # characters of a class name that fit below a picture
AGREES, DIFFERS, INK = "#1a7f4b", "#c4342d", "#16181d"

Neighbours = Mapping[int, Mapping[str, Sequence[str]]]
"""Query -> method -> ids of its neighbours, nearest first."""


def measure_semantic(
    retrievers: Sequence[Retriever],
    queries: Float32[np.ndarray, "q c h w"],
    labels: Int64[np.ndarray, "q"],
    exemplars: ExemplarStore,
    record_file: RecordFile,
    *,
    k: int = 10,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Search for queries that are not exemplars, and append one record for each query and method.

    A record holds ``query`` (position in ``queries``), ``method``, ``label``, ``label_precision`` (share of the k
    neighbours with the query's label), ``knn_correct`` (whether most of them have it; ties go to the nearest),
    ``ssim`` (mean SSIM of the query with its nearest three), ``recognised`` (whether the method took it for a copy of
    an exemplar, wrongly: it is held out; null where it does not recognise copies) and ``neighbours`` (k ids, nearest
    first). What the file has already is not measured again.

    Args:
        retrievers: The methods; their names are unique.
        queries: Pixels in [0, 1].
        labels: One per query, in the exemplars' classes.
        exemplars: What the retrievers search, row by row.
        record_file: Keyed by `KEY`.
        k: Neighbours, at most as many as there are exemplars.
        seed: Handed to every search.
        progress: Told of the searches done.

    Raises:
        InputError: names that are not unique, or no such k.
    """
    _check(retrievers, exemplars, k)
    done, total = 0, len(queries) * len(retrievers)
    for query, (image, label) in enumerate(zip(queries, labels.tolist(), strict=True)):
        for retriever in retrievers:
            if not record_file.done(query=query, method=retriever.name):
                rows = top(retriever.scores(image, seed=seed), exemplars.ids, k)
                found = {"label": label, "recognised": _recognised(retriever, image)}
                found |= _judged(image, label, rows, exemplars)
                record_file.append({"query": query, "method": retriever.name} | found)
            done += 1
            progress("searching", done, total)


def read_neighbours(semantic: Path) -> dict[int, dict[str, list[str]]]:
    """The neighbour sets in the records of `measure_semantic`: query -> method -> ids, nearest first.

    Raises:
        InputError: not such records, none, or not of every method for every query (an interrupted run).
    """
    sets: dict[int, dict[str, list[str]]] = {}
    try:
        for record in read_records(semantic).records:
            sets.setdefault(record["query"], {})[record["method"]] = record["neighbours"]
    except KeyError as missing:
        raise InputError(f"{semantic}: expected records of the semantic benchmark, got one without {missing}") from None
    methods = {method for found in sets.values() for method in found}
    lacking = [query for query, found in sets.items() if found.keys() != methods]
    if lacking or not sets:
        problem = f"query {lacking[0]} lacks methods" if lacking else "there are none"
        raise InputError(
            f"{semantic}: expected neighbours by every method, but {problem}; run the benchmark to its end"
        )
    return dict(sorted(sets.items()))


def rows_of(ids: Sequence[str], rows: Mapping[str, int]) -> Int64[np.ndarray, "k"]:
    """The rows of exemplars, by the row of every id.

    Raises:
        InputError: there is no exemplar of an id.
    """
    try:
        return np.array([rows[name] for name in ids], dtype=np.int64)
    except KeyError as missing:
        raise InputError(
            f"no exemplar has the id {missing}; give the exemplars that the records were made with"
        ) from None


def draw_gallery(
    semantic: Path,
    queries: Float32[np.ndarray, "q c h w"],
    labels: Int64[np.ndarray, "q"],
    exemplars: ExemplarStore,
    out: Path,
    *,
    rows: int = 8,
    class_names: Sequence[str] | None = None,
) -> None:
    """A picture: the first queries as rows, the nearest three of every method as columns, framed by label agreement.

    Args:
        semantic: Records of `measure_semantic`.
        queries: As measured, pixels in [0, 1].
        labels: One per query.
        exemplars: As measured.
        out: The file to write; its suffix is the format.
        rows: How many queries are shown.
        class_names: One per class; by default its number.

    Raises:
        InputError: matplotlib is not installed, or the records are not of these queries and exemplars.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need the 'bench' extra: pip install 'tmm-engine[bench]'") from None
    sets = dict(list(read_neighbours(semantic).items())[:rows])
    check_queries(sets, queries)
    row_of = {name: row for row, name in enumerate(exemplars.ids)}
    methods = list(next(iter(sets.values())))
    firsts = [2 + (SHOWN + 1) * number for number in range(len(methods))]  # each method's first column
    widths = [1.0] + len(methods) * ([0.3] + SHOWN * [1.0])
    height = CELL_INCHES * 1.3 * len(sets) + 0.5
    margins = {"left": 0.01, "right": 0.99, "bottom": 0.25 / height, "top": 1 - 0.35 / height}
    spacing = {"width_ratios": widths, "wspace": 0.14, "hspace": 0.3}
    figure = Figure(figsize=(CELL_INCHES * 1.08 * sum(widths), height))
    cells = figure.subplots(len(sets), len(widths), squeeze=False, gridspec_kw=margins | spacing)
    for cell in cells.flat:
        cell.axis("off")
    for first, title in zip((0, *firsts), ("query", *methods), strict=True):
        cells[0, first].set_title(title, loc="left", fontsize=9, fontweight="bold", color=INK, pad=6)
    names = class_names or [str(label) for label in range(max(labels.max(), exemplars.labels.max()) + 1)]
    for row, (query, found) in zip(cells, sets.items(), strict=True):
        label = int(labels[query])
        _draw(row[0], to_uint8(queries[query][None])[0], names[label], None)
        for method, first in zip(methods, firsts, strict=True):
            near = rows_of(found[method][:SHOWN], row_of)
            for cell, image, own in zip(row[first:], exemplars.images(near), exemplars.labels[near], strict=False):
                _draw(cell, image, names[own], bool(own == label))
    figure.savefig(out, dpi=150)


def check_queries(sets: Neighbours, queries: Float32[np.ndarray, "q c h w"]) -> None:
    """Refuse queries that cannot be those of the records.

    Raises:
        InputError: the records have a query that is not there.
    """
    if max(sets) >= len(queries):
        raise InputError(
            f"expected the queries that the records were made with, but they have query {max(sets)} and there are only "
            f"{len(queries)}; give the same source, number and seed"
        )


def _recognised(retriever: Retriever, image: Float32[np.ndarray, "c h w"]) -> bool | None:
    found = retriever.recognised(image) if isinstance(retriever, Recogniser) else None
    return None if found is None else found.share >= 0.5


def _judged(
    image: Float32[np.ndarray, "c h w"], label: int, rows: Int64[np.ndarray, "k"], exemplars: ExemplarStore
) -> dict[str, Any]:
    labels = exemplars.labels[rows].tolist()
    nearest = exemplars.images(rows[:SHOWN]).astype(np.float32) / 255
    return {
        "label_precision": labels.count(label) / len(labels),
        "knn_correct": Counter(labels).most_common(1)[0][0]
        == label,  # of equally common, the first counted: the nearest
        "ssim": float(ssim(image, nearest).mean()),
        "neighbours": exemplars.ids[rows].tolist(),
    }


def _check(retrievers: Sequence[Retriever], exemplars: ExemplarStore, k: int) -> None:
    names = [retriever.name for retriever in retrievers]
    if len(set(names)) != len(names):
        raise InputError(f"expected methods with names of their own, got {', '.join(names)}; leave out the repeated")
    if not 1 <= k <= len(exemplars):
        raise InputError(f"expected k from 1 to {len(exemplars)}, the number of exemplars, got {k}")


def _draw(axes: "Axes", image: UInt8[np.ndarray, "c h w"], name: str, agrees: bool | None) -> None:
    """One picture, its label below; framed and marked where it agrees (or not) with the query."""
    axes.axis("on")
    axes.imshow(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1), cmap="gray", vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
    mark, colour = {None: ("", INK), True: ("✓ ", AGREES), False: ("✗ ", DIFFERS)}[agrees]
    axes.set_xlabel(mark + (name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"))
    axes.xaxis.label.set(fontsize=8, color=colour)
    axes.xaxis.labelpad = 3
    for side in axes.spines.values():
        side.set(color=colour, linewidth=0.6 if agrees is None else 2.5)
