"""What a store of exemplars offers, and some rows of one as a store of their own."""

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.sources.records import Metadata
from tmm_engine.index.types import ImageShape, Rows


@runtime_checkable
class ExemplarStore(Protocol):
    """Exemplars by row: id, label, predicted class, image, feature, metadata.

    Labels are numbers of a `Vocabulary`: below C classes of the model's. Where an exemplar has none of its own, its
    predicted class stands in, and is marked so.
    """

    image_shape: ImageShape
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

    def predictions(self, rows: Rows) -> Int64[np.ndarray, "rows"]:
        """Predicted classes of the given rows, in their order."""

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
        self.rows = rows
        self.image_shape = store.image_shape
        self.feature_dim = store.feature_dim
        self.feature_columns = store.feature_columns
        self.ids = store.ids[rows]
        self.labels = store.labels[rows]
        self.label_is_predicted = store.label_is_predicted[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, rows: Rows) -> UInt8[np.ndarray, "rows c h w"]:
        """Images of the given rows, in their order."""
        return self._store.images(self.rows[rows])

    def features(self, rows: Rows, *, column: str = FEATURE) -> Float32[np.ndarray, "rows d"]:
        """Features of the given rows, in their order."""
        return self._store.features(self.rows[rows], column=column)

    def predictions(self, rows: Rows) -> Int64[np.ndarray, "rows"]:
        """Predicted classes of the given rows, in their order."""
        return self._store.predictions(self.rows[rows])

    def metadata(self, rows: Rows) -> list[Metadata]:
        """Metadata of the given rows, in their order."""
        return self._store.metadata(self.rows[rows])

    def scan_images(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "batch c h w"]]:
        """All images in row order."""
        for start in range(0, len(self), batch_size):
            yield self._store.images(self.rows[start : start + batch_size])

    def scan_features(self, batch_size: int, *, column: str = FEATURE) -> Iterator[Float32[np.ndarray, "batch d"]]:
        """All features in row order."""
        for start in range(0, len(self), batch_size):
            yield self._store.features(self.rows[start : start + batch_size], column=column)
