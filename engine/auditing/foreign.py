"""Foreign images: what the model does not know, and what looks like what it does not know.

The statistic is the energy −log Σ exp logits (Liu et al., NeurIPS 2020) of an image, plus the mean of its nearest by
the recogniser, which sees texture and layout rather than classes. Where a foreign image is alone, its own energy tells;
where there are many, they are each other's neighbours, and a distance to the k-th neighbour, which takes them for a
dense region, says nothing.
"""

import numpy as np
import torch
from jaxtyping import Float64

from tmm_engine.index.columns import FEATURE
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.graph import NeighbourGraph
from tmm_engine.index.store.exemplars import ExemplarStore

HEARD = 10  # neighbours
READ = 8192


def logits_of(store: ExemplarStore, classifier: Classifier) -> Float64[np.ndarray, "n c"]:
    """The model's, of the stored features."""
    with torch.inference_mode():
        parts = [
            classifier.logits(torch.from_numpy(features.copy()).to(classifier.device)).double().cpu()
            for features in store.scan_features(READ, column=FEATURE)
        ]
    return torch.cat(parts).numpy()


def energies(logits: Float64[np.ndarray, "n c"]) -> Float64[np.ndarray, "n"]:
    """−log Σ exp; larger is less known."""
    return -torch.logsumexp(torch.from_numpy(logits), dim=1).numpy()


def strangeness(energy: Float64[np.ndarray, "n"], graph: NeighbourGraph) -> Float64[np.ndarray, "n"]:
    """An image's energy and its neighbours', as a sum."""
    return energy + energy[graph.rows[:, :HEARD]].mean(axis=1)
