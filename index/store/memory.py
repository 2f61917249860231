"""A store of exemplars that are held as arrays. (The one on disk is `index.store.lance_store`.)"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.records import Metadata
from tmm_engine.index.store.exemplars import FEATURE, GLOBAL_FEATURE, STRETCHED_FEATURE, Rows


class MemoryStore:
    """Exemplars held as arrays: for `Engine.from_arrays`, tests, and scoring where there is no index on disk."""

    def __init__(
        self,
        images: UInt8[np.ndarray, "n c h w"],
        features: Float32[np.ndarray, "n d"],
        labels: Int64[np.ndarray, "n"],
        *,
        ids: Sequence[str],
        label_is_predicted: Bool[np.ndarray, "n"] | None = None,
        global_features: Float32[np.ndarray, "n d"] | None = None,
        stretched_features: Float32[np.ndarray, "n d"] | None = None,
        metadata: Sequence[Mapping[str, str | int | float | bool | None]] | None = None,
    ) -> None:
        n = len(images)
        for name, column in (
            ("features", features),
            ("global features", global_features),
            ("stretched features", stretched_features),
            ("labels", labels),
            ("ids", ids),
            ("metadata", metadata),
        ):
            if column is not None and len(column) != n:
                raise InputError(f"expected {n} {name}, one per image, got {len(column)}")
        if len(set(ids)) != n:
            raise InputError("ids must be unique")
        self._images = images
        self._features = {FEATURE: features}
        if global_features is not None:
            self._features[GLOBAL_FEATURE] = global_features
        if stretched_features is not None:
            self._features[STRETCHED_FEATURE] = stretched_features
        self.feature_columns = frozenset(self._features)
        self._metadata = [dict(row) for row in metadata] if metadata is not None else [{} for _ in range(n)]
        _, channels, height, width = images.shape
        self.image_shape = (channels, height, width)
        self.feature_dim = features.shape[1]
        self.ids = np.array(ids, dtype=object)
        self.labels = labels
        self.label_is_predicted = label_is_predicted if label_is_predicted is not None else np.zeros(n, dtype=bool)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: Rows) -> UInt8[np.ndarray, "rows c h w"]:
        """Images of the given rows, in their order."""
        return self._images[rows]

    def features(self, rows: Rows, *, column: str = FEATURE) -> Float32[np.ndarray, "rows d"]:
        """Features of the given rows, in their order."""
        return self._features[column][rows]

    def metadata(self, rows: Rows) -> list[Metadata]:
        """Metadata of the given rows, in their order."""
        return [dict(self._metadata[row]) for row in rows]

    def scan_images(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "batch c h w"]]:
        """All images in row order."""
        for start in range(0, len(self), batch_size):
            yield self._images[start : start + batch_size]

    def scan_features(self, batch_size: int, *, column: str = FEATURE) -> Iterator[Float32[np.ndarray, "batch d"]]:
        """All features in row order."""
        for start in range(0, len(self), batch_size):
            yield self._features[column][start : start + batch_size]
