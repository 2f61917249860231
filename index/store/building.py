"""`build_index`: images -> features -> store, streamed, with progress, all or nothing."""

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8

from tmm_engine.index.batches import forward_batch_size, prefetched
from tmm_engine.index.errors import ImageError, IndexStateError, InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import EXACT, make_faiss_index
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import ImageRecord, ImageSource, UnreadableImage
from tmm_engine.index.store.exemplars import FEATURE, GLOBAL_FEATURE, STRETCHED_FEATURE
from tmm_engine.index.store.lance_store import LanceWriter, exemplar_schema, fixed_size_column
from tmm_engine.index.store.manifest import EXEMPLARS, GLOBAL_TRIGGER, MODEL, FileDigest, Manifest, digest_files
from tmm_engine.index.store.target import check_target, staged

MAX_REPORTED = 20


@runtime_checkable
class GlobalColumn(Protocol):
    """More columns of features, made with one trigger for all exemplars."""

    def columns(self, images: UInt8[np.ndarray, "n c h w"]) -> dict[str, Float32[np.ndarray, "n d"]]:
        """GLOBAL_FEATURE and STRETCHED_FEATURE of the images as stored."""

    def save(self, path: Path) -> None:
        """Write what made them."""


@dataclass(slots=True)
class BuildReport:
    """What a build did.

    Attributes:
        exemplars: How many images the index holds.
        skipped: Images that could not be read, with reasons; the first MAX_REPORTED of them.
        skipped_count: How many in all.
        labels_predicted: True if the source had no labels and the model's predictions stand in.
    """

    exemplars: int = 0
    skipped: list[UnreadableImage] = field(default_factory=list)
    skipped_count: int = 0
    labels_predicted: bool = False

    def skip(self, image: UnreadableImage) -> None:
        """Count an unreadable image."""
        self.skipped_count += 1
        if len(self.skipped) < MAX_REPORTED:
            self.skipped.append(image)


def build_index(
    source: ImageSource,
    target: Path,
    classifier: Classifier,
    *,
    overwrite: bool = False,
    neighbours: str = EXACT,
    strict: bool = False,
    global_column: GlobalColumn | None = None,
    progress: Progress = silent,
) -> BuildReport:
    """Build an index of the source's images. It appears at `target` whole, or not at all.

    Args:
        source: The images; decoded to `classifier.image_shape`.
        target: The index's folder; its parent must exist.
        classifier: Computes the features; stored in the index.
        overwrite: Replace an index that is there; it stays usable until the moment of the exchange.
        neighbours: FAISS factory string for L2 and cosine search; ``Flat`` is exact.
        strict: Fail at the first image that cannot be read instead of skipping it.
        global_column: Also store these features of the images (`rerank.global_trigger`).
        progress: Told of images done.

    Raises:
        IndexStateError: the target is in the way, not writable, full, or being built by another process.
        InputError: source and classifier do not fit, the source is empty, an id is there twice, a label is out of
            range, or, with `strict`, an image is unreadable.
    """
    check_build(source, target, classifier, overwrite=overwrite, neighbours=neighbours)
    report = BuildReport(labels_predicted=not source.labelled)
    try:
        with staged(target, overwrite=overwrite) as staging:
            schema = exemplar_schema(
                classifier.image_shape,
                dict.fromkeys(
                    (FEATURE, *((GLOBAL_FEATURE, STRETCHED_FEATURE) if global_column else ())), classifier.feature_dim
                ),
                source.metadata_types,
            )
            writer = LanceWriter(staging / EXEMPLARS, schema)
            for batch in embedded(source, classifier, report, strict=strict):
                writer.write(batch.columns(source) | global_columns(batch, global_column))
                progress("building", report.exemplars + report.skipped_count, len(source))
            version = writer.commit()
            classifier.save(staging / MODEL)
            if global_column is not None:
                global_column.save(staging / GLOBAL_TRIGGER)
            manifest = _manifest(
                source, classifier, report, neighbours=neighbours, version=version, files=digest_files(staging)
            )
            manifest.write(staging)
    except OSError as error:
        raise IndexStateError(f"{target} cannot be written: {error.strerror or error}; nothing was changed") from error
    return report


