"""How thoroughly an approximate index has to be searched: measured on the index itself.

A sample of its exemplars is searched for, as they are and changed as light, cameras and croppings change images
(`index.descriptors.calibration`), exactly and approximately. Of what finds as much of the exact answer as was asked
for, the fastest is taken; that may be exact search.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tmm_engine.index.descriptors.calibration import CHANGES
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.factories import EXACT, Effort, check_trainable
from tmm_engine.index.neighbours.tuned import Tuned
from tmm_engine.index.progress import Progress
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.nearest import Compared, Nearest, NearestSearch
from tmm_engine.query import Query
from tmm_engine.rerank.timing import Timings

RECALL = 0.98
SAMPLE = 100
TIMED = 30  # searches, one by one
SEED = 0
PER_CLUSTER = 39  # exemplars that FAISS wants to train one on
EF_SEARCH = (32, 64, 128, 256, 512)
NPROBE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MARGIN = 1e-9  # two similarities that are less apart tie: one is as good as the other


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What is searched for: exemplars as they are, and changed."""

    clean: Compared
    noisy: Compared


def sample_queries(store: ExemplarStore, count: int) -> tuple[list[Query], list[Query]]:
    """Random exemplars as queries, and the same changed, each in one way, all ways in turn."""
    rows = np.sort(np.random.default_rng(SEED).choice(len(store), min(count, len(store)), replace=False))
    pixels = torch.from_numpy(store.images(rows).astype(np.float32) / 255.0)
    generator, ways = torch.Generator().manual_seed(SEED), list(CHANGES.values())
    changed = [ways[place % len(ways)](own[None], generator)[0] for place, own in enumerate(pixels)]
    names = [str(store.ids[row]) for row in rows]
    return (
        [Query(name, own.numpy()) for name, own in zip(names, pixels, strict=True)],
        [Query(name, own.numpy()) for name, own in zip(names, changed, strict=True)],
    )


def usual_factories(exemplars: int) -> tuple[str, ...]:
    """What is tried unless something is named: clusters, of which FAISS can train each, in bytes and whole; a graph."""
    lists = 1 << max(0, int(4 * exemplars**0.5).bit_length() - 1)
    while lists * PER_CLUSTER > exemplars and lists > 1:
        lists //= 2
    clusters = (f"IVF{lists},SQ8", f"IVF{lists},Flat") if lists >= 4 else ()
    return (*clusters, "HNSW32")


def efforts(factory: str) -> Iterator[Effort]:
    """From little to thorough."""
    if factory.startswith("IVF"):
        lists = int(factory[3:].split(",", maxsplit=1)[0])
        yield from (Effort(nprobe=nprobe) for nprobe in NPROBE if nprobe <= lists)
    elif factory.startswith("HNSW"):
        yield from (Effort(ef_search=kept) for kept in EF_SEARCH)
    else:
        yield from (Effort(rerank=rerank) for rerank in (4, 16))


