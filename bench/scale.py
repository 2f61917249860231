"""One index of drawn exemplars, searched in every way beside FAISS called directly."""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32

from tmm_engine.bench.drawn import network, opened_alone
from tmm_engine.bench.noise import parse
from tmm_engine.bench.records import RecordFile
from tmm_engine.engine import Engine
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.neighbours.approximate import built
from tmm_engine.index.neighbours.factories import EXACT, Effort
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.tuned import Tuned
from tmm_engine.index.neighbours.vectors import scanned, taken
from tmm_engine.index.progress import silent
from tmm_engine.index.sizes import parse_size
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.index.store.manifest import Manifest
from tmm_engine.nearest import NearestSearch
from tmm_engine.opening import Opening
from tmm_engine.options import SearchOptions
from tmm_engine.query import Query
from tmm_engine.rerank.settings import preset
from tmm_engine.rerank.timing import Timings
from tmm_engine.snapshot import Snapshot
from tmm_engine.tuning import TIMED, Sample, Tuner, usual_factories

K, BATCH, CANDIDATES, QUERIES, LISTS, RECALL = 10, 256, 1000, 64, 3, 0.98
REDUCED_UP_TO = 100_000  # exemplars: further caches on disk for each column
EXACT_UP_TO = 2_000_000  # exemplars: beyond, exact search would read tens of GB for every query
LARGE_MEMORY = "14GiB"  # bound for so many
CLIENTS, EACH = (1, 2, 4, 8), 20  # searches of each client
NOISE = ("gaussian 0.5", "gaussian 1", "brightness 0.5", "contrast 0.4", "dark-noise 1")
"""Families of the robustness benchmark that mean something for pictures that are features: no pixel has neighbours."""
LITERAL = "trigger=fixed-patch", "tuning=discriminant"


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One index, and where what is measured of it goes."""

    records: RecordFile
    path: Path
    n: int
    dimension: int
    repeats: int

    def note(self, path: str, **found: Any) -> None:
        """A record."""
        self.records.append({"exemplars": self.n, "dimension": self.dimension, "path": path, **found})

    def done(self, path: str) -> bool:
        """Whether there is a record of a path."""
        return self.records.done(exemplars=self.n, dimension=self.dimension, path=path)

    def once(self, path: str, work: Callable[[], Any]) -> None:
        """Seconds of what is done once."""
        start = time.perf_counter()
        work()
        if not self.done(path):
            self.note(path, seconds=[time.perf_counter() - start])

    def opened(self, memory: str) -> None:
        """Opening, the first search, and memory, in processes of their own: as it is, and under the bound."""
        for bound in (None, memory):
            path = "opened" if bound is None else f"opened, memory={bound}"
            if not self.done(path):
                opened_alone(self.path, self.dimension, bound)  # what can be kept is written
                found = opened_alone(self.path, self.dimension, bound)
                self.note(path, seconds=[found["open_s"]], **found, disk_bytes=self._disk_bytes())

    def _disk_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def searched(self) -> None:
        """Exact paths in turn, beside FAISS's flat index; then clients at once."""
        if self.done("two clients"):
            return
        with self._engine("fp32") as engine:
            clean, _ = queries_of(engine.store)
            flat, features = _faiss(engine.store, "Flat")
            self._noted(in_turn(_paths(engine, flat, features, clean), repeats=self.repeats))
            lists = [clean[place % len(clean)] for place in range(BATCH)]
            batches = {
                f"faiss flat, {BATCH}": lambda _: flat.search(features, K),
                f"default, {BATCH}": lambda _: engine.search([*lists], k=K),
            }
            self._noted(in_turn(batches, repeats=LISTS))
            del flat
            alone, both = [], []
            for _ in range(LISTS):
                alone.append(concurrent(engine, clean, 1))
                both.append(concurrent(engine, clean, 2))
            for clients in CLIENTS[2:]:
                self.note(f"{clients} clients", seconds=[concurrent(engine, clean, clients)])
            self.note("one client", seconds=alone)
            self.note("two clients", seconds=both)

    def reduced(self) -> None:
        """The default in fewer bits, beside fp32."""
        for precision in ("fp16", "int8"):
            if not self.done(f"default, {precision}"):
                self._reduced(precision)

    def _reduced(self, precision: str) -> None:
        with self._engine("fp32") as exact, self._engine(precision) as engine:
            clean, _ = queries_of(engine.store)
            paths = {"exact": _searching(exact, clean), "reduced": _searching(engine, clean)}
            timed = in_turn(paths, repeats=self.repeats)
            pairs = zip(exact.search([*clean], k=K), engine.search([*clean], k=K), strict=True)
            shares = [len({hit.id for hit in one.hits} & {hit.id for hit in own.hits}) / K for one, own in pairs]
        self.note(
            f"default, {precision}",
            seconds=timed["reduced"],
            exact_seconds=timed["exact"],
            recall_clean=statistics.mean(shares),
        )

    def approximate(self, factories: Sequence[str]) -> None:
        """Each factory tuned on clean and noisy exemplars, beside FAISS called directly; the fastest is kept."""
        if self.done("1,000 candidates"):
            return
        snapshot, tuner = self._tuner()
        tried = []
        for factory in factories or usual_factories(self.n):
            start = time.perf_counter()
            tuned, search = tuner.tried(factory, recall=RECALL)
            taken = time.perf_counter() - start
            if not self.done(f"approximate, {factory}"):
                self.note(
                    f"approximate, {factory}",
                    seconds=[tuned.milliseconds / 1e3],
                    exact_seconds=[tuned.exact_milliseconds / 1e3],
                    faiss_seconds=self._faiss_alone(snapshot.store, factory, tuned.effort),
                    tuning_seconds=taken,
                    tuned=tuned.to_json(),
                )
            enough = min(tuned.recall_clean, tuned.recall_noise) >= RECALL
            tried.append((not enough, tuned.milliseconds, tuned, search))
        _, _, best, search = min(tried, key=lambda one: one[:2])
        self._keep(snapshot, search, best)
        del snapshot, tuner, tried, search
        self._candidates()

    def large(self, factories: Sequence[str]) -> None:
        """Approximate search alone, by the first factory, where exact search would read tens of GB for every query.

        Its recall is that among exact answers to the whole list of queries, for which the features are read once.
        """
        factory = [*factories, *usual_factories(self.n)][0]
        if not self.done("tuned"):
            snapshot, tuner = self._tuner(memory=parse_size(LARGE_MEMORY), timed=1)
            start = time.perf_counter()
            tuned, search = tuner.tried(factory, recall=RECALL)
            self._keep(snapshot, search, tuned)
            self.note("tuned", seconds=[time.perf_counter() - start], tuned=tuned.to_json())
            del snapshot, tuner, search
        if not self.done("opened, approximate"):
            found = opened_alone(self.path, self.dimension, LARGE_MEMORY)
            self.note("opened, approximate", seconds=[found["open_s"]], **found, disk_bytes=self._disk_bytes())
        if self.done("default, approximate"):
            return
        with self._engine(None, memory=LARGE_MEMORY) as engine:
            clean, _ = queries_of(engine.store)
            self._noted(in_turn({"default, approximate": _searching(engine, clean)}, repeats=self.repeats))

    def _tuner(self, *, memory: int | None = None, timed: int = TIMED) -> tuple[Snapshot, Tuner]:
        """Over the queries, as they are and noisy."""
        snapshot = Snapshot.open(self.path, Opening(model=network(self.dimension), device="cpu", memory=memory))
        compared = [
            snapshot.searcher.compared(own, SearchOptions(k=K), Timings(len(own))) for own in queries_of(snapshot.store)
        ]
        exact = snapshot.searcher.nearest.by(EXACT)
        return snapshot, Tuner(exact, Sample(*compared), mode="robust", k=K, progress=silent, timed=timed)

    def _keep(self, snapshot: Snapshot, search: NearestSearch, tuned: Tuned) -> None:
        """The index is searched so from now on."""
        search.keep(snapshot.cache)
        replace(Manifest.read(self.path), neighbours=tuned.factory, tuned=tuned).write(self.path)

    def _candidates(self) -> None:
        """TMM-NN over candidates of the approximate search, beside the default, exact and approximate."""
        literal = preset("paper").with_settings(LITERAL)
        with self._engine("fp32") as exact, self._engine(None) as engine:
            clean, _ = queries_of(engine.store)

            def candidates(number: int) -> None:
                query = clean[number % QUERIES]
                engine.search(query, k=K, mode="tmm", candidates=CANDIDATES, prefilter="robust", config=literal)

            paths = {
                "default beside candidates": _searching(exact, clean),
                "default, approximate": _searching(engine, clean),
                "1,000 candidates": candidates,
            }
            self._noted(in_turn(paths, repeats=self.repeats))

    def _faiss_alone(self, store: ExemplarStore, factory: str, effort: Effort) -> list[float]:
        """Seconds of single searches by FAISS called directly, over φ of unit length."""
        index, features = _faiss(store, factory)
        if (clusters := faiss.try_extract_index_ivf(index)) is not None:
            clusters.nprobe = effort.nprobe or 1
        elif isinstance(index, faiss.IndexHNSW):
            index.hnsw.efSearch = effort.ef_search or K
        return in_turn({"faiss": partial(_found, index, features)}, repeats=self.repeats)["faiss"]

    def _engine(self, precision: str | None, *, memory: str | None = None) -> Engine:
        return Engine.open(
            self.path, model=network(self.dimension), device="cpu", search_precision=precision, memory=memory
        )

    def _noted(self, timed: dict[str, list[float]]) -> None:
        for path, seconds in timed.items():
            if not self.done(path):
                self.note(path, seconds=seconds)


