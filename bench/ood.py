"""Foreign exemplars mixed in: how often does one outrank the true exemplar? (§3.4.6.)

The query is a perturbed exemplar, which stays in the set. With M foreign exemplars in it the paper bounds the
probability that any of them outranks the true one by

    M · exp(−Δ² / 2σ²)

==============  ==================================================================================================
symbol          estimated here, for each query, perturbation and method by itself
==============  ==================================================================================================
M               how many foreign exemplars there are
Δ               the true exemplar's score minus the mean of the foreign exemplars' scores
σ               the standard deviation of the foreign exemplars' scores
==============  ==================================================================================================

This is a union bound over Gaussian tails: it assumes that foreign scores are Gaussian (or have tails no heavier), which
nothing guarantees, and Δ and σ come from the very scores whose order is observed. So an observed rate above the bound
says that the assumption fails, not that the bound's proof does. Clipped to [0, 1]; where Δ is not above 0 it says
nothing, and is 1.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64, UInt8

from tmm_engine.bench.noise import Perturbation
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.retrievers import Retriever, rank_of
from tmm_engine.bench.self_retrieval import scores_under
from tmm_engine.bench.suite import Suite
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.images import Shape
from tmm_engine.index.sources.records import ImageRecord, ImageSource
from tmm_engine.index.store.building import embed, predict
from tmm_engine.index.store.exemplars import FEATURE, STRETCHED_FEATURE
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank.contrast import embed_stretched

KEY = ("query", "level", "method", "foreign")
NOISE = "noise"  # the name of foreign exemplars of uniform noise


def noise_images(count: int, shape: Shape, *, seed: int) -> UInt8[np.ndarray, "m c h w"]:
    """Images of independent uniform pixels."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def foreign_images(
    source: ImageSource, count: int, shape: Shape, *, seed: int, progress: Progress = silent
) -> UInt8[np.ndarray, "m c h w"]:
    """A seeded random subset of a source's readable images, brought to a shape; all where there are fewer.

    Raises:
        InputError: no image can be read.
    """
    images: list[UInt8[np.ndarray, "c h w"]] = []
    for record in source.read(shape):
        if isinstance(record, ImageRecord):
            images.append(record.image)
        progress("reading foreign images", len(images), len(source))
    if not images:
        raise InputError(f"{source.name}: no image could be read")
    return np.stack([images[row] for row in np.random.default_rng(seed).permutation(len(images))[:count]])


def mixed(suite: Suite, foreign: UInt8[np.ndarray, "m c h w"]) -> MemoryStore:
    """The suite's exemplars in their rows, and behind them the foreign ones, labelled as the model sees them."""
    store, step = suite.store, forward_batch_size(suite.classifier.image_shape)
    rows = np.arange(len(store))
    parts = [foreign[start : start + step] for start in range(0, len(foreign), step)]
    features = np.concatenate([embed(part, suite.classifier) for part in parts])
    stretched = np.concatenate([embed_stretched(part, suite.classifier) for part in parts])
    return MemoryStore(
        np.concatenate([store.images(rows), foreign]),
        {
            FEATURE: np.concatenate([store.features(rows), features]),
            STRETCHED_FEATURE: np.concatenate([store.features(rows, column=STRETCHED_FEATURE), stretched]),
        },
        np.concatenate([store.labels, predict(features, suite.classifier)]),
        ids=[*(str(id_) for id_ in store.ids), *(f"foreign/{number:08d}" for number in range(len(foreign)))],
        label_is_predicted=np.arange(len(store) + len(foreign)) >= len(store),
    )


def outranking_bound(true: float, foreign: Float[np.ndarray, "m"]) -> float:
    """M · exp(−Δ² / 2σ²), clipped to [0, 1], with Δ and σ as the module estimates them; 1 where Δ is not above 0.

    Args:
        true: The true exemplar's score.
        foreign: The foreign exemplars' scores, at least one.
    """
    precise = foreign.astype(np.float64)
    gap, sigma = true - float(precise.mean()), float(precise.std())
    if gap <= 0:
        return 1.0
    return min(1.0, len(foreign) * math.exp(-(gap**2) / (2 * sigma**2))) if sigma > 0 else 0.0


def measure_foreign(
    retrievers: Sequence[Retriever],
    queries: Int64[np.ndarray, "q"],
    store: MemoryStore,
    perturbations: Sequence[Perturbation],
    record_file: RecordFile,
    *,
    foreign: str,
    foreign_count: int,
    classifier: Classifier,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Append a record for every query × perturbation × method that has none yet.

    A record holds ``level`` (the perturbation's name), ``foreign``, ``foreign_count`` (M), ``outranked`` (how many
    foreign exemplars come before the true one, ties by id) and ``bound``.

    Args:
        retrievers: Over the mixed store.
        queries: Rows of true exemplars.
        store: As `mixed` makes it: the foreign exemplars last.
        perturbations: What is done to each query.
        record_file: Opened with KEY.
        foreign: What the foreign exemplars are called.
        foreign_count: How many there are.
        classifier: Whose features PGD moves.
        seed: Of the noise; each query draws its own, the same as in self-retrieval.
        progress: Told of searches done.
    """
    first = len(store) - foreign_count
    total, done = len(queries) * len(perturbations), 0
    for row in queries.tolist():
        image = store.images(np.array([row]))[0].astype(np.float32) / np.float32(255.0)
        noise = int(np.random.SeedSequence((seed, row)).generate_state(1)[0])
        beside = np.array([row, *range(first, len(store))])  # the true exemplar and its foreign rivals
        for perturbation in perturbations:
            key = {"query": str(store.ids[row]), "level": perturbation.name, "foreign": foreign}
            missing = [one for one in retrievers if not record_file.done(**key, method=one.name)]
            for retriever, scores in scores_under(perturbation, image, missing, seed=noise, classifier=classifier):
                rivals = scores[beside]
                found = {
                    "outranked": rank_of(rivals, store.ids[beside], 0),
                    "foreign_count": foreign_count,
                    "bound": outranking_bound(float(rivals[0]), rivals[1:]),
                }
                record_file.append(key | {"method": retriever.name} | found)
            done += 1
            progress("searching", done, total)
