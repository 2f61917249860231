"""Step 3 of TMM-NN: stream triggered exemplars through the backbone, and score what comes out by the tuned head."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from index.classifier import Classifier
from index.store import ExemplarStore
from rerank.config import Score, TmmConfig
from rerank.trigger import apply_trigger

CHUNK = 1024  # images in one forward pass
DEFAULT_CACHE_BYTES = 4 << 30


class ExemplarTensors:
    """A store's exemplars as tensors on the scoring device: kept there up to a budget, read anew from the store beyond
    it.
    """

    def __init__(self, store: ExemplarStore, *, device: torch.device, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._store = store
        self._device = device
        self._images: UInt8[Tensor, "n c h w"] | None = None
        self._features: Float[Tensor, "n d"] | None = None
        image_bytes = len(store) * int(np.prod(store.image_shape))
        feature_bytes = 4 * len(store) * store.feature_dim
        self._keep_images = image_bytes <= cache_bytes
        self._keep_features = feature_bytes <= cache_bytes - (image_bytes if self._keep_images else 0)

    def image_chunks(self, rows: Int64[np.ndarray, "n"] | None) -> Iterator[UInt8[Tensor, "chunk c h w"]]:
        """The images of `rows` (None: all), in order, at most CHUNK at a time."""
        if rows is None and self._keep_images and self._images is None:
            self._images = self._load_images()
        if self._images is not None:
            yield from (
                self._images.split(CHUNK)
                if rows is None
                else (self._images[part] for part in torch.from_numpy(rows).to(self._device).split(CHUNK))
            )
        elif rows is None:
            for batch in self._store.scan_images(CHUNK):
                yield _tensor(batch).to(self._device)
        else:
            for start in range(0, len(rows), CHUNK):
                yield _tensor(self._store.images(rows[start : start + CHUNK])).to(self._device)

    def features(self, rows: Int64[np.ndarray, "n"] | None, dtype: torch.dtype) -> Float[Tensor, "n d"]:
        """Clean features φ(x_i) of `rows` (None: all), in order."""
        if rows is None and self._keep_features and self._features is None:
            self._features = self._load_features()
        if self._features is not None:
            kept = self._features if rows is None else self._features[torch.from_numpy(rows).to(self._device)]
            return kept.to(dtype)
        if rows is None:
            return self._load_features().to(dtype)
        return _tensor(self._store.features(rows)).to(self._device, dtype)

    def _load_images(self) -> UInt8[Tensor, "n c h w"]:
        images = torch.empty((len(self._store), *self._store.image_shape), dtype=torch.uint8, device=self._device)
        return _fill(images, self._store.scan_images(CHUNK))

    def _load_features(self) -> Float[Tensor, "n d"]:
        features = torch.empty((len(self._store), self._store.feature_dim), device=self._device)
        return _fill(features, self._store.scan_features(CHUNK))


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


@dataclass(frozen=True, slots=True)
class TriggeredBackbone:
    """φ(x^t) for exemplars x as stored: uint8 pixels -> blend with one query's trigger -> features."""

    classifier: Classifier
    trigger: Float[Tensor, "c h w"]
    intensity: float
    config: TmmConfig

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "chunk c h w"]) -> Float[Tensor, "chunk d"]:
        """Features of the triggered images."""
        return self.classifier.features(self.apply(images.to(self.trigger.dtype) / 255.0))

    def apply(self, images: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n c h w"]:
        """The triggered images themselves, from pixels in [0, 1]."""
        return apply_trigger(
            images, self.trigger, intensity=self.intensity, blend=self.config.blend, clamp=self.config.clamp
        )


def dummy_scores(head: nn.Linear, features: Float[Tensor, "n d"], score: Score) -> Float[Tensor, "n"]:
    """Each row's score for the dummy class, the last of the tuned head (Eq.

    4): log-odds z_C − logsumexp(z_0..C−1), or z_C.
    """
    logits = head(features)  # (n, d) @ (d, C+1) -> (n, C+1)
    dummy = logits[:, -1]
    return dummy if score is Score.LOGIT else dummy - torch.logsumexp(logits[:, :-1], dim=1)