def _faiss(store: ExemplarStore, factory: str) -> tuple[faiss.Index, Float32[np.ndarray, "q d"]]:
    """FAISS's own index of φ for cosine, and a batch of its vectors."""
    index: faiss.Index
    if factory == EXACT:
        index = faiss.IndexFlatIP(store.feature_columns[FEATURE])
        for part in scanned(store, FEATURE, Metric.COSINE):
            index.add(part)
    else:
        index = built(store, Metric.COSINE, column=FEATURE, factory=factory)
    return index, taken(store, np.arange(BATCH), FEATURE, Metric.COSINE)


def _paths(
    engine: Engine, flat: faiss.Index, features: Float32[np.ndarray, "q d"], queries: list[Query]
) -> dict[str, Callable[[int], Any]]:
    """Single searches, each of a query that is given by its number."""
    return {
        "faiss flat": partial(_found, flat, features),
        "default": _searching(engine, queries),
        "cosine": lambda number: engine.search(queries[number % QUERIES], k=K, mode="cosine"),
    }


def _searching(engine: Engine, queries: list[Query]) -> Callable[[int], Any]:
    """Single searches by the default."""
    return lambda number: engine.search(queries[number % QUERIES], k=K)


def _found(index: faiss.Index, features: Float32[np.ndarray, "q d"], number: int) -> Any:
    """A single search by FAISS."""
    return index.search(features[number % QUERIES][None], K)


