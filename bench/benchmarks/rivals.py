"""Every simple rival of mode robust on both jobs: finding the very image, and what is like a query nobody has seen.

All ways are computed from the same passes of the network over the same perturbed images, so that none costs more than
a matrix product and hundreds can be compared: layers, poolings, whitenings, pixels, hashes, views, mixtures,
re-rankings. Readings of TMM-NN (`measure_presets`) meet the same images, one query at a time.
"""

import fnmatch
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.loading import HeldOut, load_held_out, parse_few
from tmm_engine.bench.methods import Method
from tmm_engine.bench.noise import Family, Perturbation
from tmm_engine.bench.options import check_folders, held_out_options, k_option, out_option
from tmm_engine.bench.plots import BASELINES, Curve, Panel, in_rows, styles_of
from tmm_engine.bench.records import Record, RecordFile
from tmm_engine.bench.retrievers import Recogniser, Retriever, scores_of_all
from tmm_engine.bench.rivals.keeping import Vectors, vectors_of
from tmm_engine.bench.rivals.parts import RAW, RECOGNISER, SAMPLE, Part, Passes
from tmm_engine.bench.rivals.reranking import GATES, expanded, gated, k_reciprocal
from tmm_engine.bench.rivals.roster import STRETCHED, Rival, roster
from tmm_engine.bench.statistics import bootstrap_interval, by_query, paired_difference
from tmm_engine.bench.suite import Suite
from tmm_engine.bench.tables import NONE, compared, folded, grouped, over_the_same, table
from tmm_engine.cli.display import progress_bar
from tmm_engine.index.descriptors.calibration import QUERIES, Calibrated, calibrate
from tmm_engine.index.descriptors.layers import find_layers
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.progress import Progress, silent
from tmm_engine.options import RECOGNITION
from tmm_engine.rerank.settings import PRESETS

KEY = ("job", "perturbation", "method")
VERY_IMAGE, UNSEEN = "the very image", "unseen"
CLEAN = Perturbation(Family.CLEAN, 0.0)
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


def measure_rivals(
    held: HeldOut,
    calibrated: Calibrated,
    record_file: RecordFile,
    *,
    perturbations: Sequence[Perturbation],
    rivals: Sequence[Rival] | None = None,
    k: int = 10,
    recognition: float = RECOGNITION,
    keep: Path | None = None,
    progress: Progress = silent,
) -> None:
    """Append a record for every job × perturbation × rival that has none yet.

    A record holds a list over queries each: of the very image ``rank`` (0 is first) and ``right``, how many of the k
    best others have its label; of unseen queries ``right``, ``kept``, how many of the k best are among those of the
    clean query, and ``taken``, whether the query was taken for a copy (null without a gate).

    Args:
        held: Exemplars and queries; as many exemplars are queries too.
        calibrated: What the engine chose for the exemplars.
        record_file: Opened with KEY.
        perturbations: What is done to each query.
        rivals: Default: `roster`.
        k: Neighbours looked at.
        recognition: The gate's threshold.
        keep: The folder that keeps what is looked at in the exemplars (`bench.rivals.keeping`), if any does.
        progress: Told of images embedded and perturbations done.
    """
    suite = held.suite
    rivals = roster(find_layers(suite.classifier)) if rivals is None else rivals
    looked_at = [part for rival in rivals for _, part in rival.parts]
    looked_at += [
        Part(RECOGNISER, part.views) for rival in rivals if rival.reranking in GATES for _, part in rival.parts
    ]
    passes = Passes(suite.classifier, calibrated, looked_at)
    rivals = [rival for rival in rivals if all(passes.available(part) for _, part in rival.parts)]
    everything = np.arange(len(suite.store))
    passes.fit(_pixels(suite, suite.order[::-1][:SAMPLE].copy()))
    of_exemplars = vectors_of(passes, suite.store.images(everything), folder=keep, progress=progress)
    jobs = _BothJobs(held, record_file, k)
    ordered = _clean_first(perturbations)
    for done, perturbation in enumerate(ordered, start=1):
        similarities = _Similarities(passes(jobs.queries(perturbation)), of_exemplars, threshold=recognition)
        for rival in rivals:
            scores, taken = similarities.of(rival)
            jobs.add(rival.name, perturbation, scores, taken and taken[len(held.queries) :])
        progress("comparing", done, len(ordered))


