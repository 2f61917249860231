"""What the reliability bench does to an index, in processes of its own that may die: changes, damage, hostile input."""

import gc
import os
import random
import resource
import shutil
import time
import warnings
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tmm_engine.engine import Engine
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.errors import TmmEngineError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import exact_scores
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.changes import add_exemplars, compact, delete_exemplars
from tmm_engine.options import SearchOptions
from tmm_engine.rerank.settings import QueryTrigger, TmmConfig, TunedHead

# It is imported, but not used, before the process forks; its threads begin with its use.
warnings.filterwarnings("ignore", message="lance is not fork-safe")

SHAPE = (3, 8, 8)
CLASSES = 4
POOL = 512  # images that exemplars are drawn from
START = 24  # exemplars of a new index
QUICK = TmmConfig(trigger=QueryTrigger(steps=5), head=TunedHead(min_steps=10))
EVERY_MODE = (SearchOptions(config=QUICK), SearchOptions(mode="l2"), SearchOptions(mode="cosine"))

Content = dict[str, int]
"""Id of an exemplar -> its image's number in the pool."""


def pool() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (POOL, 3, 8, 8) and labels."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (POOL, *SHAPE), dtype=np.uint8), generator.integers(0, CLASSES, POOL)


def small_network() -> nn.Module:
    """Convolution, 12 features, 4 classes; seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 12), nn.ReLU(),
            nn.Linear(12, CLASSES),
        )  # fmt: skip


def small_classifier() -> Classifier:
    """Of `small_network`."""
    return Classifier.from_module(small_network(), image_shape=SHAPE)


def source_of(content: Content) -> ArraySource:
    """These exemplars; their number is metadata too."""
    images, labels = pool()
    numbers = list(content.values())
    return ArraySource(images[numbers], labels[numbers], ids=list(content), metadata={"number": numbers}, name="pool")


def open_small(index: Path, **options: Any) -> Engine:
    """An engine over an index of `small_classifier`."""
    return Engine.open(index, model=small_network(), device="cpu", **options)


class Plan:
    """A seeded sequence of changes: what each does, and what it leaves."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def first(self) -> Content:
        """What the index is built with."""
        return {f"id {number}": number for number in range(START)}

    def next(self, now: Content) -> tuple[str, Content]:
        """The next change, and the content after it."""
        kind = self._random.choice(("add", "add", "delete", "compact", "build"))
        if kind == "add":
            ids = self._random.sample(range(60), 6)
            return kind, now | {f"id {id_}": self._random.randrange(POOL) for id_ in ids}
        if kind == "delete":
            gone = set(self._random.sample(sorted(now), min(5, len(now) - 1)))
            return kind, {id_: number for id_, number in now.items() if id_ not in gone}
        if kind == "build":
            return kind, {f"id {number}": self._random.randrange(POOL) for number in range(START)}
        return kind, now


def carry_out(index: Path, kind: str, now: Content, after: Content, classifier: Classifier) -> None:
    """One change of a plan."""
    if kind == "add":
        changed = {id_: number for id_, number in after.items() if now.get(id_) != number}
        if changed:
            add_exemplars(index, source_of(changed), classifier, replace_same=True)
    elif kind == "delete":
        delete_exemplars(index, ids=sorted(now.keys() - after.keys()))
    elif kind == "compact":
        compact(index)
    else:
        write_index(source_of(after), index, classifier, overwrite=True)


def change_until_killed(index: Path, seed: int, done: Connection) -> None:
    """Carry out a plan, saying after each change how many are done."""
    torch.set_num_threads(1)
    plan, classifier = Plan(seed), small_classifier()
    now = plan.first()
    for step in range(1, 10**6):
        kind, after = plan.next(now)
        if step == 1:
            done.send(0)
        carry_out(index, kind, now, after, classifier)
        now = after
        done.send(step)


def content_of(engine: Engine) -> Content:
    """What an opened index holds, from its images: not from what it says of itself."""
    rows = np.arange(len(engine))
    known = {image.tobytes(): number for number, image in enumerate(pool()[0])}
    images = engine.store.images(rows)
    return {str(id_): known.get(image.tobytes(), -1) for id_, image in zip(engine.store.ids, images, strict=True)}


