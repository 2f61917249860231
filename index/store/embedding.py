"""A source's images with their features, batch by batch: for indexes on disk and in memory alike."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8

from tmm_engine.index.agreement import Agreement, Tally
from tmm_engine.index.batches import forward_batch_size, prefetched
from tmm_engine.index.columns import FEATURE, FeatureColumn
from tmm_engine.index.errors import ImageError, InputError, ModelError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.adapted import AdaptedSource
from tmm_engine.index.sources.records import ImageRecord, UnreadableImage

T = TypeVar("T")

MAX_REPORTED = 20
INDIGESTIBLE = "the model's features of this image are not finite numbers (is the image constant?)"
OTHER_READING = (
    "warning: the predictions agree with {:.0%} of the labels as their names were read, and with {:.0%} the other way: "
    "most likely that is what is meant. Give the names of the model's classes, in their order (`class_names=…`)"
)


@dataclass(slots=True)
class BuildReport:
    """What a build did.

    Attributes:
        exemplars: How many images the index holds.
        skipped: Images that could not be read, with reasons; the first MAX_REPORTED of them.
        skipped_count: How many in all.
        labels_predicted: True if the source had no labels and the model's predictions stand in.
        remarks: What was guessed, left out or converted, of the classifier and of the source, in sentences.
        agreement: Of the model's predictions with the labels; None until the end.
    """

    exemplars: int = 0
    skipped: list[UnreadableImage] = field(default_factory=list)
    skipped_count: int = 0
    labels_predicted: bool = False
    remarks: tuple[str, ...] = ()
    agreement: Agreement | None = None

    def skip(self, image: UnreadableImage) -> None:
        """Count an unreadable image."""
        self.skipped_count += 1
        if len(self.skipped) < MAX_REPORTED:
            self.skipped.append(image)


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedBatch:
    """Exemplars as a store takes them.

    Attributes:
        records: Their ids, labels and metadata.
        images: Stacked.
        features: By name of the column.
        predicted: The model's classes.
    """

    records: list[ImageRecord]
    images: UInt8[np.ndarray, "n c h w"]
    features: Mapping[str, Float32[np.ndarray, "n _"]]
    predicted: Int64[np.ndarray, "n"]

    @property
    def given(self) -> Bool[np.ndarray, "n"]:
        """Which have a label of their own."""
        return np.array([record.label is not None for record in self.records], dtype=np.bool_)

    @property
    def labels(self) -> Int64[np.ndarray, "n"]:
        """The labels, and where there are none the predicted classes."""
        pairs = zip(self.records, self.predicted.tolist(), strict=True)
        return np.array([said if record.label is None else record.label for record, said in pairs], dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of the images of a batch, for whoever counts them.

    Attributes:
        ids: Of those that are exemplars now, in order; so are the following.
        labels: Theirs.
        given: Which of these are their own.
        predicted: The model's classes.
        left_out: Those that could not be read, and after them those that the model cannot digest.
        indigestible: How many of these are of the second kind.
    """

    ids: list[str]
    labels: Int64[np.ndarray, "n"]
    given: Bool[np.ndarray, "n"]
    predicted: Int64[np.ndarray, "n"]
    left_out: list[UnreadableImage]
    indigestible: int


class Intake:
    """Checks and counts what comes in, batch by batch, in the order of the source.

    Args:
        source: Where it comes from, in the terms of the index.
        classifier: Embeds it.
        report: Where exemplars, skipped images and agreement are counted, and what should be known is noted.
        strict: Fail at the first image that is left out.
    """

    def __init__(self, source: AdaptedSource, classifier: Classifier, report: BuildReport, *, strict: bool) -> None:
        self._source, self._classifier, self._report, self._strict = source, classifier, report, strict
        self._seen: set[str] = set()
        self._indigestible = 0
        self._tally, self._otherwise = Tally(source.labels.vocabulary), Tally(source.labels.vocabulary)
        report.labels_predicted = not source.labelled

    def take(self, outcome: Outcome) -> None:
        """Count the next batch.

        Raises:
            InputError: an id is there twice, or, with `strict`, an image is left out.
        """
        for id_ in outcome.ids:
            _check_new(id_, self._seen)
            self._seen.add(id_)
        for image in outcome.left_out:
            pass_over(image, self._report, strict=self._strict)
        self._indigestible += outcome.indigestible
        self._report.exemplars += len(outcome.ids)
        self._tally.count(outcome.labels, outcome.given, outcome.predicted)
        otherwise = self._source.labels.read_otherwise(outcome.labels)
        self._otherwise.count(otherwise, outcome.given, outcome.predicted)

    def finish(self) -> None:
        """Say what is to be said of all of it.

        Raises:
            InputError: no image could be read.
            ModelError: the features of most images are not finite.
        """
        report, name = self._report, self._source.name
        if self._indigestible > report.exemplars:
            raise ModelError(
                f"{name}: the model's features are not finite numbers for {self._indigestible:,} of "
                f"{self._indigestible + report.exemplars:,} images; check the weights and what the model does to its "
                f"input"
            )
        if not report.exemplars:
            reasons = "".join(f"\n  {image.id}: {image.reason}" for image in report.skipped)
            raise InputError(f"{name}: no image could be read, nothing to index{reasons}")
        report.remarks = (*self._classifier.notes, *self._source.remarks)
        report.agreement, otherwise = self._tally.result(), self._otherwise.result()
        if otherwise.agreeing > report.agreement.agreeing:
            report.remarks += (OTHER_READING.format(report.agreement.share, otherwise.share),)