def measure_presets(
    held: HeldOut,
    presets: Sequence[Retriever],
    record_file: RecordFile,
    *,
    perturbations: Sequence[Perturbation],
    k: int = 10,
    progress: Progress = silent,
) -> None:
    """The same of readings of TMM-NN, on the same changed images.

    Args:
        held: As `measure_rivals`; the exemplars have features.
        presets: Of its exemplars.
        record_file: As `measure_rivals`.
        perturbations: As `measure_rivals`.
        k: As `measure_rivals`.
        progress: Told of queries answered.
    """
    jobs = _BothJobs(held, record_file, k)
    ordered, step = _clean_first(perturbations), 2 * len(held.queries)
    for number, perturbation in enumerate(ordered):
        missing = [preset for preset in presets if not jobs.known(preset.name, perturbation)]
        if not missing:
            continue
        images = jobs.queries(perturbation)
        scores: dict[str, list[Float[np.ndarray, "n"]]] = {preset.name: [] for preset in missing}
        for done, image in enumerate(images, start=1):
            for preset, found in scores_of_all(missing, image):
                scores[preset.name].append(found)
            progress("ranking", number * step + done, len(ordered) * step)
        for preset in missing:
            taken = _taken(preset, images[len(held.queries) :])
            jobs.add(preset.name, perturbation, torch.from_numpy(np.stack(scores[preset.name])), taken, keep=True)


def _taken(preset: Retriever, unseen: Float32[np.ndarray, "q c h w"]) -> list[bool] | None:
    """Which of them are taken for copies; None where the reading does not recognise any."""
    copies = [preset.recognised(image) if isinstance(preset, Recogniser) else None for image in unseen]
    flags = [copy_of.share >= 0.5 for copy_of in copies if copy_of is not None]
    return flags or None


def _clean_first(perturbations: Sequence[Perturbation]) -> list[Perturbation]:
    return [CLEAN, *(one for one in perturbations if one != CLEAN)]


class _BothJobs:
    """Exemplars as queries, then queries nobody has seen, under one perturbation after the other; and their records.

    Args:
        held: Exemplars and queries.
        record_file: Opened with KEY.
        k: Neighbours looked at.
    """

    def __init__(self, held: HeldOut, record_file: RecordFile, k: int) -> None:
        self._held, self._file, self._k = held, record_file, k
        self._rows = held.suite.queries(len(held.queries))
        self._plain = np.concatenate([_pixels(held.suite, self._rows), held.queries])
        kept = [record for record in record_file.records if "neighbours" in record]
        self._clean = {record["method"]: np.array(record["neighbours"], dtype=np.int64) for record in kept}

    def queries(self, perturbation: Perturbation) -> Float32[np.ndarray, "q2 c h w"]:
        """Of both jobs, changed."""
        places = range(len(self._plain))
        seeds = [int(np.random.SeedSequence((self._held.suite.seed, place)).generate_state(1)[0]) for place in places]
        return np.stack([perturbation.apply(image, seed=seed) for image, seed in zip(self._plain, seeds, strict=True)])

    def known(self, method: str, perturbation: Perturbation) -> bool:
        """Whether both records are there, and what later ones are compared with."""
        return method in self._clean and all(self._done(job, method, perturbation) for job in (VERY_IMAGE, UNSEEN))

    def add(
        self,
        method: str,
        perturbation: Perturbation,
        scores: Float[Tensor, "q2 n"],
        taken: list[bool] | None,
        *,
        keep: bool = False,
    ) -> None:
        """The records of both jobs that are not there yet; the clean ones come first.

        Args:
            method: Its name.
            perturbation: What was done to the queries.
            scores: Of all queries.
            taken: Of the unseen ones: whether each was taken for a copy.
            keep: Whether the record of clean unseen queries holds their ``neighbours`` too, the rows of the top k: then
                a later run need not answer them again.
        """
        count, k, labels = len(self._rows), self._k, self._held.suite.store.labels
        about = {"perturbation": perturbation.name, "family": str(perturbation.family), "level": perturbation.level}
        best = _best(scores, k + 1)
        found = best[count:, :k]
        clean = self._clean.setdefault(method, found)
        for job, measured in (
            (VERY_IMAGE, _very_image(scores[:count], best[:count], labels, self._rows)),
            (UNSEEN, _unseen(found, clean, labels, self._held.labels, taken)),
        ):
            if not self._done(job, method, perturbation):
                kept = {"neighbours": found.tolist()} if keep and (job, perturbation) == (UNSEEN, CLEAN) else {}
                self._file.append({"job": job} | about | {"method": method} | measured | kept)

    def _done(self, job: str, method: str, perturbation: Perturbation) -> bool:
        return self._file.done(job=job, perturbation=perturbation.name, method=method)


