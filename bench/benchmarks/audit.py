"""Does an audit find what is wrong? Copies, leaks, flipped labels and foreign images are planted, and counted.

Beside it the tools that people use: perceptual hashes and cosine similarity for copies, cleanlab for labels (out of
process), the distance to the k-th neighbour, maximum softmax and energy for foreign images.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
from jaxtyping import Bool
from scipy.special import softmax

from tmm_engine.auditing.findings import Kind
from tmm_engine.auditing.foreign import energies, logits_of
from tmm_engine.auditing.options import NEIGHBOURS
from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.loading import opened
from tmm_engine.bench.options import check_folders, classifier_options, out_option
from tmm_engine.bench.planting.cleanlab import cleanlab_scores
from tmm_engine.bench.planting.data import Planted, drawn, plant
from tmm_engine.bench.planting.faults import CHANGES, flipped
from tmm_engine.bench.planting.measures import auroc, average_precision
from tmm_engine.bench.records import Record, RecordFile, describe_run
from tmm_engine.bench.rivals.hashes import HASHES, hashed
from tmm_engine.bench.statistics import wilson_interval
from tmm_engine.bench.tables import NONE, grouped, table
from tmm_engine.cli.display import progress_bar
from tmm_engine.engine import Engine
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.vectors import normalised
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.sources.records import ImageRecord, ImageSource

KEY = ("fault", "share", "draw")
SHARES = (0.01, 0.05, 0.1)
QUOTED = 0.05
DRAWS = 3  # of flipped labels, which cost no pass
NEIGHBOUR = 50  # whose distance is the rival (Sun et al., ICML 2022)


@click.command("audit")
@click.argument("source")
@classifier_options
@click.option("--exemplars", type=click.IntRange(min=100), default=2000, show_default=True, help="A random subset.")
@click.option("--foreign", "foreign", required=True, metavar="SOURCE", help="Where foreign images are from.")
@click.option("--foreign-split", help="Of it.")
@click.option("--one-per", metavar="PATTERN", help="Only one image for each group in its path, as in '^(.*)_'.")
@click.option("--timed", type=click.Path(path_type=Path), metavar="INDEX", help="Time an audit of it, not of SOURCE.")
@click.option("--only-time", is_flag=True, help="With --timed: plant nothing.")
@click.option("--cleanlab", type=click.Path(path_type=Path), metavar="PYTHON", help="An interpreter that has cleanlab.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all draws.")
@click.option("--name", help="The data set's name in the report. Default: as the source calls itself.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@out_option
def command(source: str, *, as_json: bool, **options: Any) -> None:
    """Does an audit find planted copies, leaks, wrong labels and foreign images?

    Take images that the classifier was not trained on: it knows the labels of the others by heart.

    \b
    Examples:
      engine bench audit mnist --root data --split test --model resnet18 --weights m.safetensors \\
          --foreign gtsrb/ --foreign-split train --out audit.jsonl
      engine bench audit gtsrb/ --split train --one-per '^(.*)_' --model resnet18 --weights g.safetensors \\
          --foreign cifar10/ --foreign-split train --out runs/audit.jsonl --json
      engine bench audit mnist --root data --model resnet18 --weights m.safetensors --foreign gtsrb/ \\
          --timed mnist.idx --only-time --out runs/time.jsonl
    """
    check_folders(options["out"])
    if options["only_time"] and options["timed"] is None:
        raise click.UsageError("--only-time has no effect without --timed")
    with progress_bar() as progress, ExitStack() as stack:
        images, classifier = opened(source, options)
        root = None if Path(options["foreign"]).exists() else options["root"]  # of a data set by its name
        others = open_source(options["foreign"], split=options["foreign_split"], root=root)
        seed, one_per = options["seed"], options["one_per"]
        timed = None
        if options["timed"] is not None:
            timed = stack.enter_context(Engine.open(options["timed"], device=options["device"], backend="torch"))
        planted = None
        if not options["only_time"]:
            records = drawn(images, classifier, count=options["exemplars"], seed=seed, one_per=one_per)
            planted = _planted(records, others, classifier, seed=seed, progress=progress)
        identity = {
            "benchmark": "audit",
            "data_set": options["name"] or images.name,
            "source": images.name,
            "foreign": others.name,
            "one_per": one_per,
            "fingerprint": classifier.fingerprint,
            "exemplars": None if planted is None else planted.count,
            "seed": seed,
        }
        with RecordFile.open(options["out"], identity | describe_run(), KEY, tuple(identity)) as file:
            found = measure_audit(
                planted, file, timed=timed, cleanlab=options["cleanlab"], seed=seed, progress=progress
            )
    keys = quoted(found)
    if as_json:
        click.echo(json.dumps(keys))
    else:
        for name, value in keys.items():
            click.echo(f"{name}: {'-' if value is None else f'{value:.4f}'}")


def _planted(
    records: list[ImageRecord], others: ImageSource, classifier: Classifier, *, seed: int, progress: Progress
) -> Planted:
    if any(record.label is None for record in records):
        raise InputError("expected labelled images, got some without a label")
    strange = drawn(others, classifier, count=max(1, round(max(SHARES) * len(records))), seed=seed)
    return plant(
        np.stack([record.image for record in records]),
        np.array([record.label for record in records], dtype=np.int64),
        np.stack([record.image for record in strange]),
        classifier,
        share=max(SHARES),
        seed=seed,
        progress=progress,
    )


def measure_audit(
    planted: Planted | None,
    record_file: RecordFile,
    *,
    timed: Engine | None = None,
    cleanlab: Path | None = None,
    seed: int = 0,
    shares: Sequence[float] = SHARES,
    progress: Progress = silent,
) -> list[Record]:
    """Append a record for every fault, share and draw that has none yet; all of them.

    Args:
        planted: Exemplars, copies and foreign images; None: only the time is measured.
        record_file: Opened with KEY.
        timed: Whose audit is timed instead of one of the planted exemplars.
        cleanlab: An interpreter that has it.
        seed: Of flipped labels.
        shares: Of the exemplars that have a fault.
        progress: Told of records done.
    """
    ways = {"duplicates": _duplicates, "leaks": _leaks, "foreign": _foreign}
    plan: list[tuple[str, float, int]] = [(fault, share, 0) for fault in ways for share in shares]
    plan = [each for each in plan if each[0] != "leaks" or 2 * each[1] <= max(SHARES)]  # there are no more copies
    plan += [("labels", share, draw) for share in shares for draw in range(DRAWS)]
    plan = [*(plan if planted is not None else []), ("time", 0.0, 0)]
    records = []
    for done, (fault, share, draw) in enumerate(plan, start=1):
        key = {"fault": fault, "share": share, "draw": draw}
        record = record_file.find(**key)
        if record is None:
            if planted is None or fault == "time":
                engine = planted.part(planted.clean) if timed is None and planted is not None else timed
                assert engine is not None  # one of both is given
                measured = _time(engine)
            elif fault == "labels":
                measured = _labels(planted, share, seed=seed + draw, cleanlab=cleanlab)
            else:
                measured = ways[fault](planted, share)
            record = key | measured
            record_file.append(record)
        records.append(record)
        progress("auditing", done, len(plan))
    return records


def quoted(records: Iterable[Record]) -> dict[str, float | None]:
    """The figures at a share of 5 %, means over draws; none where they were not measured."""
    found: dict[str, list[float]] = {}
    for record in records:
        if record["fault"] == "time":
            found |= {name: [value] for name, value in record.items() if name.startswith("audit_over_graph")}
        elif record["share"] == QUOTED:
            for name, value in record.items():
                if name.startswith(("ap", "auroc", "precision", "recall")) and not isinstance(value, list | dict):
                    found.setdefault(f"{record['fault']}_{name}", []).append(np.nan if value is None else value)
    return {name: None if np.isnan(values).any() else float(np.mean(values)) for name, values in found.items()}


def _duplicates(planted: Planted, share: float) -> Record:
    """Of pairs; what the audit did not compare counts as never found."""
    rows = planted.with_copies(share)
    engine, n = planted.part(rows), len(rows)
    origin = planted.copies.origin[rows[planted.count :] - planted.count]
    audit = engine.audit(kinds=["duplicates"])
    pairs, scores = audit.pairs, audit.scores[Kind.DUPLICATES]
    assert pairs is not None
    truth = dict(zip(range(planted.count, n), origin.tolist(), strict=True))
    right = np.array([truth.get(second) == first for first, second in zip(pairs.first, pairs.second, strict=True)])
    missing = len(origin) - int(right.sum())
    flagged = scores >= audit.rules[Kind.DUPLICATES].threshold
    changes = np.array([planted.copies.change[row - planted.count] for row in rows[planted.count :]])
    of = np.array([changes[second - planted.count] if second >= planted.count else "" for second in pairs.second])
    by_change = {
        name: average_precision(
            right[~right | (of == name)],
            pairs.statistic[~right | (of == name)],
            missing=int((changes == name).sum() - (right & (of == name)).sum()),
        )
        for name in CHANGES
        if (changes == name).any()
    }
    upper = np.triu_indices(n, 1)
    every = np.zeros((n, n), dtype=np.bool_)
    every[origin, np.arange(planted.count, n)] = True
    pixels = engine.store.images(np.arange(n)).astype(np.float32) / np.float32(255)
    by_hash = {
        name: average_precision(every[upper], (bits @ bits.T)[upper])
        for name, bits in ((name, hashed(pixels, name)) for name in HASHES)
    }
    features = normalised(engine.store.features(np.arange(n)))
    return (
        _counts(right, flagged, len(origin))
        | {
            "ap": average_precision(right, pairs.statistic, missing=missing),
            "ap_hash": max(by_hash.values()),
            "ap_cosine": average_precision(every[upper], (features @ features.T)[upper]),
            "ap_by_hash": by_hash,
            "ap_by_change": by_change,
            "not_compared": missing,
        }
    )  # fmt: skip


def _leaks(planted: Planted, share: float) -> Record:
    """One half of the exemplars against the other half, among which there are copies of the first."""
    half = planted.count // 2
    rows = planted.with_copies(2 * share)
    copies = rows[planted.count :]
    copies = copies[planted.copies.origin[copies - planted.count] < half]
    theirs = np.concatenate([np.arange(half, planted.count), copies])
    own, others = planted.part(np.arange(half)), planted.part(theirs)
    truth = np.arange(len(theirs)) >= planted.count - half
    known = own.copies_of(list(others.store.images(np.arange(len(theirs)))))
    found = own.audit(kinds=["leaks"], against=others).of("leaks")
    flagged = np.isin(others.store.ids, [evidence.id for finding in found for evidence in finding.evidence])
    scores = np.array([each.score for each in known])
    return _counts(truth, flagged, int(truth.sum())) | {
        "ap": average_precision(truth, scores),
        "auroc": auroc(truth, scores),
    }


def _labels(planted: Planted, share: float, *, seed: int, cleanlab: Path | None) -> Record:
    """Of single images; the rivals look at the model's probabilities alone."""
    rows, classes = planted.clean, planted.engine.classifier.num_classes
    given, wrong = flipped(planted.labels[rows], share=share, classes=classes, seed=seed)
    engine = planted.part(rows, given)
    audit = engine.audit(kinds=["labels"])
    scores = audit.scores[Kind.LABELS]
    flagged = scores >= audit.rules[Kind.LABELS].threshold
    model = softmax(logits_of(engine.store, engine.classifier), axis=1)
    own = 1 - model[rows, given]
    others = None if cleanlab is None else cleanlab_scores(cleanlab, given, model)
    suggested = {finding.id: finding.suggestion for finding in audit.of("labels")}
    names = engine.label_names
    right = [suggested.get(str(engine.store.ids[row])) == names[planted.labels[row]] for row in np.flatnonzero(wrong)]
    return _counts(wrong, flagged, int(wrong.sum())) | {
        "ap": average_precision(wrong, scores),
        "auroc": auroc(wrong, scores),
        "ap_cleanlab": None if others is None else average_precision(wrong, others),
        "auroc_cleanlab": None if others is None else auroc(wrong, others),
        "ap_softmax": average_precision(wrong, own),
        "auroc_softmax": auroc(wrong, own),
        "suggested_right": int(np.sum(right)),
        "accuracy": float((model.argmax(axis=1) == planted.labels[rows]).mean()),
    }


