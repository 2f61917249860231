"""A source's images with their features, batch by batch: for indexes on disk and in memory alike."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice

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


@dataclass(frozen=True, slots=True)
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
    report.labels_predicted = not source.labelled
    tally, otherwise, indigestible = Tally(source.labels.vocabulary), Tally(source.labels.vocabulary), 0
    records = readable_records(source, classifier, report, strict=strict)
    for group in prefetched(grouped(records, forward_batch_size(classifier.image_shape))):
        batch, bad = embed_records(group, classifier, columns)
        indigestible += len(bad)
        for image in bad:
            pass_over(image, report, strict=strict)
        if batch.records:
            report.exemplars += len(batch.records)
            tally.count(batch.labels, batch.given, batch.predicted)
            otherwise.count(source.labels.read_otherwise(batch.labels), batch.given, batch.predicted)
            yield batch
    if indigestible > report.exemplars:
        raise ModelError(
            f"{source.name}: the model's features are not finite numbers for {indigestible:,} of "
            f"{indigestible + report.exemplars:,} images; check the weights and what the model does to its input"
        )
    if not report.exemplars:
        reasons = "".join(f"\n  {image.id}: {image.reason}" for image in report.skipped)
        raise InputError(f"{source.name}: no image could be read, nothing to index{reasons}")
    report.agreement = tally.result()
    if otherwise.result().agreeing > report.agreement.agreeing:
        report.remarks += (OTHER_READING.format(report.agreement.share, otherwise.result().share),)


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
            _check_new(record, seen)
            seen.add(record.id)
            yield record
        else:
            pass_over(record, report, strict=strict)
    report.remarks = (*classifier.notes, *source.remarks)


def _check_new(record: ImageRecord, seen: Set[str]) -> None:
    if record.id in seen:
        raise InputError(f"expected different ids, got {record.id!r} twice; make the source's ids unique")


def pass_over(image: UnreadableImage, report: BuildReport, *, strict: bool) -> None:
    """Count an image that is left out; with `strict` it is an error."""
    if strict:
        raise ImageError(f"{image.id}: {image.reason} (without `strict=True` it would be skipped)")
    report.skip(image)


def grouped(records: Iterator[ImageRecord], size: int) -> Iterator[list[ImageRecord]]:
    """The records in order, so many at a time."""
    while group := list(islice(records, size)):
        yield group