def _pixels(suite: Suite, rows: Int64[np.ndarray, "rows"]) -> Float32[np.ndarray, "rows c h w"]:
    return suite.store.images(rows).astype(np.float32) / np.float32(255.0)


class _Similarities:
    """Of queries and exemplars by each part; a mixture's are the weighted sum, since parts are of unit length."""

    def __init__(self, queries: Vectors, exemplars: Vectors, *, threshold: float) -> None:
        self._queries, self._exemplars, self._threshold = queries, exemplars, threshold
        self._computed: dict[Part, Float[Tensor, "q n"]] = {}

    def of(self, rival: Rival) -> tuple[Float[Tensor, "q n"], list[bool] | None]:
        """Larger is nearer; and which queries were taken for copies, where that is looked at."""
        (_, first), *_ = rival.parts
        own, theirs = self._queries[first], self._exemplars[first]
        if rival.reranking in GATES:
            by = Part(RECOGNISER, first.views)
            copies = self._queries[by], self._exemplars[by]
            scores, flags = gated(own, theirs, copies, threshold=self._threshold, first=GATES[rival.reranking])
            return scores, flags.tolist()
        if rival.reranking == "k-reciprocal":
            return k_reciprocal(own, theirs), None
        if rival.reranking is not None:
            return expanded(own, theirs, neighbours=int(rival.reranking.split()[1]), power=3.0), None
        return torch.stack([weight * self._by(part) for weight, part in rival.parts]).sum(0), None

    def _by(self, part: Part) -> Float[Tensor, "q n"]:
        if part not in self._computed:
            own, theirs = self._queries[part], self._exemplars[part]
            by_distance = part.source == RAW
            self._computed[part] = -torch.cdist(own.double(), theirs.double()) if by_distance else own @ theirs.T
        return self._computed[part]


def _best(scores: Float[Tensor, "q n"], k: int) -> Int64[np.ndarray, "q k"]:
    """The k best of each row, best first."""
    return scores.topk(k, dim=1).indices.numpy()


def _very_image(
    scores: Float[Tensor, "q n"],
    best: Int64[np.ndarray, "q k1"],
    labels: Int64[np.ndarray, "n"],
    rows: Int64[np.ndarray, "q"],
) -> dict[str, list[int]]:
    """`best` is one more than is looked at, since the image itself does not count."""
    own = torch.from_numpy(rows)[:, None]
    rank = (scores > scores.gather(1, own)).sum(dim=1)
    right = []
    for found, itself in zip(best, rows, strict=True):
        others = found[found != itself][: best.shape[1] - 1]
        right.append(int((labels[others] == labels[itself]).sum()))
    return {"rank": rank.tolist(), "right": right}


def _unseen(
    found: Int64[np.ndarray, "q k"],
    clean: Int64[np.ndarray, "q k"],
    labels: Int64[np.ndarray, "n"],
    own: Int64[np.ndarray, "q"],
    taken: list[bool] | None,
) -> dict[str, list[int] | list[bool] | None]:
    kept = [len(set(now) & set(before)) for now, before in zip(found.tolist(), clean.tolist(), strict=True)]
    right = (labels[found] == own[:, None]).sum(axis=1)
    return {"right": right.tolist(), "kept": kept, "taken": taken}


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
