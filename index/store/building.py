"""`write_index`: images -> features -> store, streamed, with progress, all or nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import lance
import pyarrow as pa
from lance.fragment import FragmentMetadata

from tmm_engine.index.columns import FeatureColumn, PlainColumn
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.factories import EXACT, check_trainable, fitting_dimension, make_faiss_index
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.adapted import AdaptedSource
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.store.embedding import BuildReport, embedded
from tmm_engine.index.store.lance_store import LanceWriter, committed, exemplar_schema, files_of, stored_columns
from tmm_engine.index.store.manifest import DATA, EXEMPLARS, MODEL, FileDigest, Manifest, digest_files
from tmm_engine.index.store.target import check_target, staged


@dataclass(frozen=True, slots=True, eq=False)
class BuildJob:
    """What is to be embedded and written: all that whoever does it needs to know.

    Attributes:
        folder: The index that is being made; what model and columns are loaded from is there already.
        source: The images, in the terms of the index; decoded to `classifier.target`.
        classifier: The index's.
        columns: What is computed, φ(x) first.
        schema: Of the rows.
        report: Where exemplars, skipped images and agreement are counted.
        strict: Fail at the first image that cannot be read.
        progress: Told of images done.
    """

    folder: Path
    source: AdaptedSource
    classifier: Classifier
    columns: Sequence[FeatureColumn]
    schema: pa.Schema
    report: BuildReport
    strict: bool
    progress: Progress


Embed = Callable[[BuildJob], list[FragmentMetadata]]
"""Who embeds and writes the exemplars: their fragments, in the order of the source, not committed."""


def embed_here(job: BuildJob) -> list[FragmentMetadata]:
    """In this process."""
    writer = LanceWriter(job.folder / EXEMPLARS, job.schema, job.source.labels.vocabulary)
    for batch in embedded(job.source, job.classifier, job.columns, job.report, strict=job.strict):
        writer.write(stored_columns(batch, job.source.metadata_types))
        job.progress("building", job.report.exemplars + job.report.skipped_count, len(job.source))
    return writer.finish()


def write_index(
    source: ImageSource,
    target: Path,
    classifier: Classifier,
    *,
    columns: Sequence[FeatureColumn] = (),
    overwrite: bool = False,
    neighbours: str = EXACT,
    strict: bool = False,
    embed: Embed = embed_here,
    progress: Progress = silent,
) -> BuildReport:
    """Write an index of the source's images. It appears at `target` whole, or not at all.

    Args:
        source: The images; decoded to `classifier.target`.
        target: The index's folder; its parent must exist.
        classifier: Computes the features; stored in the index.
        columns: Of features that are stored beside φ(x).
        overwrite: Replace an index that is there; it stays usable until the moment of the exchange.
        neighbours: FAISS factory string for searches by any column of features; ``Flat`` is exact.
        strict: Fail at the first image that cannot be read instead of skipping it.
        embed: Embeds the images and writes them; other processes may do it.
        progress: Told of images done.

    Raises:
        IndexStateError: the target is in the way, not writable, full, or being built by another process.
        InputError: the source is empty, an id is there twice, a label is out of range, or, with `strict`, an image is
            unreadable.
        ModelError: the features of most images are not finite.
    """
    check_build(target, classifier, exemplars=len(source), overwrite=overwrite, neighbours=neighbours)
    adapted = AdaptedSource.of_new_index(source, classifier.class_names, named=classifier.names_given)
    columns = (PlainColumn(classifier), *columns)
    dimensions = {column.name: column.dimension for column in columns}
    report = BuildReport()
    try:
        with staged(target, overwrite=overwrite) as staging:
            schema = exemplar_schema(classifier.image_shape, dimensions, source.metadata_types)
            (staging / MODEL).write_bytes(classifier.to_bytes())
            for column in columns:
                column.save(staging)
            fragments = embed(BuildJob(staging, adapted, classifier, columns, schema, report, strict, progress))
            check_trainable(neighbours, report.exemplars)  # of which some were not readable
            version = _commit(staging, schema, fragments)
            _manifest(
                adapted,
                classifier,
                report,
                columns=dimensions,
                neighbours=neighbours,
                version=version,
                files=digest_files(staging),
            ).write(staging)
    except OSError as error:
        raise IndexStateError(f"{target} cannot be written: {error.strerror or error}; nothing was changed") from error
    return report


def check_build(
    target: Path, classifier: Classifier, *, exemplars: int, overwrite: bool = False, neighbours: str = EXACT
) -> None:
    """Everything about a build that can be refused before any work; raises as `write_index`."""
    check_target(target, overwrite=overwrite)
    make_faiss_index(fitting_dimension(classifier.feature_dim, neighbours), Metric.L2, neighbours)
    check_trainable(neighbours, exemplars)


def _commit(staging: Path, schema: pa.Schema, fragments: list[FragmentMetadata]) -> int:
    """Make the fragments all that there is; what others wrote who were lost is removed. Returns Lance's version."""
    dataset = committed(str(staging / EXEMPLARS), lance.LanceOperation.Overwrite(schema, fragments))
    needed = {f"{EXEMPLARS}/{name}" for name in files_of(dataset)}
    for path in (staging / DATA).iterdir():
        if path.relative_to(staging).as_posix() not in needed:
            path.unlink()
    return int(dataset.version)


def _manifest(
    source: AdaptedSource,
    classifier: Classifier,
    report: BuildReport,
    *,
    columns: dict[str, int],
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
        columns=columns,
        class_names=source.labels.vocabulary.class_names,
        other_labels=source.labels.vocabulary.others,
        labels_predicted=report.labels_predicted,
        agreement=report.agreement,
        model=classifier.spec,
        fingerprint=classifier.fingerprint,
        neighbours=neighbours,
        backend_speeds={},
        lance_version=version,
        files=files,
    )