@dataclass(frozen=True, slots=True)
class EmbeddedBatch:
    """Exemplars as a store takes them: records, their images and features stacked, and labels, given or predicted."""

    records: list[ImageRecord]
    images: UInt8[np.ndarray, "n c h w"]
    features: Float32[np.ndarray, "n d"]
    labels: Int64[np.ndarray, "n"]

    def columns(self, source: ImageSource) -> dict[str, object]:
        """The columns of `exemplar_schema`."""
        return {
            "id": [record.id for record in self.records],
            "label": self.labels,
            "label_is_predicted": [not source.labelled] * len(self.records),
            "image": fixed_size_column(self.images),
            FEATURE: fixed_size_column(self.features),
        } | {name: [record.metadata.get(name) for record in self.records] for name in source.metadata_types}


def global_columns(batch: EmbeddedBatch, global_column: GlobalColumn | None) -> dict[str, object]:
    """The other columns of features, as `exemplar_schema` has them; nothing where there are none."""
    columns = {} if global_column is None else global_column.columns(batch.images)
    for features in columns.values():
        _check_finite(features, batch.records)
    return {name: fixed_size_column(features) for name, features in columns.items()}


def embedded(
    source: ImageSource, classifier: Classifier, report: BuildReport, *, strict: bool = False
) -> Iterator[EmbeddedBatch]:
    """All readable images of the source with their features, batch by batch; the next batch is decoded meanwhile.

    Counts exemplars and skipped images in `report`. Raises as `build_index`.
    """
    records = _readable(source, classifier, report, strict=strict)
    for batch in prefetched(_batches(records, forward_batch_size(classifier.image_shape))):
        images = np.stack([record.image for record in batch])
        features = embed(images, classifier)
        _check_finite(features, batch)
        given = [record.label for record in batch]
        labels = np.array(given, dtype=np.int64) if source.labelled else predict(features, classifier)
        report.exemplars += len(batch)
        yield EmbeddedBatch(batch, images, features, labels)
    if not report.exemplars:
        reasons = "".join(f"\n  {image.id}: {image.reason}" for image in report.skipped)
        raise InputError(f"{source.name}: no image could be read, nothing to index{reasons}")


def check_build(
    source: ImageSource, target: Path, classifier: Classifier, *, overwrite: bool = False, neighbours: str = EXACT
) -> None:
    """Everything about a build that can be refused before any work; raises as `build_index`."""
    check_target(target, overwrite=overwrite)
    check_fit(source, classifier)
    make_faiss_index(classifier.feature_dim, Metric.L2, neighbours)


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


def embed(images: UInt8[np.ndarray, "n c h w"], classifier: Classifier) -> Float32[np.ndarray, "n d"]:
    """φ of stored images, in one pass."""
    with torch.inference_mode():
        pixels = torch.from_numpy(images).to(classifier.device).float() / 255.0
        return classifier.features(pixels).float().cpu().numpy()


def predict(features: Float32[np.ndarray, "n d"], classifier: Classifier) -> Int64[np.ndarray, "n"]:
    """The classifier's predictions on features."""
    with torch.inference_mode():
        return classifier.logits(torch.from_numpy(features).to(classifier.device)).argmax(dim=1).cpu().numpy()


def _readable(
    source: ImageSource, classifier: Classifier, report: BuildReport, *, strict: bool
) -> Iterator[ImageRecord]:
    seen: set[str] = set()
    for record in source.read(classifier.image_shape):
        if isinstance(record, ImageRecord):
            _check_label(record, classifier)
            _check_new(record, seen)
            seen.add(record.id)
            yield record
        elif strict:
            raise ImageError(f"{record.id}: {record.reason} (without --strict it would be skipped)")
        else:
            report.skip(record)


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


def _batches(records: Iterator[ImageRecord], size: int) -> Iterator[list[ImageRecord]]:
    batch: list[ImageRecord] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _manifest(
    source: ImageSource,
    classifier: Classifier,
    report: BuildReport,
    *,
    neighbours: str,
    version: int,
    files: dict[str, FileDigest],
) -> Manifest:
    return Manifest(
        version=1,
        change=f"built from {source.name}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=source.name,
        exemplars=report.exemplars,
        skipped=report.skipped_count,
        image_shape=classifier.image_shape,
        feature_dim=classifier.feature_dim,
        class_names=source.class_names if source.labelled and source.class_names else classifier.class_names,
        labels_predicted=report.labels_predicted,
        model=classifier.spec,
        fingerprint=classifier.fingerprint,
        neighbours=neighbours,
        global_trigger=GLOBAL_TRIGGER in files,
        backend_speeds={},
        lance_version=version,
        files=files,
    )
