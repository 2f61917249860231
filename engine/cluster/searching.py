"""An index opened in shards, one worker each, and a `Searcher` over them that says what it could not see."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from tmm_engine.cluster.board import Board
from tmm_engine.cluster.connection import Connection, RayOptions, connected
from tmm_engine.cluster.shard import ShardSetup
from tmm_engine.cluster.sharded import ShardedNearest, ShardedTmm, View
from tmm_engine.cluster.shards import ShardMissingError, Shards
from tmm_engine.cluster.worker import own_network
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.descriptors.columns import Describer
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.factories import Effort, usable
from tmm_engine.index.progress import Progress
from tmm_engine.index.store.exemplars import Subset
from tmm_engine.index.types import Rows
from tmm_engine.opening import Opening, Parts
from tmm_engine.options import SearchOptions
from tmm_engine.query import Query
from tmm_engine.rerank.tmm import TmmNN
from tmm_engine.results import SearchResult
from tmm_engine.scanning import ByRanking, RankedBy
from tmm_engine.searching import Searcher


class ShardedSearcher(Searcher):
    """A `Searcher` whose exemplars are in shards. Where one is lost and cannot be had, the answer is that of an index
    of the others, and says so.

    Args:
        classifier: As for `Searcher`, and so are describer and vocabulary.
        tmm: Over the same view.
        describer: See there.
        vocabulary: See there.
        nearest: Over the view.
        resources: What is let go of in the end.
    """

    def __init__(
        self,
        classifier: Classifier,
        tmm: TmmNN,
        describer: Describer | None,
        *,
        vocabulary: Vocabulary,
        nearest: ShardedNearest,
        resources: ExitStack,
    ) -> None:
        super().__init__(classifier, tmm, describer, vocabulary=vocabulary, nearest=nearest)
        self._view, self._resources = nearest.view, resources

    def over(self, store: Subset) -> Searcher:
        """Over some of the exemplars, in the same shards."""
        nearest = ShardedNearest(self._view.over(store))
        return ShardedSearcher(
            self._classifier,
            self._tmm.over(store),
            self._describer,
            vocabulary=self._vocabulary,
            nearest=nearest,
            resources=ExitStack(),  # which are the whole's
        )

    def close(self) -> None:
        """Let go of the shards."""
        super().close()
        self._resources.close()

    def search_ranked(
        self, queries: list[Query], options: SearchOptions, progress: Progress, *, whole: bool = False
    ) -> list[tuple[SearchResult, RankedBy]]:
        """As there; shards that were missing are asked for again first."""
        self._view.shards.look()
        while True:
            seen = self._view.seen()
            try:
                if seen is None:
                    return super().search_ranked(queries, options, progress, whole=whole)
                answers = self._others(seen).search_ranked(queries, options, progress, whole=whole)
                return [(self._incomplete(result), _of_all(ranked, seen)) for result, ranked in answers]
            except ShardMissingError:
                continue  # it is known to be missing now

    def _others(self, seen: Rows) -> Searcher:
        """Over what can be seen.

        Raises:
            IndexStateError: that is nothing.
        """
        if len(seen) == 0:
            raise IndexStateError(
                f"Ray: no exemplar can be seen: {self._missing()}; try again, or open the index again"
            )
        return Searcher.over(self, Subset(self._store, seen))

    def _incomplete(self, result: SearchResult) -> SearchResult:
        total = len(self._store)
        note = (
            f"incomplete: {total - result.exemplars:,} of {total:,} exemplars were not seen, and the answer is that of "
            f"an index without them: {self._missing()}"
        )
        return replace(result, exemplars=total, complete=False, notes=(note, *result.notes))

    def _missing(self) -> str:
        """Which exemplars of the index, and why."""
        ids = self._view.shards.ids
        told = [f"{ids[start]!s} to {ids[stop - 1]!s} ({why})" for start, stop, why in self._view.shards.missing]
        return "; ".join(told)


def _of_all(ranked: RankedBy, seen: Rows) -> RankedBy:
    """What exemplars were ranked by, in rows of all of them."""
    return replace(ranked, rows=seen[ranked.rows]) if isinstance(ranked, ByRanking) else ranked


def sharded_searcher(path: Path, parts: Parts, opening: Opening, ray: RayOptions, here: TmmNN) -> Searcher:
    """Load the exemplars of an opened index into workers of a Ray cluster.

    Args:
        path: The index, on a path that all machines share.
        parts: Of it, opened here.
        opening: How it was opened.
        ray: Which cluster.
        here: TMM-NN over the store on this machine.

    Raises:
        InputError: there is no Ray at the address, or no worker fits.
        IndexStateError: as `Shards`.
        ModelError: see there.
    """
    with ExitStack() as resources:
        connection = resources.enter_context(connected(ray))
        board = Board()
        resources.callback(board.close)
        setups = _setups(path.resolve(), parts, opening, connection, board)
        shards = Shards(setups, connection, board, ids=parts.store.ids)
        resources.callback(shards.close)
        view = View(shards, parts.store)
        return ShardedSearcher(
            parts.classifier,
            ShardedTmm(view, here),
            parts.describer,
            vocabulary=parts.manifest.vocabulary,
            nearest=ShardedNearest(
                view,
                factory=usable(setups[0].factory, max(setup.stop - setup.start for setup in setups)),
                precision=opening.search_precision,
            ),
            resources=resources.pop_all(),
        )


def _setups(path: Path, parts: Parts, opening: Opening, connection: Connection, board: Board) -> list[ShardSetup]:
    network, precision, manifest = own_network(parts.classifier), opening.search_precision, parts.manifest
    return [
        ShardSetup(
            path=path,
            version=manifest.version,
            content=manifest.content,
            network=network,
            start=start,
            stop=stop,
            cache_bytes=opening.cache_bytes,
            precision=opening.precision,
            backend=opening.backend,
            factory=manifest.neighbours if precision is None else precision.factory,
            effort=manifest.effort if precision is None else Effort(),
            cpus=connection.cpus,
            board=board.actor,
        )
        for start, stop in cut(len(parts.store), connection.workers, forward_batch_size(parts.store.image_shape))
    ]


def cut(rows: int, shards: int, batch: int) -> Iterator[tuple[int, int]]:
    """Where shards begin and end: about equally many rows in each, where whole batches of the network do.

    So each image passes the network beside the same others as on a single machine, which decides about the last bits.
    With fewer batches than shards, there are fewer shards.
    """
    batches = -(-rows // batch)
    edges = np.linspace(0, batches, min(shards, batches) + 1).round().astype(int) * batch
    return ((int(start), min(int(stop), rows)) for start, stop in pairwise(edges))
