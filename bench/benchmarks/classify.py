"""Do sets of classes hold the right one as often as said, and is the most trusted 90 % right more often than softmax's?

Exemplars are from one split, calibration images and queries from another, all drawn with a seed. Coverage is measured
on clean queries; accuracy at 90 % coverage under noise, over all perturbations together: the tenth that a method
trusts least is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.loading import HeldOut, load_held_out, parse_few
from tmm_engine.bench.noise import Family, Perturbation
from tmm_engine.bench.options import check_folders, held_out_options, k_option, out_option
from tmm_engine.bench.records import Record, RecordFile
from tmm_engine.bench.selective import binomial_bounds, selective
from tmm_engine.bench.statistics import Interval, wilson_interval
from tmm_engine.bench.tables import NONE, grouped, mean, rate, table
from tmm_engine.classifying.calibrating import calibrate_on_itself
from tmm_engine.classifying.conformal import margins, p_values
from tmm_engine.classifying.labels import PresentLabels
from tmm_engine.classifying.nearness import class_scores
from tmm_engine.cli.display import progress_bar
from tmm_engine.cli.output import echo_json
from tmm_engine.describing import DEFAULT_VIEWS, describe
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.descriptors.columns import COPY_FEATURE, ROBUST_FEATURE
from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.neighbours.factories import EXACT
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.nearest import Compared, Gate, NearestSearch
from tmm_engine.options import RECOGNITION, SearchOptions
from tmm_engine.rerank.timing import Timings
from tmm_engine.scanning import ByVector
from tmm_engine.snapshot import Snapshot

KEY = ("query", "perturbation", "method")
CLEAN = Perturbation(Family.CLEAN, 0.0)
ALPHAS = {"01": 0.01, "05": 0.05, "10": 0.1}
COVERAGE = 0.9
OURS, OWN, VOTES, SOFTMAX = "robust", "robust, leave-one-out", "robust, votes", "softmax"
MODES = (OURS, "cosine")
DEFAULT = (
    "brightness 0.4,contrast 0.4,gaussian 2.5,gaussian 5,blur 1,jpeg 15,shift 2,shift 4,rotation 10,crop 0.85,"
    "occlusion 0.25,saturation 0,hue 30,dark-noise 1,crop-blur 0.5"
)


@click.command("classify")
@click.argument("source")
@held_out_options
@k_option
@click.option(
    "--calibration", type=click.IntRange(min=1), default=2000, show_default=True, help="Others from where queries are."
)
@click.option("--noisy", type=click.IntRange(min=1), default=150, show_default=True, help="Queries that noise is on.")
@click.option("--perturbations", default=DEFAULT, show_default=True, help="Each a family and a level, by commas.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
@out_option
def command(source: str, **options: Any) -> None:
    """Do sets of classes hold the right one as often as said? What is the most trusted 90 % worth beside softmax?

    \b
    Examples:
      engine bench classify mnist --root data --model resnet18 --weights mnist.safetensors --out classify.jsonl
      engine bench classify cifar10/ --split train --weights c.safetensors --model resnet18 --queries 500 \\
          --calibration 2000 --json --out runs/classify.jsonl
    """
    perturbations = parse_few(options["perturbations"])
    check_folders(options["out"])
    queries = options["queries"]
    with progress_bar() as progress:
        held = load_held_out(source, options | {"queries": queries + options["calibration"]}, progress)
        settings = {name: options[name] for name in ("k", "queries", "calibration", "noisy")}
        with held.suite.records(options["out"], "classify", [], KEY, **settings, query_source=held.source) as records:
            measure_classify(
                held,
                records,
                perturbations=perturbations,
                queries=queries,
                noisy=options["noisy"],
                k=options["k"],
                progress=progress,
            )
            found = figures(records.records)
    if options["as_json"]:
        echo_json(found)
    else:
        click.echo(f"{options['out']}: {queries} queries from {held.source}, {options['calibration']} to calibrate on")


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the engine's searches and the model make of some images, all passes in batches.

    Attributes:
        ranked_by: Of each image, by mode.
        nearest: The rows of its k nearest exemplars in mode robust, and their scores.
        probabilities: The model's own.
    """

    ranked_by: dict[str, list[ByVector]]
    nearest: list[tuple[Int64[np.ndarray, "k"], Float64[np.ndarray, "k"]]]
    probabilities: Float64[np.ndarray, "q classes"]


