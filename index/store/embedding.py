"""A source's images with their features, batch by batch: for indexes on disk and in memory alike."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8

from tmm_engine.index.batches import forward_batch_size, prefetched
from tmm_engine.index.columns import FEATURE, FeatureColumn
from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.records import ImageRecord, ImageSource, UnreadableImage, remarks_of

MAX_REPORTED = 20


@dataclass(slots=True)
class BuildReport:
    """What a build did.

    Attributes:
        exemplars: How many images the index holds.
        skipped: Images that could not be read, with reasons; the first MAX_REPORTED of them.
        skipped_count: How many in all.
        labels_predicted: True if the source had no labels and the model's predictions stand in.
        remarks: What the source guessed, left out or converted, in sentences.
    """

    exemplars: int = 0
    skipped: list[UnreadableImage] = field(default_factory=list)
    skipped_count: int = 0
    labels_predicted: bool = False
    remarks: tuple[str, ...] = ()

    def skip(self, image: UnreadableImage) -> None:
        """Count an unreadable image."""
        self.skipped_count += 1
        if len(self.skipped) < MAX_REPORTED:
            self.skipped.append(image)


@dataclass(frozen=True, slots=True)
class EmbeddedBatch:
    """Exemplars as a store takes them: records, their images and features stacked, and labels, given or predicted."""

    records: list[ImageRecord]
    images: UInt8[np.ndarray, "n c h w"]
    features: Mapping[str, Float32[np.ndarray, "n _"]]
    labels: Int64[np.ndarray, "n"]


def embedded(
    source: ImageSource,
    classifier: Classifier,
    columns: Sequence[FeatureColumn],
    report: BuildReport,
    *,
    strict: bool = False,
) -> Iterator[EmbeddedBatch]:
    """All readable images of the source with their features, batch by batch; the next batch is decoded meanwhile.

    Args:
        source: The images; decoded to `classifier.target`.
        classifier: Its predictions stand in where there are no labels.
        columns: What is computed, φ(x) among it.
        report: Exemplars and skipped images are counted here.
        strict: Fail at the first image that cannot be read instead of skipping it.

    Raises:
        InputError: no image can be read, an id is there twice, a label is out of range, features are not finite, or,
            with `strict`, an image is unreadable.
    """
    records = readable_records(source, classifier, report, strict=strict)
    for batch in prefetched(grouped(records, forward_batch_size(classifier.image_shape))):
        done = embed_records(batch, source, classifier, columns)
        report.exemplars += len(batch)
        yield done
    if not report.exemplars:
        reasons = "".join(f"\n  {image.id}: {image.reason}" for image in report.skipped)
        raise InputError(f"{source.name}: no image could be read, nothing to index{reasons}")


def embed_records(
    records: list[ImageRecord], source: ImageSource, classifier: Classifier, columns: Sequence[FeatureColumn]
) -> EmbeddedBatch:
    """A batch of the source's images with their features.

    Raises:
        InputError: features are not finite.
    """
    images = np.stack([record.image for record in records])
    features = {column.name: column.compute(images) for column in columns}
    for computed in features.values():
        _check_finite(computed, records)
    return with_features(records, images, features, source, classifier)


def with_features(
    records: list[ImageRecord],
    images: UInt8[np.ndarray, "n c h w"],
    features: Mapping[str, Float32[np.ndarray, "n _"]],
    source: ImageSource,
    classifier: Classifier,
) -> EmbeddedBatch:
    """A batch of the source's images whose features are known: labels are given, or predicted of them."""
    given = [record.label for record in records]
    labels = np.array(given, dtype=np.int64) if source.labelled else predict(features[FEATURE], classifier)
    return EmbeddedBatch(records, images, features, labels)


def check_fit(source: ImageSource, classifier: Classifier) -> None:
    """Refuse a source with other classes than the classifier's.

    Raises:
        InputError: the number of classes differs.
    """
    if source.labelled and source.class_names and len(source.class_names) != classifier.num_classes:
        raise InputError(
            f"{source.name} has {len(source.class_names)} classes, the model's head has {classifier.num_classes}: "
            f"labels would not mean what the model predicts; use the data set the model was trained on, or a "
            f"flat folder"
        )


def predict(features: Float32[np.ndarray, "n d"], classifier: Classifier) -> Int64[np.ndarray, "n"]:
    """The classifier's predictions on features."""
    with torch.inference_mode():
        return classifier.logits(torch.from_numpy(features).to(classifier.device)).argmax(dim=1).cpu().numpy()


def readable_records(
    source: ImageSource, classifier: Classifier, report: BuildReport, *, strict: bool
) -> Iterator[ImageRecord]:
    """The source's readable images, checked, in the classifier's shape; the report counts others and has its remarks.

    Raises:
        InputError: an id is there twice, a label is out of range, or, with `strict`, an image is unreadable.
    """
    seen: set[str] = set()
    for record in source.read(classifier.target):
        if isinstance(record, ImageRecord):
            _check_label(record, classifier)
            _check_new(record, seen)
            seen.add(record.id)
            yield record
        elif strict:
            raise ImageError(f"{record.id}: {record.reason} (without `strict=True` it would be skipped)")
        else:
            report.skip(record)
    report.remarks = remarks_of(source)


def _check_label(record: ImageRecord, classifier: Classifier) -> None:
    if record.label is not None and not 0 <= record.label < classifier.num_classes:
        raise InputError(
            f"{record.id}: label {record.label}, but the model's head has {classifier.num_classes} classes "
            f"(0 to {classifier.num_classes - 1}): is this the data set the model was trained on?"
        )


def _check_new(record: ImageRecord, seen: Set[str]) -> None:
    if record.id in seen:
        raise InputError(f"expected different ids, got {record.id!r} twice; make the source's ids unique")


def _check_finite(features: Float32[np.ndarray, "n d"], records: list[ImageRecord]) -> None:
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise InputError(f"{records[row].id}: the model's features are not finite numbers; check the weights")


def grouped(records: Iterator[ImageRecord], size: int) -> Iterator[list[ImageRecord]]:
    """The records in order, so many at a time."""
    while group := list(islice(records, size)):
        yield group