def answers_right(engine: Engine, content: Content) -> bool:
    """Whether what is stored and what is answered are those of the content, computed here from its images."""
    if content_of(engine) != content:
        return False
    images, labels = pool()
    numbers = np.array(list(content.values()))
    with torch.inference_mode():
        features = engine.classifier.features(torch.from_numpy(images[numbers]).float() / 255.0).numpy()
    ids = np.array(list(content), dtype=object)
    order = {id_: row for row, id_ in enumerate(ids)}
    stored = engine.store.features(np.arange(len(engine)), column=FEATURE)
    rows = [order[str(id_)] for id_ in engine.store.ids]
    if not np.allclose(stored, features[rows], rtol=1e-3, atol=1e-5):
        return False
    if not (engine.store.labels == labels[numbers][rows]).all():
        return False
    for metric in Metric:
        result = engine.search(images[POOL - 1], k=5, mode=str(metric))
        with torch.inference_mode():
            query = engine.classifier.features(torch.from_numpy(images[POOL - 1 :]).float() / 255.0).numpy()[0]
        expected = exact_scores(query, features, metric)
        found = [hit.score for hit in result.hits]
        if not np.allclose(found, np.sort(expected)[::-1][: len(found)], rtol=1e-3, atol=1e-4):
            return False
    return True


def outcome_of(index: Path, content: Content, expected: list[list[str]], *, verify: bool) -> str:
    """``right``, ``error`` or ``wrong``: what opening an index and searching in it come to."""
    torch.set_num_threads(1)
    try:
        with open_small(index, verify=verify) as engine:
            return "right" if answers_right(engine, content) and ranked(engine) == expected else "wrong"
    except TmmEngineError:
        return "error"


def ranked(engine: Engine) -> list[list[str]]:
    """Ids of the best in every mode, and with the index's approximate neighbours."""
    query = pool()[0][POOL - 1]
    return [[hit.id for hit in engine.search(query, replace(each, k=8)).hits] for each in EVERY_MODE]


def fill_disk(index: Path, limit: int, seed: int) -> str:
    """One change where no file may grow beyond a size: ``error``, or ``done``."""
    torch.set_num_threads(1)
    plan, classifier = Plan(seed), small_classifier()
    kind, after = plan.next(plan.first())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        carry_out(index, kind, plan.first(), after, classifier)
    except TmmEngineError:
        return "error"
    return "done"


def change_on_small_disk(index: Path, seed: int) -> str:
    """Changes until the disk is full: ``error`` as it should be, or ``done`` where it never was."""
    torch.set_num_threads(1)
    classifier, now = small_classifier(), Plan(seed).first()
    try:
        for step in range(200):
            after = now | {f"more {step} {n}": (step + n) % POOL for n in range(100)}
            carry_out(index, "add", now, after, classifier)
            now = after
    except TmmEngineError:
        with open_small(index) as engine:
            return "error" if content_of(engine) == now else "wrong"
    return "done"


def endure(index: Path, searches: int) -> dict[str, float]:
    """Memory, files and threads over many searches in one process, after a warm-up."""
    torch.set_num_threads(1)
    images = pool()[0]
    with open_small(index) as engine:

        def search(number: int) -> None:
            where = "number >= 8" if number % 5 == 0 else None
            engine.search(images[number % POOL], replace(EVERY_MODE[number % 3], where=where))

        for number in range(60):
            search(number)
        gc.collect()
        before = _resources()
        start = time.perf_counter()
        for number in range(searches):
            search(number)
        gc.collect()
        after = _resources()
    grown = {name: after[name] - before[name] for name in before}
    return {"searches": searches, "seconds": round(time.perf_counter() - start, 1), **grown}


def _resources() -> dict[str, float]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "mib": round(int(status["VmRSS"].split()[0]) / 1024, 2),
        "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": int(status["Threads"]),
    }


def where_overhead(folder: Path, rows: int) -> dict[str, float]:
    """Seconds of a TMM search over `rows` exemplars that a filter leaves of twice as many, and of an index of them."""
    torch.set_num_threads(1)
    classifier = Classifier.from_architecture(
        "resnet18", image_shape=(3, 32, 32), seed=0, num_classes=CLASSES, small_stem=False
    )
    images = np.random.default_rng(0).integers(0, 256, (2 * rows, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(2 * rows) % CLASSES
    timings: dict[str, list[float]] = {"filtered": [], "alone": []}
    metadata = {"half": [number % 2 for number in range(2 * rows)]}
    both = ArraySource(images, labels, metadata=metadata)
    write_index(both, folder / "both", classifier)
    write_index(ArraySource(images[::2], labels[::2]), folder / "alone", classifier)
    for turn in range(3):
        for name in ("filtered", "alone"):
            with Engine.open(folder / ("both" if name == "filtered" else "alone"), device="cpu") as engine:
                engine.search(images[1], mode="l2")  # what both have to do once
                start = time.perf_counter()
                engine.search(images[turn], config=QUICK, where="half = 0" if name == "filtered" else None)
                timings[name].append(time.perf_counter() - start)
    shutil.rmtree(folder)
    filtered, alone = float(np.median(timings["filtered"])), float(np.median(timings["alone"]))
    return {"rows": rows, "filtered_s": round(filtered, 3), "alone_s": round(alone, 3), "ratio": filtered / alone}