def embedded(
    source: AdaptedSource,
    classifier: Classifier,
    columns: Sequence[FeatureColumn],
    report: BuildReport,
    *,
    strict: bool = False,
) -> Iterator[EmbeddedBatch]:
    """All readable images of the source with their features, batch by batch; the next batch is decoded meanwhile.

    Args:
        source: The images, in the terms of the index; decoded to `classifier.target`.
        classifier: Its predictions stand in where there are no labels.
        columns: What is computed, φ(x) among it.
        report: Exemplars, skipped images and agreement are counted here, and what should be known is noted.
        strict: Fail at the first image that cannot be read, or that the model cannot digest, instead of skipping it.

    Raises:
        InputError: no image can be read, an id is there twice, a label is out of range, or, with `strict`, an image is
            unreadable.
        ModelError: the features of most images are not finite.
    """
    intake = Intake(source, classifier, report, strict=strict)
    for batch, outcome in embedded_batches(source, classifier, columns):
        intake.take(outcome)
        if batch is not None:
            yield batch
    intake.finish()


def embedded_batches(
    source: AdaptedSource, classifier: Classifier, columns: Sequence[FeatureColumn]
) -> Iterator[tuple[EmbeddedBatch | None, Outcome]]:
    """The exemplars of each batch, None where there are none, and what became of its images.

    Batches are cut by the places of images in the source, whether or not these can be read: what is computed of an
    image, to the last bit, does not depend on what others are like.

    Args:
        source: As for `embedded`, and so are the others.
        classifier: See there.
        columns: See there.
    """
    for items in prefetched(grouped(source.read(classifier.target), forward_batch_size(classifier.image_shape))):
        records = [item for item in items if isinstance(item, ImageRecord)]
        unreadable = [item for item in items if not isinstance(item, ImageRecord)]
        if not records:
            yield None, _nothing(unreadable, 0)
            continue
        batch, bad = embed_records(records, classifier, columns)
        if not batch.records:
            yield None, _nothing([*unreadable, *bad], len(bad))
            continue
        ids = [record.id for record in batch.records]
        left_out = [*unreadable, *bad]
        yield batch, Outcome(ids, batch.labels, batch.given, batch.predicted, left_out, len(bad))


def _nothing(left_out: list[UnreadableImage], indigestible: int) -> Outcome:
    """Of images none of which is an exemplar."""
    return Outcome([], np.empty(0, np.int64), np.empty(0, np.bool_), np.empty(0, np.int64), left_out, indigestible)


def embed_records(
    records: list[ImageRecord], classifier: Classifier, columns: Sequence[FeatureColumn]
) -> tuple[EmbeddedBatch, list[UnreadableImage]]:
    """(the images with their features, those of which the model makes numbers that are not finite)."""
    images = np.stack([record.image for record in records])
    features = {column.name: column.compute(images) for column in columns}
    finite = np.logical_and.reduce([np.isfinite(computed).all(axis=1) for computed in features.values()])
    bad = [UnreadableImage(records[row].id, INDIGESTIBLE) for row in np.flatnonzero(~finite)]
    if bad:
        records, images = [records[row] for row in np.flatnonzero(finite)], images[finite]
        features = {name: computed[finite] for name, computed in features.items()}
    return EmbeddedBatch(records, images, features, predict(features[FEATURE], classifier)), bad


def predict(features: Float32[np.ndarray, "n d"], classifier: Classifier) -> Int64[np.ndarray, "n"]:
    """The classifier's predictions on features."""
    with torch.inference_mode():
        return classifier.logits(torch.from_numpy(features).to(classifier.device)).argmax(dim=1).cpu().numpy()


def readable_records(
    source: AdaptedSource, classifier: Classifier, report: BuildReport, *, strict: bool
) -> Iterator[ImageRecord]:
    """The source's readable images, checked, in the classifier's shape; the report counts others and has what was said.

    Raises:
        InputError: an id is there twice, a label is out of range, or, with `strict`, an image is unreadable.
    """
    seen: set[str] = set()
    for record in source.read(classifier.target):
        if isinstance(record, ImageRecord):
            _check_new(record.id, seen)
            seen.add(record.id)
            yield record
        else:
            pass_over(record, report, strict=strict)
    report.remarks = (*classifier.notes, *source.remarks)


def _check_new(id_: str, seen: Set[str]) -> None:
    if id_ in seen:
        raise InputError(f"expected different ids, got {id_!r} twice; make the source's ids unique")


def pass_over(image: UnreadableImage, report: BuildReport, *, strict: bool) -> None:
    """Count an image that is left out; with `strict` it is an error."""
    if strict:
        raise ImageError(f"{image.id}: {image.reason} (without `strict=True` it would be skipped)")
    report.skip(image)


def grouped(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """The items in order, so many at a time."""
    while group := list(islice(items, size)):
        yield group
