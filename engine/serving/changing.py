"""Queries darkened, blurred and made noisy, to see what holds."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from tmm_engine.index.descriptors.views import blur
from tmm_engine.query import Query
from tmm_engine.serving.lane import in_own_thread
from tmm_engine.serving.requests import SearchParameters


def changed(query: Query, asked: SearchParameters) -> Query:
    """The query blurred, then darkened, then made noisy, as a picture of 8 bits; itself where nothing is asked for.

    Args:
        query: Pixels in the index's shape.
        asked: By how much; the same noise for the same seed and shape.
    """
    if not (asked.darken or asked.blur or asked.noise):
        return query
    pixels = query.pixels
    if asked.blur:
        sigma = asked.blur * min(pixels.shape[1:])
        pixels = in_own_thread(partial(blur, torch.from_numpy(pixels)[None], sigma))[0].numpy()
    pixels = pixels * np.float32(1 - asked.darken)
    if asked.noise:
        drawn = np.random.default_rng(asked.seed).standard_normal(pixels.shape, dtype=np.float32)
        pixels = pixels + np.float32(asked.noise) * drawn
    levels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    return replace(query, pixels=levels.astype(np.float32) / np.float32(255))