def queries_of(store: ExemplarStore) -> tuple[list[Query], list[Query]]:
    """Random exemplars, and each under one of `NOISE`."""
    rows = np.sort(np.random.default_rng(0).choice(len(store), QUERIES, replace=False))
    images = store.images(rows).astype(np.float32) / np.float32(255.0)
    ways = [parse(text) for text in NOISE]
    noisy = [ways[place % len(ways)].apply(image, seed=place) for place, image in enumerate(images)]
    names = [str(store.ids[row]) for row in rows]
    return (
        [Query(name, image) for name, image in zip(names, images, strict=True)],
        [Query(name, image) for name, image in zip(names, noisy, strict=True)],
    )


def in_turn(paths: dict[str, Callable[[int], Any]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of each path, all in turn, so that a slow moment meets all; the first round does not count."""
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    for number in range(repeats + 1):
        for path, work in paths.items():
            start = time.perf_counter()
            work(number)
            seconds[path].append(time.perf_counter() - start)
    return {path: own[1:] for path, own in seconds.items()}


def concurrent(engine: Engine, queries: list[Query], clients: int) -> float:
    """Seconds until every client, all at once, has made its searches."""
    work = [
        threading.Thread(target=lambda: [engine.search(query, k=K) for query in queries[:EACH]]) for _ in range(clients)
    ]
    start = time.perf_counter()
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    return time.perf_counter() - start
