"""The mode ``robust``: cosine similarity of descriptors that hold under noise, behind a gate that recognises copies.

Nothing of this is the paper's: see docs/ARCHITECTURE.md.
"""

import numpy as np
import torch
from jaxtyping import Float32

from tmm_engine.baselines import Nearest
from tmm_engine.index.descriptors.columns import COPY_FEATURE, ROBUST_FEATURE
from tmm_engine.index.neighbours.cache import FaissCache
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import Neighbours
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.rerank.recognise import Recognised, recognise_nearest
from tmm_engine.rerank.timing import Timings


class RobustSearch:
    """Searches one store by its descriptors; each FAISS index is made when it is first needed.

    Args:
        store: The exemplars.
        factory: FAISS factory string.
        cache: Where FAISS indexes are kept, if anywhere.
    """

    def __init__(self, store: ExemplarStore, *, factory: str, cache: FaissCache | None) -> None:
        self._store, self._factory, self._cache = store, factory, cache
        self._made: dict[str, Neighbours] = {}

    def search(
        self,
        copies: Float32[np.ndarray, "q c"],
        robust: Float32[np.ndarray, "q d"],
        *,
        k: int,
        threshold: float | None,
        timings: Timings,
    ) -> list[Nearest]:
        """The exemplars most like every query.

        A query that the recogniser takes for a copy of an exemplar is ranked, by the share to which it does, as that
        exemplar.

        Args:
            copies: The queries' descriptors by the recogniser, of unit length.
            robust: Those that rank.
            k: How many exemplars.
            threshold: Of recognition; None: no query is recognised.
            timings: Of the search.
        """
        neighbours = self._neighbours(ROBUST_FEATURE, timings)
        recognised: list[Recognised | None] = [None] * len(copies)
        if threshold is not None:
            recogniser = self._neighbours(COPY_FEATURE, timings)
            with timings.step("recognition"):
                for query, (rows, scores) in enumerate(recogniser.search(copies, k=2)):
                    nearest = list(zip(rows.tolist(), scores.tolist(), strict=True))
                    features = torch.from_numpy(copies[query])
                    recognised[query] = recognise_nearest(features, nearest, metric=Metric.COSINE, threshold=threshold)
                robust = np.stack([self._moved(own, copy) for own, copy in zip(robust, recognised, strict=True)])
        with timings.step("neighbours"):
            found = neighbours.search(robust, k=k)
        return [Nearest(*pair, recognised=copy) for pair, copy in zip(found, recognised, strict=True)]

    def close(self) -> None:
        """Let go of the FAISS indexes."""
        self._made.clear()

    def _moved(self, robust: Float32[np.ndarray, "d"], copy: Recognised | None) -> Float32[np.ndarray, "d"]:
        if copy is None:
            return robust
        exemplar = self._store.features(np.array([copy.row]), column=ROBUST_FEATURE)[0]
        return copy.moved(torch.from_numpy(robust), torch.tensor(exemplar)).numpy()

    def _neighbours(self, column: str, timings: Timings) -> Neighbours:
        if column not in self._made:
            with timings.step("loading features"):
                self._made[column] = Neighbours(
                    self._store, Metric.COSINE, column=column, factory=self._factory, cache=self._cache
                )
        return self._made[column]
