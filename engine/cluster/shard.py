"""A worker of searches: some exemplars of one version of an index, opened, and what is asked of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn

from tmm_engine.backends import Backend
from tmm_engine.cluster.board import reporter
from tmm_engine.cluster.crew import Presence
from tmm_engine.cluster.worker import check_seen, own_device, presence
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.neighbours.factories import Effort
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import Found
from tmm_engine.index.store.exemplars import ExemplarStore, Subset
from tmm_engine.index.types import Rows
from tmm_engine.nearest import NearestSearch
from tmm_engine.opening import Opening, Parts, open_parts
from tmm_engine.rerank.backbone import Precision
from tmm_engine.rerank.columns import GLOBAL_FEATURE
from tmm_engine.rerank.discriminant import Discriminant, Moments
from tmm_engine.rerank.score import DiscriminantScorer, FusedScorer, HeadScorer, Scorer
from tmm_engine.rerank.settings import TmmConfig
from tmm_engine.rerank.tmm import TmmNN
from tmm_engine.rerank.trigger import FoundTrigger


@dataclass(frozen=True, slots=True, eq=False)
class ShardSetup:
    """What a worker needs to know of its exemplars.

    Attributes:
        path: The index, on a path that all machines share.
        version: That was opened.
        content: Of that version (`Manifest.content`).
        network: The user's own code, where it is that.
        start: Its first row.
        stop: The row after its last.
        cache_bytes: What may stay in memory between searches.
        precision: Of the pass over exemplars.
        backend: Of it, too.
        factory: FAISS factory string.
        effort: How thoroughly an approximate index is searched.
        cpus: Of the worker.
        board: Told of exemplars passed.
    """

    path: Path
    version: int
    content: str
    network: nn.Module | None
    start: int
    stop: int
    cache_bytes: int
    precision: Precision
    backend: Backend
    factory: str
    effort: Effort
    cpus: int
    board: Any


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """How exemplars pass the network.

    Attributes:
        config: The reading of TMM-NN.
        triggers: Of the queries, on the CPU.
        exact: Whether in the classifier's own precision, whatever that of searches is.
    """

    config: TmmConfig
    triggers: Sequence[FoundTrigger]
    exact: bool

    def on(self, device: torch.device) -> list[FoundTrigger]:
        """The triggers there."""
        return [replace(found, trigger=found.trigger.to(device)) for found in self.triggers]


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """A scorer on its way to a shard: without what belongs to exemplars elsewhere.

    Attributes:
        scorer: Gives scores and confidences.
        fused: For a fusion its weight, the query's clean features, and the column of the exemplars'.
    """

    scorer: Scorer
    fused: tuple[float, torch.Tensor, str] | None = None


class Shard:
    """An actor of Ray's: rows are counted from its first. What it raises is raised where its answer is taken."""

    def __init__(self) -> None:
        self._ready: tuple[ShardSetup, Parts, ExemplarStore] | None = None
        self._whole: NearestSearch | None = None
        self._last: tuple[bytes | None, NearestSearch, TmmNN] | None = None

    def prepare(self, setup: ShardSetup) -> Presence:
        """Open the version of the index that was asked for, even if there is a newer one by now.

        Raises:
            IndexStateError: this machine does not see the index, or it is damaged, or was replaced by another.
            ModelError: it makes another classifier of it.
        """
        check_seen(setup.path)
        opening = Opening(
            model=setup.network,
            device=own_device(setup.cpus),
            cache_bytes=setup.cache_bytes,
            precision=setup.precision,
            backend=setup.backend,
            version=setup.version,
        )
        parts = open_parts(setup.path, opening)
        if parts.manifest.content != setup.content:
            raise IndexStateError(f"{setup.path}: was replaced by another while workers opened it; open it again")
        self._ready = setup, parts, Subset(parts.store, np.arange(setup.start, setup.stop))
        self._whole = self._last = None
        return presence()

    def process(self) -> int:
        """The number of this worker's process on its machine."""
        return os.getpid()

    def neighbours(
        self,
        rows: Rows | None,
        metric: Metric,
        column: str,
        queries: Float32[np.ndarray, "q d"],
        wanted: tuple[int, int],
    ) -> list[Found]:
        """The nearest of these rows (None: all) for each query, by their place among them; k and `reach` are wanted."""
        k, reach = wanted
        nearest, _ = self._over(rows)
        return nearest.neighbours(queries.copy(), metric, column=column, k=k, reach=reach)  # Ray's are read-only

    def features(self, part: int, rows: Rows | None, chosen: Rows | None, how: Pass) -> list[np.ndarray]:
        """φ(x_i^t) of those chosen among the rows (None: all), by their places, for each trigger."""
        _, tmm = self._over(rows)
        with torch.inference_mode():
            exemplars = tmm.exemplars(how.config, exact=how.exact)
            found = exemplars.features(how.on(self._device), chosen, self._progress(part))
        return [features.cpu().numpy() for features in found]

    def scores(self, part: int, rows: Rows | None, how: Pass, scorers: Sequence[Sent]) -> list[tuple[np.ndarray, ...]]:
        """Scores, confidences and matches of the rows, for each trigger and its scorer."""
        _, tmm = self._over(rows)
        with torch.inference_mode():
            own = [self._arrived(sent, tmm) for sent in scorers]
            exemplars = tmm.exemplars(how.config, exact=how.exact)
            found = exemplars.scores(how.on(self._device), own, self._progress(part))
        return [tuple(values.cpu().numpy() for values in scores) for scores in found]

    def moments(self, rows: Rows | None, origin: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Count, sum and products of the rows' features under the global trigger, about a point."""
        tmm = self._over(rows)[1]
        counted = Moments(torch.from_numpy(origin.copy()).to(self._device))
        for chunk in tmm.tensors.feature_chunks(counted.origin.dtype, column=GLOBAL_FEATURE):
            counted.add(chunk)
        return counted.count, counted.total.cpu().numpy(), counted.products.cpu().numpy()

    def lengths(self, rows: Rows | None, fitted: Discriminant, dtype: torch.dtype) -> np.ndarray:
        """`Discriminant.lengths` of the rows' features under the global trigger."""
        chunks = self._over(rows)[1].tensors.feature_chunks(dtype, column=GLOBAL_FEATURE)
        own = Discriminant(fitted.mean.to(self._device), fitted.factor.to(self._device))
        return torch.cat([own.lengths(chunk) for chunk in chunks]).cpu().numpy()

    def _over(self, rows: Rows | None) -> tuple[NearestSearch, TmmNN]:
        """What searches these rows; the last is kept, and what finds neighbours among all."""
        assert self._ready is not None, "prepare comes first"
        setup, parts, store = self._ready
        key = None if rows is None else rows.tobytes()
        if self._last is None or self._last[0] != key:
            own = store if rows is None else Subset(store, rows)
            if self._whole is None:
                self._whole = NearestSearch(store, factory=setup.factory, effort=setup.effort)
            nearest = self._whole if rows is None else NearestSearch(own)
            tmm = TmmNN(
                parts.classifier,
                own,
                cache_bytes=setup.cache_bytes,
                precision=setup.precision,
                backbone=parts.backbone,
                global_trigger=parts.global_trigger,
            )
            self._last = key, nearest, tmm
        return self._last[1:]

    @property
    def _device(self) -> torch.device:
        assert self._ready is not None, "prepare comes first"
        return self._ready[1].classifier.device

    def _progress(self, part: int) -> "_Reported":
        assert self._ready is not None, "prepare comes first"
        return _Reported(reporter(self._ready[0].board, part))

    def _arrived(self, sent: Sent, tmm: TmmNN) -> Scorer:
        """A scorer of this shard's exemplars, on its device."""
        scorer = sent.scorer
        if isinstance(scorer, DiscriminantScorer):
            fitted, lengths = scorer.discriminant, scorer.lengths
            own = Discriminant(fitted.mean.to(self._device), fitted.factor.to(self._device))
            known = None if lengths is None else lengths.to(self._device)
            scorer = DiscriminantScorer(own, scorer.query.to(self._device), known)
        elif isinstance(scorer, HeadScorer):
            scorer = replace(scorer, head=scorer.head.to(self._device))
        if sent.fused is None:
            return scorer
        weight, query, column = sent.fused
        clean = partial(tmm.tensors.features, dtype=query.dtype, column=column)
        return FusedScorer(scorer, weight, query.to(self._device), clean)


class _Reported:
    """A `Progress` that reports what is done."""

    def __init__(self, report: Any) -> None:
        self._report = report

    def __call__(self, step: str, done: int, total: int) -> None:
        self._report(done)