def _foreign(planted: Planted, share: float) -> Record:
    rows = planted.with_foreign(share)
    engine = planted.part(rows)
    foreign = rows >= planted.count
    audit = engine.audit(kinds=["foreign"])
    scores = audit.scores[Kind.FOREIGN]
    flagged = np.isin(engine.store.ids, [finding.id for finding in audit.of("foreign")])
    logits = logits_of(engine.store, engine.classifier)
    features = normalised(engine.store.features(np.arange(len(rows))))
    k = min(NEIGHBOUR, len(rows) - 1)
    similar, _ = faiss.knn(features, features, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
    ways = {
        "": scores,
        "_knn": -similar[:, -1],
        "_softmax": -softmax(logits, axis=1).max(axis=1),
        "_energy": energies(logits),
    }
    figures = {f"auroc{name}": auroc(foreign, each) for name, each in ways.items()}
    figures |= {f"ap{name}": average_precision(foreign, each) for name, each in ways.items()}
    return _counts(foreign, flagged, int(foreign.sum())) | figures


def _time(engine: Engine) -> Record:
    """Of everything, over that of one exact graph of the features, which is computed before it and after it.

    Nothing is taken from a cache. Other work on the machine slows both; the processor's own seconds stand beside.
    """
    snapshot = engine._snapshot
    uncached = Engine(replace(snapshot, path=None))
    features = normalised(snapshot.store.features(np.arange(len(snapshot.store)), column=FEATURE))

    def graph() -> None:
        faiss.knn(features, features, NEIGHBOURS + 1, metric=faiss.METRIC_INNER_PRODUCT)

    before, before_cpu = _seconds(graph)
    audit, audit_cpu = _seconds(uncached.audit)
    after, after_cpu = _seconds(graph)
    one, one_cpu = (before + after) / 2, (before_cpu + after_cpu) / 2
    return {
        "exemplars": len(features),
        "columns": dict(snapshot.store.feature_columns),
        "graph_s": one,
        "audit_s": audit,
        "audit_over_graph": audit / one,
        "graph_cpu_s": one_cpu,
        "audit_cpu_s": audit_cpu,
        "audit_over_graph_cpu": audit_cpu / one_cpu,
    }


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of the processor in all threads."""
    began, began_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - began_cpu


def _counts(truth: Bool[np.ndarray, "n"], flagged: Bool[np.ndarray, "n"], planted: int) -> Record:
    """What is found by the audit's own threshold."""
    found, right = int(flagged.sum()), int((truth & flagged).sum())
    precision = wilson_interval(right, found) if found else None
    return {
        "planted": planted,
        "found": found,
        "right": right,
        "precision": None if precision is None else precision.estimate,
        "precision_interval": None if precision is None else [precision.low, precision.high],
        "recall": right / planted,
    }


def section(run: Run, _: Sheet) -> list[str]:
    """A table for each fault: a row for each share, means over draws."""
    titles = {"duplicates": "Copies", "leaks": "Leaks", "labels": "Flipped labels", "foreign": "Foreign images"}
    blocks = []
    for (fault,), records in grouped(run.records, "fault").items():
        if fault not in titles:
            continue
        rows = []
        for (share,), cell in grouped(records, "share").items():
            figures = [name for name in cell[0] if name.startswith(("ap", "auroc")) and "_by_" not in name]
            found, right = (sum(record[name] for record in cell) for name in ("found", "right"))
            rows.append(
                {"share": f"{share:.0%}"}
                | {_title(name): _mean(cell, name) for name in figures}
                | {
                    "precision at the threshold": str(wilson_interval(right, found)) if found else NONE,
                    "recall": f"{np.mean([record['recall'] for record in cell]):.2f}",
                }
            )
        blocks += [f"**{titles[fault]}**", table(rows)]
    return blocks


def _title(name: str) -> str:
    measure, _, rival = name.partition("_")
    return {"ap": "AP", "auroc": "AUROC"}[measure] + (f", {rival}" if rival else "")


def _mean(records: list[Record], name: str) -> str:
    values = [record[name] for record in records]
    return NONE if None in values else f"{np.mean(values):.4f}"


FIELDS = ("fault", "share", "draw")
BENCHMARK = Benchmark(command, Reported("Audit", KEY, FIELDS, section))
