"""Neighbours and TMM-NN over exemplars in shards: what needs all exemplars is asked of the shards and put together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from tmm_engine.cluster.shard import Pass, Sent
from tmm_engine.cluster.shards import Shards
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.neighbours.factories import EXACT, SearchPrecision
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.index.neighbours.search import Found, Neighbours
from tmm_engine.index.progress import Progress
from tmm_engine.index.store.exemplars import ExemplarStore, Subset
from tmm_engine.index.types import Rows
from tmm_engine.nearest import NearestSearch
from tmm_engine.rerank.columns import GLOBAL_FEATURE, STRETCHED_FEATURE
from tmm_engine.rerank.discriminant import ROWS, Discriminant, Moments
from tmm_engine.rerank.head import HeadFinder
from tmm_engine.rerank.passing import TriggeredExemplars
from tmm_engine.rerank.score import DiscriminantScorer, FusedScorer, Scorer, Scores
from tmm_engine.rerank.settings import TmmConfig
from tmm_engine.rerank.tmm import TmmNN
from tmm_engine.rerank.trigger import FoundTrigger


class Piece(NamedTuple):
    """What a shard holds of a view: the places start to stop of the view, and the shard's rows (None: all)."""

    start: int
    stop: int
    rows: Rows | None


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Some exemplars of an index in shards, as a store on this machine has them.

    Attributes:
        shards: All of them.
        store: The exemplars of the view.
        rows: Which rows of the index they are, ascending; None: all.
    """

    shards: Shards
    store: ExemplarStore
    rows: Rows | None = None

    def over(self, subset: Subset) -> "View":
        """Some of these."""
        return View(self.shards, subset, subset.rows if self.rows is None else self.rows[subset.rows])

    def pieces(self) -> list[Piece]:
        """Of each shard."""
        if self.rows is None:
            return [Piece(start, stop, None) for start, stop in self.shards.ranges]
        found = []
        for start, stop in self.shards.ranges:
            first, last = np.searchsorted(self.rows, [start, stop]).tolist()
            found.append(Piece(first, last, self.rows[first:last] - start))
        return found

    def seen(self) -> Rows | None:
        """The places of the exemplars that can be asked for; None: all."""
        missing = self.shards.missing
        if not missing:
            return None
        rows = np.arange(len(self.store)) if self.rows is None else self.rows
        gone = np.logical_or.reduce([(rows >= start) & (rows < stop) for start, stop, _ in missing])
        return np.flatnonzero(~gone) if gone.any() else None

    def ask(self, method: str, arguments: Callable[[Piece], tuple[Any, ...] | None], **how: Any) -> list[Any]:
        """As `Shards.ask`, for every piece that is not empty: its rows, then these arguments (None: not asked)."""
        asked: list[tuple[Any, ...] | None] = []
        for piece in self.pieces():
            own = arguments(piece) if piece.stop > piece.start else None
            asked.append(None if own is None else (piece.rows, *own))
        return self.shards.ask(method, asked, **how)


class ShardedNeighbours(Neighbours):
    """`Neighbours` of all shards together; each shard has its own FAISS index.

    Args:
        view: The exemplars.
        metric: L2 distance, or cosine similarity.
        column: Of the features.
    """

    def __init__(self, view: View, metric: Metric, column: str) -> None:
        self.metric = metric
        self._view, self._column = view, column

    def drop(self) -> None:
        """Nothing is held here."""

    @property
    def beside(self) -> int:
        """None: the shards' indexes are made of what they hold."""
        return 0

    @property
    def streamed(self) -> bool:
        """Of what the shards hold."""
        return False

    def features(self, rows: Rows) -> Float32[np.ndarray, "rows d"]:
        """Of some rows, read here."""
        return self._view.store.features(rows, column=self._column)

    def ranked(self, queries: Float32[np.ndarray, "q d"], *, k: int, reach: int = 0) -> list[Found]:
        """As `Neighbours.ranked`: scores are computed alike wherever the exemplars are, and ties break by id."""
        if not len(queries):
            return []
        view = self._view
        answers = view.ask("neighbours", lambda piece: (self.metric, self._column, queries, (k, reach)))
        pairs = [(piece.start, answer) for piece, answer in zip(view.pieces(), answers, strict=True) if answer]
        found = []
        for query in range(len(queries)):
            rows = np.concatenate([start + answer[query].rows for start, answer in pairs])
            scores = np.concatenate([answer[query].scores for _, answer in pairs])
            best = best_first(scores, rows, view.store.ids, k=max(k, reach))
            agreement = float(np.mean([answer[query].agreement for _, answer in pairs]))
            found.append(Found(rows[best], scores[best], agreement))
        return found


class ShardedNearest(NearestSearch):
    """`NearestSearch` over a view.

    Args:
        view: The exemplars.
        factory: FAISS factory string, of every shard's index.
        precision: As for `NearestSearch`.
    """

    def __init__(self, view: View, *, factory: str = EXACT, precision: SearchPrecision | None = None) -> None:
        super().__init__(view.store, factory=factory, precision=precision)
        self.view = view

    def backend(self, *columns: str) -> str:
        """What compares a query with the exemplars in some columns."""
        return f"{super().backend(*columns)}, {len(self.view.shards.ranges)} shards"

    def among(self, store: Subset) -> "ShardedNearest":
        """Exact search among some of the view's exemplars."""
        return ShardedNearest(self.view.over(store))

    def _make(self, metric: Metric, column: str) -> Neighbours:
        return ShardedNeighbours(self.view, metric, column)


