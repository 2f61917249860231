"""φ(x_i^t): a store's exemplars as triggered features, passed through the backbone or stored for the global trigger."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from tmm_engine.index.errors import InputError
from tmm_engine.index.progress import Progress
from tmm_engine.index.store.exemplars import GLOBAL_FEATURE, ExemplarStore
from tmm_engine.rerank.backbone import Backbone
from tmm_engine.rerank.contrast import stretch_images
from tmm_engine.rerank.exemplars import ExemplarTensors
from tmm_engine.rerank.jobs import Job
from tmm_engine.rerank.score import Scores
from tmm_engine.rerank.settings import TmmConfig, Trigger


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
        self, group: list[Job], rows: Int64[np.ndarray, "n"] | None, progress: Progress
    ) -> list[Float[Tensor, "n d"]]:
        """φ(x_i^t) of the rows (None: all), for each query of the group."""
        query, n = group[0].query, len(self.store) if rows is None else len(rows)
        if self._stored:
            return [self.tensors.features(rows, query.dtype, column=GLOBAL_FEATURE)] * len(group)
        features = [query.new_empty((n, self.store.feature_dim)) for _ in group]
        done = 0
        for chunk in self.tensors.image_chunks(rows):
            for job, target in zip(group, features, strict=True):
                target[done : done + len(chunk)] = self._pass(job, chunk)
            done += len(chunk)
            progress("triggering exemplars", done, n)
        return features

    def scores(self, group: list[Job], progress: Progress) -> list[Scores]:
        """Of all exemplars, for each query of the group; their features are never held all at once."""
        parts: list[list[Scores]] = [[] for _ in group]
        done, n = 0, len(self.store)
        for chunk in self._chunks(group[0].query.dtype):
            rows = np.arange(done, done + len(chunk))
            for job, scores in zip(group, parts, strict=True):
                scores.append(job.score(chunk if self._stored else self._pass(job, chunk), rows))
            done += len(chunk)
            if not self._stored:
                progress("scoring exemplars", done, n)
        return [Scores(*map(torch.cat, zip(*scores, strict=True))) for scores in parts]

    @property
    def _stored(self) -> bool:
        """Whether the features are in the index: then nothing is passed through the backbone."""
        return self.config.trigger is Trigger.GLOBAL

    def _chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """All exemplars, in order: their stored features, or their images."""
        if self._stored:
            return self.tensors.feature_chunks(dtype, column=GLOBAL_FEATURE)
        return self.tensors.image_chunks(None)

    def _pass(self, job: Job, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """φ(x^t); in smaller chunks where the device has no room for a whole one."""
        image_weight, trigger_weight = self.config.blend.weights(job.found.intensity)
        try:
            return self.backbone(
                stretch_images(images) if self.config.stretch else images,
                job.found.trigger,
                image_weight=image_weight,
                trigger_weight=trigger_weight,
                clamp=self.config.clamp,
            )
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                raise InputError(
                    f"{images.device} has no memory for one image of {tuple(images.shape[1:])}: free some, "
                    f"cache less (--cache-images), or use --device cpu"
                ) from error
        halves = images.split((len(images) + 1) // 2)
        return torch.cat([self._pass(job, half) for half in halves])
