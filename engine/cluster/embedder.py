"""A worker of a build: decodes a part of the source, embeds it, and writes fragments that nobody reads yet."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from lance.fragment import FragmentMetadata
from torch import nn

from tmm_engine.cluster.board import reporter
from tmm_engine.cluster.crew import Presence
from tmm_engine.cluster.worker import load_classifier, own_device, presence
from tmm_engine.describing import columns_of
from tmm_engine.index.columns import FeatureColumn, PlainColumn
from tmm_engine.index.descriptors.columns import ROBUST_FEATURE, describer_of
from tmm_engine.index.labels import Matched
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.adapted import AdaptedSource
from tmm_engine.index.sources.records import Item, PartSource
from tmm_engine.index.store.embedding import Outcome, embedded_batches
from tmm_engine.index.store.lance_store import LanceWriter, stored_columns
from tmm_engine.index.store.manifest import EXEMPLARS
from tmm_engine.rerank.columns import GLOBAL_FEATURE, trigger_of


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """What a worker needs to know of a build.

    Attributes:
        folder: The index that is being made.
        fingerprint: Of its classifier.
        network: The user's own code, where it is that.
        names: Of the columns of features.
        schema: Of the rows.
        source: Its name.
        labels: What its labels are in the index.
        labelled: Whether it has any.
        metadata_types: Of its columns.
        cpus: Of the worker.
        board: Told of images done.
    """

    folder: Path
    fingerprint: str
    network: nn.Module | None
    names: Collection[str]
    schema: pa.Schema
    source: str
    labels: Matched
    labelled: bool
    metadata_types: Mapping[str, type]
    cpus: int
    board: Any


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """What came of a part of the source.

    Attributes:
        fragments: Its exemplars, in order.
        outcomes: Of its batches.
        counted: As `AdaptedSource.counted`.
        assumed: Of images, as `EncodedSource.assumed`.
    """

    fragments: list[FragmentMetadata]
    outcomes: list[Outcome]
    counted: tuple[int, int]
    assumed: Mapping[str, str]


class Embedder:
    """An actor of Ray's. What it raises is raised where its answer is taken."""

    def __init__(self) -> None:
        self._ready: tuple[Setup, Classifier, Sequence[FeatureColumn]] | None = None

    def prepare(self, setup: Setup) -> Presence:
        """Load the classifier and the columns of the index.

        Raises:
            IndexStateError: this machine does not see the index.
            ModelError: it makes another classifier of it.
        """
        classifier = load_classifier(setup.folder, setup.fingerprint, setup.network, own_device(setup.cpus))
        describer = describer_of(setup.folder, classifier) if ROBUST_FEATURE in setup.names else None
        trigger = trigger_of(setup.folder, classifier.image_shape) if GLOBAL_FEATURE in setup.names else None
        self._ready = setup, classifier, (PlainColumn(classifier), *columns_of(classifier, describer, trigger))
        return presence()

    def work(self, part: int, items: Sequence[Item]) -> Written:
        """Embed and write a part of the source, in batches as one process would.

        Raises:
            InputError: a label is out of range.
            IndexStateError: it could not be written whole.
        """
        assert self._ready is not None, "prepare comes first"
        setup, classifier, columns = self._ready
        own = PartSource(setup.source, items, labelled=setup.labelled, metadata_types=setup.metadata_types)
        adapted = AdaptedSource(own, labels=setup.labels, metadata_types=setup.metadata_types)
        writer = LanceWriter(setup.folder / EXEMPLARS, setup.schema, setup.labels.vocabulary)
        report, outcomes, done = reporter(setup.board, part), list[Outcome](), 0
        for batch, outcome in embedded_batches(adapted, classifier, columns):
            if batch is not None:
                writer.write(stored_columns(batch, setup.metadata_types))
            outcomes.append(outcome)
            done += len(outcome.ids) + len(outcome.left_out)
            report(done)
        return Written(writer.finish(), outcomes, adapted.counted, own.assumed)
