"""Making a calibration: from labelled images that the index does not have, or from its own exemplars."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from jaxtyping import Float64, Int64

from tmm_engine.classifying.calibration import OWN, Calibration, described
from tmm_engine.classifying.conformal import margins
from tmm_engine.classifying.labels import PresentLabels
from tmm_engine.classifying.nearness import class_scores
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.descriptors.columns import ROBUST_FEATURE
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.wording import some
from tmm_engine.options import Mode, SearchOptions
from tmm_engine.query import Query, each_query
from tmm_engine.rerank.columns import STRETCHED_FEATURE
from tmm_engine.results import FailedQuery, SearchResult
from tmm_engine.scanning import ByVector, RankedBy
from tmm_engine.snapshot import Snapshot

OWN_IMAGES = 2000
"""Exemplars at most that stand for all in a calibration on the index itself."""


@dataclass(slots=True)
class _Read:
    """What a calibration's images came to.

    Attributes:
        ranked_by: Of each labelled image.
        labels: Its label's place among those present; −1 where no exemplar has it.
        unread: Images that could not be read.
        unlabelled: Images without a label.
        unknown: Names of labels that no exemplar has.
        copies: Images that were taken for copies of exemplars.
        inside: Images that are exemplars: both names.
    """

    ranked_by: list[RankedBy] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    unread: int = 0
    unlabelled: int = 0
    unknown: list[str] = field(default_factory=list)
    copies: int = 0
    inside: list[str] = field(default_factory=list)


def calibrate(
    snapshot: Snapshot, source: ImageSource, options: SearchOptions, *, name: str, progress: Progress
) -> Calibration:
    """From labelled images that are none of the exemplars.

    Args:
        snapshot: What is searched.
        source: The images.
        options: How it is searched.
        name: Of the calibration.
        progress: Told of images done.

    Raises:
        InputError: the source has no labels, or none that the index has; or an image of it is in the index.
    """
    if not source.labelled:
        raise InputError(
            f"{source.name}: expected labelled images to calibrate on, got none with a label (class folders have them)"
        )
    present = PresentLabels.of(snapshot.store, snapshot.vocabulary)
    read = _read(snapshot, source, options, present, progress)
    if read.inside:
        raise InputError(
            f"{len(read.inside):,} of the {len(read.labels):,} images of {source.name} are in the index "
            f"({some(read.inside)}): calibrate on images that it does not have"
        )
    labels = np.array(read.labels, dtype=np.int64)
    if not (labels >= 0).any():
        raise InputError(
            f"{source.name}: expected images with labels of the index ({some(present.names)}), got "
            f"{some(read.unknown) or 'none that could be read'}"
        )
    scores = class_scores(snapshot.store, read.ranked_by, present.places, k=options.k)
    notes = _notes(read, source.name)
    return _made(name, source.name, snapshot=snapshot, options=options, scores=scores, labels=labels, notes=notes)


def calibrate_on_itself(snapshot: Snapshot, options: SearchOptions) -> Calibration:
    """Each exemplar as if it were no exemplar, of at most `OWN_IMAGES` drawn with a seed; no image passes the network.

    Without recognition, which would know every exemplar.

    Raises:
        InputError: fewer than two exemplars, or mode ``tmm``, which stores nothing that would do.
    """
    store = snapshot.store
    if options.mode == Mode.TMM:
        raise InputError(
            "mode 'tmm' cannot be calibrated on the index itself, since it would search with every exemplar: name "
            "labelled images (`calibration=…`), or classify in another mode"
        )
    if len(store) < 2:
        raise InputError(f"expected at least 2 exemplars to calibrate on, got {len(store)}: add some")
    column, metric = ROBUST_FEATURE, Metric.COSINE
    if options.mode != Mode.ROBUST:
        column, metric = STRETCHED_FEATURE if options.stretches else FEATURE, Metric(str(options.mode))
    present = PresentLabels.of(store, snapshot.vocabulary)
    rows = np.sort(np.random.default_rng(0).permutation(len(store))[:OWN_IMAGES])
    queries = [ByVector(vector, column, metric) for vector in store.features(rows, column=column)]
    scores = class_scores(store, queries, present.places, k=options.k, without=rows)
    labels = present.places[rows]
    return _made(OWN, "the index itself", snapshot=snapshot, options=options, scores=scores, labels=labels, notes=())


def _made(
    name: str,
    source: str,
    *,
    snapshot: Snapshot,
    options: SearchOptions,
    scores: Float64[np.ndarray, "q classes"],
    labels: Int64[np.ndarray, "q"],
    notes: tuple[str, ...],
) -> Calibration:
    strange = margins(scores)[np.arange(len(labels)), labels]
    return Calibration(
        name=name,
        source=source,
        own=name == OWN,
        options=described(options),
        content=snapshot.manifest.content if snapshot.manifest else "",
        margins=np.sort(np.where(labels >= 0, strange, np.inf)),
        distances=np.sort(-scores.max(axis=1)),
        notes=notes,
    )


def _read(
    snapshot: Snapshot, source: ImageSource, options: SearchOptions, present: PresentLabels, progress: Progress
) -> _Read:
    read, done = _Read(), 0
    queries = each_query(source, snapshot.classifier.target, vocabulary=snapshot.vocabulary)
    for group in _groups(queries, forward_batch_size(snapshot.classifier.image_shape)):
        done += len(group)
        read.unread += sum(isinstance(query, FailedQuery) for query in group)
        known = [query for query in group if isinstance(query, Query)]
        labelled = [query for query in known if query.label is not None]
        read.unlabelled += len(known) - len(labelled)
        if labelled:
            found = snapshot.searcher.search_ranked(labelled, options, silent, whole=True)
            for query, (result, ranked_by) in zip(labelled, found, strict=True):
                _note_image(read, query, result, ranked_by, present)
        progress("calibrating", done, len(source))
    return read


def _note_image(read: _Read, query: Query, result: SearchResult, ranked_by: RankedBy, present: PresentLabels) -> None:
    place = present.place(result.true_label)
    if place is None and str(result.true_class) not in read.unknown:
        read.unknown.append(str(result.true_class))
    read.ranked_by.append(ranked_by)
    read.labels.append(-1 if place is None else place)
    same = next((hit.id for hit in result.hits if np.array_equal(hit.image, result.query_image)), None)
    if same is not None:
        read.inside.append(f"{query.name} = {same}")
    elif result.recognised_as is not None:
        read.copies += 1


def _notes(read: _Read, source: str) -> tuple[str, ...]:
    images = len(read.labels)
    strangers = sum(label < 0 for label in read.labels)
    told = {
        f"{read.unread:,} images of {source} could not be read": read.unread,
        f"{read.unlabelled:,} images of {source} have no label and do not count": read.unlabelled,
        f"{strangers:,} of the {images:,} images have labels that no exemplar has ({some(read.unknown)}): no set "
        f"holds these, and others are larger for it": strangers,
        f"{read.copies:,} of the {images:,} images are taken for copies of exemplars: if they are, new images are "
        f"covered less often": read.copies,
    }
    return tuple(note for note, count in told.items() if count)


def _groups(queries: Iterator[Query | FailedQuery], size: int) -> Iterator[list[Query | FailedQuery]]:
    while group := list(islice(queries, size)):
        yield group
