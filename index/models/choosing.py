"""Of several readings of one checkpoint the one whose predictions agree with the labels, where one clearly does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tmm_engine.index.agreement import Tally
from tmm_engine.index.arguments import checked
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.adapted import AdaptedSource
from tmm_engine.index.sources.opening import SourceLike, as_source
from tmm_engine.index.sources.records import ImageRecord, ImageSource
from tmm_engine.index.sources.sampling import sampled

COMPARED = 256  # images that readings are compared on
CLEARLY = 0.1  # by so much more of the labels the best one must agree with than any other
AT_ONCE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What the labels say of several readings.

    Attributes:
        classifier: The one that they tell for, the choice among its notes; None where they do not tell.
        shares: Of the labels with which each reading's predictions agree, by its name; empty without labels.
        images: How many were looked at.
    """

    classifier: Classifier | None
    shares: Mapping[str, float]
    images: int


@checked
def settled(readings: Mapping[str, Classifier], source: SourceLike) -> Choice:
    """Compare the readings' predictions with the labels of a sample of the source.

    One is chosen if it agrees with a tenth of the labels more than every other, and with twice as many as guessing.

    Args:
        readings: By what is said of each, as in ``{"with a max-pool": a, "without a max-pool": b}``; at least two, of
            images of one kind.
        source: As `build_index` takes it; its labels are matched as there.

    Raises:
        InputError: fewer than two readings, readings that take other images than the first, or a source of which no
            image can be read.
    """
    if len(readings) < 2:
        raise InputError(f"expected at least two readings to choose from, got {len(readings)}")
    source = as_source(source)
    target = next(iter(readings.values())).target
    if other := [name for name, each in readings.items() if each.target != target]:
        raise InputError(f"expected readings of images of one kind, {target}, got {other[0]!r} of another")
    drawn = sampled(source, target, COMPARED) if source.labelled else []
    sample = [record for record in drawn if record.label is not None]
    if not sample:
        return Choice(None, {}, 0)
    shares = {name: _share(source, each, sample) for name, each in readings.items()}
    second, best = sorted(shares, key=shares.__getitem__)[-2:]
    chosen = readings[best]
    if shares[best] - shares[second] < CLEARLY or shares[best] < 2 / chosen.num_classes:
        return Choice(None, shares, len(sample))
    note = (
        f"{best}: the model then agrees with {shares[best]:.0%} of the labels of {len(sample):,} images, else with "
        f"{shares[second]:.0%}"
    )
    return Choice(replace(chosen, max_pool_assumed=False, notes=(*chosen.notes, note)), shares, len(sample))


@torch.no_grad()
def _share(source: ImageSource, classifier: Classifier, sample: Sequence[ImageRecord]) -> float:
    """Of the labels that are classes of the model's; 0 where none is."""
    images = torch.from_numpy(np.stack([record.image for record in sample])).split(AT_ONCE)
    predicted = [classifier.logits(classifier.features(part.to(classifier.device).float() / 255)) for part in images]
    matched = AdaptedSource.of_new_index(source, classifier.class_names, named=classifier.names_given).labels
    labels = [matched.label(record.label, record.id) for record in sample]
    numbers = np.array([0 if label is None else label for label in labels], dtype=np.int64)
    tally = Tally(matched.vocabulary)
    tally.count(
        numbers, np.array([label is not None for label in labels]), torch.cat(predicted).argmax(1).cpu().numpy()
    )
    return tally.result().share or 0.0
