"""The columns of one store as matrices, each made when it is first needed."""

import threading

from tmm_engine.index.neighbours.budget import Budget
from tmm_engine.index.neighbours.matrix import Chosen, Matrix, MatrixCache, Streamed
from tmm_engine.index.neighbours.vectors import SCAN
from tmm_engine.index.store.exemplars import ExemplarStore, Subset


class Matrices:
    """Of one store.

    Args:
        store: The exemplars.
        cache: Where they are kept and mapped from; without it, they are made anew, in memory.
        of: Of all exemplars, where the store is some of them.
    """

    def __init__(self, store: ExemplarStore, cache: MatrixCache | None = None, *, of: "Matrices | None" = None) -> None:
        self._store, self._cache, self._of = store, cache, of
        self._made: dict[str, Matrix | Chosen | Streamed] = {}
        self._guard = threading.Lock()

    @property
    def budget(self) -> Budget:
        """Of memory, which they share with what else holds features."""
        return Budget() if self._cache is None else self._cache.budget

    def among(self, store: Subset) -> "Matrices":
        """Of some of the exemplars; they hold nothing of their own."""
        return Matrices(store, of=self)

    def column(self, name: str) -> Matrix | Chosen | Streamed:
        """One column; streamed where it cannot be kept on disk, and is more than may stay in memory."""
        with self._guard:
            if name not in self._made:
                self._made[name] = self._make(name)
            return self._made[name]

    def close(self) -> None:
        """Let go of them."""
        with self._guard:
            for made in self._made.values():
                if isinstance(made, Matrix) and made.lease is not None:
                    self.budget.end(made.lease)
            self._made.clear()

    def _make(self, name: str) -> Matrix | Chosen | Streamed:
        if self._of is not None and isinstance(self._store, Subset):
            whole = self._of.column(name)
            return whole.among(self._store.rows)
        wanted = {"rows": len(self._store), "dimension": self._store.feature_columns[name]}
        if self._cache is None:
            return Matrix.of(self._store.scan_features(SCAN, column=name), **wanted)
        size, kept = 4 * wanted["rows"] * wanted["dimension"], self._cache.load(name, **wanted)
        if kept is None:
            self._cache.save(name, self._store.scan_features(SCAN, column=name), size=size)
            kept = self._cache.load(name, **wanted)
        if kept is not None:
            return kept
        if (taken := self.budget.take(size)) < size:
            self.budget.give_back(taken)
            return Streamed(self._store, name)
        return Matrix.of(self._store.scan_features(SCAN, column=name), **wanted)