class ShardedTmm(TmmNN):
    """`TmmNN` over a view: triggers and heads are found here, exemplars pass the network and are scored in shards.

    Args:
        view: The exemplars.
        like: The same over the store on this machine.
    """

    def __init__(self, view: View, like: TmmNN) -> None:
        self._view, self._like = view, like
        super().__init__(
            like.classifier,
            view.store,
            cache_bytes=like.cache_bytes,
            backbone=like.backbone,
            global_trigger=like.global_trigger,
        )

    def over(self, store: ExemplarStore) -> TmmNN:
        """Over some of the view's exemplars."""
        return ShardedTmm(self._view.over(store), self._like) if isinstance(store, Subset) else super().over(store)

    def exemplars(self, config: TmmConfig, *, exact: bool) -> TriggeredExemplars:
        """In the shards."""
        here = super().exemplars(config, exact=exact)
        return ShardedExemplars(here.store, here.tensors, here.backbone, config, self._view, exact)

    def _head_finder(self) -> HeadFinder:
        return ShardedHeads(self._view, self.classifier.device, self.classifier, self.store, self._tensors)


@dataclass(frozen=True, slots=True, eq=False)
class ShardedExemplars(TriggeredExemplars):
    """`TriggeredExemplars` of a view.

    Attributes:
        view: The exemplars.
        precise: Whether they pass in the classifier's own precision.
    """

    view: View
    precise: bool

    def features(
        self, triggers: Sequence[FoundTrigger], rows: Int64[np.ndarray, "n"] | None, progress: Progress
    ) -> list[Float[Tensor, "n d"]]:
        """As there; what is stored is read here."""
        if self.stored:
            return TriggeredExemplars.features(self, triggers, rows, progress)
        wanted = np.arange(len(self.store)) if rows is None else rows
        how = self._how(triggers)

        def asked(piece: Piece) -> tuple[Any, ...] | None:
            inside = (wanted >= piece.start) & (wanted < piece.stop)
            chosen = None if rows is None else wanted[inside] - piece.start
            return (chosen, how) if inside.any() else None

        answers = self.view.ask(
            "features", asked, reported=True, say=lambda done: progress("triggering exemplars", done, len(wanted))
        )
        progress("triggering exemplars", len(wanted), len(wanted))
        like = triggers[0].trigger
        found = [like.new_empty((len(wanted), self.store.feature_dim)) for _ in triggers]
        for piece, answer in zip(self.view.pieces(), answers, strict=True):
            if answer is not None:
                inside = torch.from_numpy((wanted >= piece.start) & (wanted < piece.stop)).to(like.device)
                for target, features in zip(found, answer, strict=True):
                    target[inside] = torch.from_numpy(features.copy()).to(like)
        return found

    def scores(self, triggers: Sequence[FoundTrigger], scorers: Sequence[Scorer], progress: Progress) -> list[Scores]:
        """As there."""
        n, device = len(self.store), triggers[0].trigger.device
        how = self._how(triggers)
        answers = self.view.ask(
            "scores",
            lambda piece: (how, [self._sent(own, piece) for own in scorers]),
            reported=True,
            say=lambda done: None if self.stored else progress("scoring exemplars", done, n),
        )
        parts = [answer for answer in answers if answer is not None]
        return [
            Scores(*(torch.from_numpy(np.concatenate(kind)).to(device) for kind in zip(*own, strict=True)))
            for own in zip(*parts, strict=True)
        ]

    def _how(self, triggers: Sequence[FoundTrigger]) -> Pass:
        return Pass(self.config, [replace(own, trigger=own.trigger.detach().cpu()) for own in triggers], self.precise)

    def _sent(self, scorer: Scorer, piece: Piece) -> Sent:
        """What a shard needs of a scorer."""
        if isinstance(scorer, FusedScorer):
            column = STRETCHED_FEATURE if self.config.view.stretch else FEATURE
            return Sent(self._sent(scorer.scorer, piece).scorer, (scorer.weight, scorer.query.cpu(), column))
        if isinstance(scorer, DiscriminantScorer) and scorer.lengths is not None:
            return Sent(replace(scorer, lengths=scorer.lengths[piece.start : piece.stop].clone()))
        return Sent(scorer)


class ShardedHeads(HeadFinder):
    """`HeadFinder` whose discriminants under the global trigger are fitted by the shards: moments are sums."""

    def __init__(self, view: View, device: torch.device, *parts: Any) -> None:
        super().__init__(*parts)
        self._view, self._device = view, device

    def _fitted(self, shrinkage: float, dtype: torch.dtype) -> tuple[Discriminant, Float[Tensor, "all"]]:
        store = self._view.store
        first = store.features(np.arange(min(ROWS, len(store))), column=GLOBAL_FEATURE)
        moments = Moments.about(torch.from_numpy(first.copy()).to(self._device, dtype))
        origin = moments.origin.cpu().numpy()
        for answer in self._view.ask("moments", lambda piece: (origin,)):
            if answer is not None:
                count, *sums = answer
                moments.merge(count, *(torch.from_numpy(values.copy()).to(self._device) for values in sums))
        fitted = Discriminant.of(moments, shrinkage=shrinkage)
        answers = self._view.ask("lengths", lambda piece: (fitted, dtype))
        lengths = np.concatenate([answer for answer in answers if answer is not None])
        return fitted, torch.from_numpy(lengths).to(self._device)