class Tuner:
    """Measures one store's searches.

    Args:
        exact: Exact search of the exemplars.
        sample: What is searched for.
        mode: Whose answers are compared; said only.
        k: Of how many neighbours.
        progress: Told of what has been tried.
        timed: Searches by which each is timed, one by one.
    """

    def __init__(
        self,
        exact: NearestSearch,
        sample: Sample,
        *,
        mode: str,
        k: int,
        progress: Progress,
        timed: int = TIMED,
    ) -> None:
        self._exact, self._sample, self._mode, self._k, self._progress = exact, sample, mode, k, progress
        self._timed = timed
        self._clean, self._noisy = (self._answers(self._exact, own) for own in (sample.clean, sample.noisy))

    def best(self, factories: Sequence[str], *, recall: float) -> tuple[Tuned, NearestSearch]:
        """The fastest that finds enough, and its search.

        Args:
            factories: FAISS factory strings to try.
            recall: Share of the exact answer that is to be found, clean and changed.

        Raises:
            InputError: a factory string that FAISS does not know, or cannot train with so few exemplars.
        """
        for factory in factories:
            check_trainable(factory, self._exact.exemplars)
        best = self.tuned(EXACT, Effort(), (1.0, 1.0), self._exact, recall), self._exact
        for number, factory in enumerate(factories):
            self._progress("trying factories", number, len(factories))
            try:
                measured, search = self.tried(factory, recall=recall)
            except BaseException:
                best[1].drop()
                raise
            enough = min(measured.recall_clean, measured.recall_noise) >= recall
            if enough and measured.milliseconds < best[0].milliseconds:
                best, (_, search) = (measured, search), best
            if search is not self._exact:
                search.drop()
        self._progress("trying factories", len(factories), len(factories))
        return best

    def tried(self, factory: str, *, recall: float) -> tuple[Tuned, NearestSearch]:
        """With the least effort that finds enough, or else with the most.

        Raises:
            InputError: as `best`.
        """
        check_trainable(factory, self._exact.exemplars)
        search = self._exact.by(factory)
        try:
            for effort in efforts(factory):
                search = search.with_effort(effort)
                if min(found := self.recalls(search)) >= recall:
                    break
            return self.tuned(factory, effort, found, search, recall), search
        except BaseException:
            search.drop()
            raise

    def recalls(self, search: NearestSearch) -> tuple[float, float]:
        """(of exemplars as they are, of changed ones): the share of the exact answer that is found."""
        pairs = ((self._clean, self._sample.clean), (self._noisy, self._sample.noisy))
        clean, noisy = (_recall(exact, self._answers(search, asked)) for exact, asked in pairs)
        return clean, noisy

    def tuned(
        self, factory: str, effort: Effort, recalls: tuple[float, float], search: NearestSearch, wanted: float
    ) -> Tuned:
        """With the times of single searches, exact and approximate in turn."""
        asked = self._sample.noisy
        times: tuple[list[float], list[float]] = ([], [])
        for place in range(min(self._timed, len(asked.features))):
            for searched, spent in zip((search, self._exact), times, strict=True):
                start = time.perf_counter()
                self._answers(searched, asked.only(place))
                spent.append(1e3 * (time.perf_counter() - start))
        own, exact = (statistics.median(spent) for spent in times)
        return Tuned(
            factory=factory,
            ef_search=effort.ef_search,
            nprobe=effort.nprobe,
            rerank=effort.rerank,
            wanted=wanted,
            mode=self._mode,
            k=self._k,
            queries=len(asked.features),
            exemplars=self._exact.exemplars,
            recall_clean=math.floor(1e4 * recalls[0]) / 1e4,  # down, so that what falls short is never said to do
            recall_noise=math.floor(1e4 * recalls[1]) / 1e4,
            milliseconds=round(own, 3),
            exact_milliseconds=round(exact, 3),
        )

    def _answers(self, search: NearestSearch, compared: Compared) -> list[Nearest]:
        """By score alone: what the recogniser puts first is found in another column."""
        if compared.gate is not None:
            compared = replace(compared, gate=replace(compared.gate, puts_first=False))
        return search.search(compared, k=self._k, timings=Timings(len(compared.features)))


def _recall(exact: Sequence[Nearest], found: Sequence[Nearest]) -> float:
    """Share of the exact answers: what scores at least as their last does is as good."""
    shares = []
    for one, other in zip(exact, found, strict=True):
        good = int((other.scores >= one.scores.min() - MARGIN).sum())
        shares.append(min(1.0, good / len(one.scores)))
    return float(np.mean(shares))


def check_wanted(*, recall: float, k: int, sample: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        InputError: a recall outside (0, 1], or k or a sample below 1.
    """
    if not 0 < recall <= 1:
        raise InputError(f"recall: expected a share above 0 and up to 1, got {recall!r}")
    for name, value in (("k", k), ("sample", sample)):
        if value < 1:
            raise InputError(f"{name}: expected a whole number of at least 1, got {value!r}")
