"""A store's exemplars as tensors on the scoring device: images, and the columns of stored features."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from tmm_engine.index.batches import forward_batch_size, prefetched
from tmm_engine.index.errors import InputError
from tmm_engine.index.store.exemplars import ExemplarStore

DEFAULT_CACHE_BYTES = 4 << 30
READ_TOGETHER = 8 << 20  # bytes of images of single rows that a store is asked for at once: many cost it little more


class ExemplarTensors:
    """A store's exemplars as tensors on the scoring device: kept there up to a budget, read anew beyond it.

    Args:
        store: The exemplars.
        device: Where images and features are wanted.
        cache_bytes: What may stay there: images first, then features.

    Raises:
        InputError: the budget is smaller than one chunk of images.
    """

    def __init__(self, store: ExemplarStore, *, device: torch.device, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.chunk = forward_batch_size(store.image_shape)
        image_bytes = int(np.prod(store.image_shape))
        if 0 < cache_bytes < min(self.chunk, len(store)) * image_bytes:
            raise InputError(
                f"a cache of {cache_bytes:,} bytes is smaller than one chunk of {self.chunk} images "
                f"({self.chunk * image_bytes:,} bytes); give more, or 0 for none"
            )
        self._store = store
        self._device = device
        self._images: UInt8[Tensor, "n c h w"] | None = None
        self._features: dict[str, Float[Tensor, "n d"]] = {}
        self._budget = cache_bytes - len(store) * image_bytes
        self._keep_images = self._budget >= 0

    def image_chunks(self, rows: Int64[np.ndarray, "n"] | None) -> Iterator[UInt8[Tensor, "chunk c h w"]]:
        """The images of `rows` (None: all), in order, `chunk` at a time."""
        if rows is None and self._keep_images and self._images is None:
            self._images = self._load_images()
        if self._images is not None:
            if rows is None:
                yield from self._images.split(self.chunk)
            else:
                for part in torch.from_numpy(rows).to(self._device).split(self.chunk):
                    yield self._images[part]
            return
        if rows is None:
            batches = self._store.scan_images(self.chunk)
        else:
            together = max(1, READ_TOGETHER // (self.chunk * int(np.prod(self._store.image_shape)))) * self.chunk
            batches = (self._store.images(rows[start : start + together]) for start in range(0, len(rows), together))
        for batch in prefetched(batches):
            yield from _tensor(batch).to(self._device).split(self.chunk)

    def features(
        self, rows: Int64[np.ndarray, "n"] | None, dtype: torch.dtype, *, column: str = "feature"
    ) -> Float[Tensor, "n d"]:
        """Features of `rows` (None: all), in order: clean ones, φ(x_i), or those of another column of the store."""
        if rows is None and column not in self._features:
            features = self._load_features(column)
            if self._budget >= features.nbytes:
                self._budget -= features.nbytes
                self._features[column] = features
            return features.to(dtype)
        if column in self._features:
            kept = self._features[column]
            return (kept if rows is None else kept[torch.from_numpy(rows).to(self._device)]).to(dtype)
        assert rows is not None
        return _tensor(self._store.features(rows, column=column)).to(self._device, dtype)

    def feature_chunks(self, dtype: torch.dtype, *, column: str) -> Iterator[Float[Tensor, "chunk d"]]:
        """All features of a column, in order, `chunk` at a time; kept where the budget allows."""
        if column in self._features or self._budget >= 4 * len(self._store) * self._store.feature_columns[column]:
            yield from self.features(None, dtype, column=column).split(self.chunk)
            return
        for batch in prefetched(self._store.scan_features(self.chunk, column=column)):
            yield _tensor(batch).to(self._device, dtype)

    def _load_images(self) -> UInt8[Tensor, "n c h w"]:
        images = torch.empty((len(self._store), *self._store.image_shape), dtype=torch.uint8, device=self._device)
        return _fill(images, self._store.scan_images(self.chunk))

    def _load_features(self, column: str) -> Float[Tensor, "n d"]:
        features = torch.empty((len(self._store), self._store.feature_columns[column]), device=self._device)
        return _fill(features, self._store.scan_features(self.chunk, column=column))


def _tensor(array: np.ndarray) -> Tensor:
    """Of the same memory where it may be written to; Arrow's may not."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _fill(target: Tensor, batches: Iterator[np.ndarray]) -> Tensor:
    filled = 0
    for batch in batches:
        target[filled : filled + len(batch)] = _tensor(batch)
        filled += len(batch)
    assert filled == len(target), f"the store yielded {filled} of its {len(target)} rows"
    return target