class Searched:
    """An index of the exemplars in memory, searched in the modes robust and cosine as the engine does.

    Args:
        held: Exemplars, and images that are queries first, then calibration images.
        queries: How many are queries.
        k: Exemplars of each class that are looked at.
        progress: Told of images embedded.
    """

    def __init__(self, held: HeldOut, *, queries: int, k: int, progress: Progress = silent) -> None:
        store, self._classifier = held.suite.store, held.suite.classifier
        source = ArraySource(store.images(np.arange(len(store))), store.labels, name="exemplars")
        made = describe(
            source, self._classifier, views=DEFAULT_VIEWS, recogniser=None, global_trigger=None, progress=progress
        )
        assert made.describer is not None
        self._describer, self._k = made.describer, k
        self.store = MemoryStore.of(source, self._classifier, columns=made.columns, progress=progress)
        self._nearest = NearestSearch(self.store, factory=EXACT, cache=None)
        vocabulary = Vocabulary(self._classifier.class_names)
        self.present = PresentLabels.of(self.store, vocabulary)
        snapshot = Snapshot.of(self._classifier, self.store, vocabulary=vocabulary, describer=self._describer)
        own = calibrate_on_itself(snapshot, SearchOptions(mode=OURS, k=k)).margins
        images = np.rint(held.queries[queries:] * 255.0).astype(np.float32) / np.float32(255.0)
        seen, labels = self.see(images, progress=progress), held.labels[queries:]
        self.calibrated = {mode: self._right(self.strange(seen, mode), labels) for mode in MODES} | {OWN: own}

    def see(self, images: Float32[np.ndarray, "q c h w"], *, progress: Progress = silent) -> Seen:
        """Embedded in batches, then searched."""
        step = max(1, forward_batch_size(self._classifier.image_shape) // self._describer.descriptors.views)
        parts = []
        for start in range(0, len(images), step):
            parts.append(self._passed(images[start : start + step]))
            progress("embedding queries", min(start + step, len(images)), len(images))
        plain, robust, copies, probabilities = (np.concatenate(part) for part in zip(*parts, strict=True))
        gate, timings = Gate(COPY_FEATURE, copies, RECOGNITION), Timings(len(images))
        predicted = probabilities.argmax(axis=1).tolist()
        compared = Compared(robust, Metric.COSINE, ROBUST_FEATURE, gate, predicted, plain)
        ours = self._nearest.search(compared, k=self._k, timings=timings)
        return Seen(
            {
                OURS: [ByVector(one.query, ROBUST_FEATURE, Metric.COSINE) for one in ours],
                "cosine": [ByVector(one, FEATURE, Metric.COSINE) for one in plain],
            },
            [(one.rows, one.scores) for one in ours],
            probabilities,
        )

    def strange(self, seen: Seen, mode: str) -> Float64[np.ndarray, "q classes"]:
        """The margin of every class, numbered as the model's; infinite for one without exemplars."""
        scores = class_scores(self.store, seen.ranked_by[mode], self.present.places, k=self._k)
        whole = np.full((len(scores), self._classifier.num_classes), np.inf)
        whole[:, self.present.numbers] = margins(scores)
        return whole

    def _passed(self, images: Float32[np.ndarray, "b c h w"]) -> tuple[np.ndarray, ...]:
        descriptors = self._describer.descriptors
        with torch.inference_mode():
            pixels = torch.from_numpy(images).to(self._classifier.device)
            plain = self._classifier.features(pixels)
            probabilities = torch.softmax(self._classifier.logits(plain).double(), dim=1)
            views = self._describer.views(pixels)
            both = [self._describer.described(views, which) for which in (descriptors.robust, descriptors.recogniser)]
            return plain.float().cpu().numpy(), *both, probabilities.cpu().numpy()

    def _right(
        self, strange: Float64[np.ndarray, "q classes"], labels: Int64[np.ndarray, "q"]
    ) -> Float64[np.ndarray, "q"]:
        return np.sort(strange[np.arange(len(labels)), labels])


def measure_classify(
    held: HeldOut,
    record_file: RecordFile,
    *,
    perturbations: Sequence[Perturbation],
    queries: int,
    noisy: int,
    k: int = 10,
    progress: Progress = silent,
) -> None:
    """Append a record for every query × perturbation × method that has none yet; the clean queries come first.

    A record holds ``correct``, ``trust`` (what the method would abstain by; larger is surer) and, where the method
    makes sets, ``p_right``, the p-value of the right class, and the sizes ``size_01``, ``size_05``, ``size_10``; else
    null.

    Args:
        held: Exemplars; its images are queries first, then calibration images.
        record_file: Opened with KEY.
        perturbations: What is done to the queries.
        queries: How many of the images are queries.
        noisy: How many of the queries noise is on.
        k: Exemplars of each class that are looked at.
        progress: Told of perturbations done.
    """
    ordered = [CLEAN, *(one for one in perturbations if one != CLEAN)]
    missing = [one for one in ordered if not record_file.done(query=0, perturbation=one.name, method=SOFTMAX)]
    if not missing:
        return
    searched = Searched(held, queries=queries, k=k, progress=progress)
    for done, perturbation in enumerate(missing, start=1):
        count = queries if perturbation == CLEAN else min(noisy, queries)
        seeds = [int(np.random.SeedSequence((held.suite.seed, one)).generate_state(1)[0]) for one in range(count)]
        changed = np.stack(
            [perturbation.apply(image, seed=seed) for image, seed in zip(held.queries[:count], seeds, strict=True)]
        )
        about = {"perturbation": perturbation.name, "family": str(perturbation.family), "level": perturbation.level}
        for method, answers in _answers(searched, searched.see(changed), held.labels[:count]):
            for query, answer in enumerate(answers):
                if not record_file.done(query=query, perturbation=perturbation.name, method=method):
                    record_file.append({"query": query} | about | {"method": method} | answer)
        progress("classifying under noise", done, len(missing))


def _answers(searched: Searched, seen: Seen, labels: Int64[np.ndarray, "q"]) -> Iterator[tuple[str, list[Record]]]:
    """Every method's, softmax last."""
    for mode in MODES:
        strange = searched.strange(seen, mode)
        for method in (mode, *([OWN] if mode == OURS else [])):
            found = p_values(strange, searched.calibrated[method])
            yield method, [_of_sets(*one) for one in zip(strange, found, labels.tolist(), strict=True)]
    neighbours = [(searched.store.labels[rows], scores) for rows, scores in seen.nearest]
    yield VOTES, [_of_votes(*found, label) for found, label in zip(neighbours, labels.tolist(), strict=True)]
    said = zip(seen.probabilities, labels.tolist(), strict=True)
    yield (
        SOFTMAX,
        [
            {"correct": int(own.argmax()) == label, "trust": float(own.max()), "p_right": None} | _NO_SETS
            for own, label in said
        ],
    )


def _of_sets(strange: Float64[np.ndarray, "classes"], found: Float64[np.ndarray, "classes"], label: int) -> Record:
    sizes = {f"size_{name}": int((found > alpha).sum()) for name, alpha in ALPHAS.items()}
    correct, trust = int(strange.argmin()) == label, float(found.max())
    return {"correct": correct, "trust": trust, "p_right": float(found[label])} | sizes


def _of_votes(labels: Int64[np.ndarray, "k"], scores: Float64[np.ndarray, "k"], label: int) -> Record:
    """The plain rival: the commonest label of the k neighbours, trusted by its share; where that ties, by nearness."""
    names, counts = np.unique(labels, return_counts=True)
    trust = float(counts.max() / len(labels) + 1e-3 * scores.mean())
    return {"correct": bool(names[counts.argmax()] == label), "trust": trust, "p_right": None} | _NO_SETS


_NO_SETS: Record = {f"size_{name}": None for name in ALPHAS}


def figures(records: Sequence[Record]) -> dict[str, Any]:
    """The figures of one file: of mode robust ``coverage_01/05/10`` on clean queries and ``accuracy_90`` under noise,
    of softmax ``accuracy_90_softmax``; with 95 % intervals, and the 99 % binomial bounds of each coverage.
    """
    by_method = {method: cell for (method,), cell in grouped(records, "method").items()}
    clean = [record for record in by_method[OURS] if record["family"] == "clean"]
    found: dict[str, Any] = {}
    intervals: dict[str, Interval] = {}
    for name, alpha in ALPHAS.items():
        key = f"coverage_{name}"
        intervals[key] = covered(clean, alpha)
        found |= {f"{key}_bounds": [*binomial_bounds(1 - alpha, len(clean))]}
    for key, method in (("accuracy_90", OURS), ("accuracy_90_softmax", SOFTMAX), ("accuracy_90_votes", VOTES)):
        noisy = [record for record in by_method[method] if record["family"] != "clean"]
        if noisy:
            intervals[key] = trusted(noisy)
    values = {key: one.estimate for key, one in intervals.items()}
    return values | found | {f"{key}_interval": [one.low, one.high] for key, one in intervals.items()}


def covered(records: Sequence[Record], alpha: float) -> Interval:
    """How often the set holds the right class."""
    return wilson_interval(sum(record["p_right"] > alpha for record in records), len(records))


def trusted(records: Sequence[Record]) -> Interval:
    """Accuracy at 90 % coverage."""
    return selective(
        np.array([record["trust"] for record in records]),
        np.array([bool(record["correct"]) for record in records]),
        np.array([record["query"] for record in records]),
        coverage=COVERAGE,
    )


def section(run: Run, _: Sheet) -> list[str]:
    """A row for each method, under noise and clean."""
    rows = []
    for (method,), cell in grouped(run.records, "method").items():
        clean = [record for record in cell if record["family"] == "clean"]
        noisy = [record for record in cell if record["family"] != "clean"]
        sets = clean[0]["p_right"] is not None
        row = {"method": method, "accuracy, clean": rate([bool(record["correct"]) for record in clean], clean)}
        row["accuracy, noise"] = rate([bool(record["correct"]) for record in noisy], noisy)
        row["accuracy at 90 %, noise"] = str(trusted(noisy)) if noisy else NONE
        for name, alpha in ALPHAS.items():
            told = f"{covered(clean, alpha):.3f}; {mean(clean, f'size_{name}', spec='.2f')}" if sets else NONE
            row[f"coverage; size at {alpha:g}, clean"] = told
        rows.append(row)
    note = (
        "Size: classes in a set. Accuracy at 90 %: without the tenth of all noisy queries that the method trusts "
        "least. leave-one-out: calibrated on the exemplars, which the model was trained on. votes: the commonest label "
        "of the neighbours."
    )
    return [table(rows), note]


FIELDS = ("query", "perturbation", "family", "method", "correct", "trust", "p_right")
BENCHMARK = Benchmark(command, Reported("Classes with a measure of doubt", KEY, FIELDS, section))
