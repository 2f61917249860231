"""What a store of exemplars offers, and some rows of one as a store of their own.

A *row* is an exemplar's position, 0 to n−1, in one opened version of a store.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8

from tmm_engine.index.sources.images import Shape
from tmm_engine.index.sources.records import Metadata

Rows = Int64[np.ndarray, "rows"]

FEATURE = "feature"  # φ(x)
GLOBAL_FEATURE = "global_feature"  # φ(x^τ) with the index's global trigger τ, where it has one
STRETCHED_FEATURE = "stretched_feature"  # φ of x with its contrast stretched, where there is a global trigger


@runtime_checkable
class ExemplarStore(Protocol):
    """Exemplars by row: id, label, image, feature, metadata."""

    image_shape: Shape
    feature_dim: int
    feature_columns: Mapping[str, int]  # name -> dimension
    ids: Shaped[np.ndarray, "n"]
    labels: Int64[np.ndarray, "n"]
    label_is_predicted: Bool[np.ndarray, "n"]

    def __len__(self) -> int:
        """The number of exemplars, n."""

    def images(self, rows: Rows) -> UInt8[np.ndarray, "rows c h w"]:
        """Images of the given rows, in their order."""

    def features(self, rows: Rows, *, column: str = FEATURE) -> Float32[np.ndarray, "rows d"]:
        """Features of the given rows, in their order."""

    def metadata(self, rows: Rows) -> list[Metadata]:
        """Metadata of the given rows, in their order."""

    def scan_images(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "batch c h w"]]:
        """All images in row order."""

    def scan_features(self, batch_size: int, *, column: str = FEATURE) -> Iterator[Float32[np.ndarray, "batch d"]]:
        """All features in row order."""


class Subset:
    """Some rows of a store as a store of their own: what a filter leaves.

    Args:
        store: All exemplars.
        rows: Those that count, ascending; row i here is row `rows[i]` there.
    """

    def __init__(self, store: ExemplarStore, rows: Rows) -> None:
        self._store = store
        self._rows = rows
        self.image_shape = store.image_shape
        self.feature_dim = store.feature_dim
        self.feature_columns = store.feature_columns
        self.ids = store.ids[rows]
        self.labels = store.labels[rows]
        self.label_is_predicted = store.label_is_predicted[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, rows: Rows) -> UInt8[np.ndarray, "rows c h w"]:
        """Images of the given rows, in their order."""
        return self._store.images(self._rows[rows])

    def features(self, rows: Rows, *, column: str = FEATURE) -> Float32[np.ndarray, "rows d"]:
        """Features of the given rows, in their order."""
        return self._store.features(self._rows[rows], column=column)

    def metadata(self, rows: Rows) -> list[Metadata]:
        """Metadata of the given rows, in their order."""
        return self._store.metadata(self._rows[rows])

    def scan_images(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "batch c h w"]]:
        """All images in row order."""
        for start in range(0, len(self), batch_size):
            yield self._store.images(self._rows[start : start + batch_size])

    def scan_features(self, batch_size: int, *, column: str = FEATURE) -> Iterator[Float32[np.ndarray, "batch d"]]:
        """All features in row order."""
        for start in range(0, len(self), batch_size):
            yield self._store.features(self._rows[start : start + batch_size], column=column)
