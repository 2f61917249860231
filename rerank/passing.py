"""The pass: a store's exemplars under the triggers of queries, φ(x_i^t), by the backbone or from a stored column."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from tmm_engine.index.contrast import stretch_images
from tmm_engine.index.errors import InputError
from tmm_engine.index.progress import Progress
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.rerank.backbone import Backbone
from tmm_engine.rerank.columns import GLOBAL_FEATURE
from tmm_engine.rerank.exemplars import ExemplarTensors
from tmm_engine.rerank.score import Scorer, Scores
from tmm_engine.rerank.settings import IndexTrigger, TmmConfig
from tmm_engine.rerank.trigger import FoundTrigger


@dataclass(frozen=True, slots=True, eq=False)
class TriggeredExemplars:
    """Exemplars under the triggers of queries that share a pass.

    Attributes:
        store: The exemplars.
        tensors: Their images and stored features.
        backbone: Passes images through φ.
        config: The reading of TMM-NN.
    """

    store: ExemplarStore
    tensors: ExemplarTensors
    backbone: Backbone
    config: TmmConfig

    def features(
        self, triggers: Sequence[FoundTrigger], rows: Int64[np.ndarray, "n"] | None, progress: Progress
    ) -> list[Float[Tensor, "n d"]]:
        """φ(x_i^t) of the rows (None: all), for each trigger."""
        like, n = triggers[0].trigger, len(self.store) if rows is None else len(rows)
        if self.stored:
            return [self.tensors.features(rows, like.dtype, column=GLOBAL_FEATURE)] * len(triggers)
        features = [like.new_empty((n, self.store.feature_dim)) for _ in triggers]
        done = 0
        for chunk in self.tensors.image_chunks(rows):
            for trigger, target in zip(triggers, features, strict=True):
                target[done : done + len(chunk)] = self._passed(trigger, chunk)
            done += len(chunk)
            progress("triggering exemplars", done, n)
        return features

    def scores(self, triggers: Sequence[FoundTrigger], scorers: Sequence[Scorer], progress: Progress) -> list[Scores]:
        """Of all exemplars, by a scorer for each trigger; their features are never held all at once."""
        parts: list[list[Scores]] = [[] for _ in triggers]
        done, n = 0, len(self.store)
        for chunk in self._chunks(triggers[0].trigger.dtype):
            rows = np.arange(done, done + len(chunk))
            for trigger, scorer, scores in zip(triggers, scorers, parts, strict=True):
                scores.append(scorer.score(chunk if self.stored else self._passed(trigger, chunk), rows))
            done += len(chunk)
            if not self.stored:
                progress("scoring exemplars", done, n)
        return [Scores(*map(torch.cat, zip(*scores, strict=True))) for scores in parts]

    @property
    def stored(self) -> bool:
        """Whether the features are in the index: then nothing is passed through the backbone."""
        return isinstance(self.config.trigger, IndexTrigger)

    def _chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """All exemplars, in order: their stored features, or their images."""
        if self.stored:
            return self.tensors.feature_chunks(dtype, column=GLOBAL_FEATURE)
        return self.tensors.image_chunks(None)

    def _passed(self, found: FoundTrigger, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """φ(x^t); in smaller chunks where the device has no room for a whole one."""
        image_weight, trigger_weight = found.weights
        try:
            return self.backbone(
                stretch_images(images) if self.config.view.stretch else images,
                found.trigger,
                image_weight=image_weight,
                trigger_weight=trigger_weight,
                clamp=found.blending.clamp,
            )
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                raise InputError(
                    f"{images.device} has no memory for one image of {tuple(images.shape[1:])}: free some, give the "
                    f"cache less (cache_bytes=…), or use the device 'cpu'"
                ) from error
        halves = images.split((len(images) + 1) // 2)
        return torch.cat([self._passed(found, half) for half in halves])
