"""A build on several machines: this process reads the source and commits, workers decode, embed and write."""

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice

from lance.fragment import FragmentMetadata

from tmm_engine.cluster.board import Board
from tmm_engine.cluster.connection import Connection
from tmm_engine.cluster.crew import Crew
from tmm_engine.cluster.embedder import Setup, Written
from tmm_engine.cluster.worker import own_network
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.sources.adapted import AdaptedSource
from tmm_engine.index.sources.records import EncodedSource, Item
from tmm_engine.index.store.building import BuildJob
from tmm_engine.index.store.embedding import Intake
from tmm_engine.index.store.lance_store import rows_per_fragment

PARTS_PER_WORKER = 16  # at least, where there are batches for so many: the last ones end at about the same time


def embed_with(crew: Crew, connection: Connection, job: BuildJob) -> list[FragmentMetadata]:
    """Embed and write the exemplars of a build with workers; see `index.store.building.Embed`.

    Every part of the source is one task, whose fragments count once it is done. A part whose worker was lost is done
    again; what the lost worker wrote is in no fragment that is returned.

    Args:
        crew: Of `Embedder`.
        connection: That it works on.
        job: What is to be done.

    Raises:
        IndexStateError: as `Crew.run`.
        InputError: as `index.store.building.embed_here`, and so is the other.
        ModelError: see there.
    """
    source, total = job.source, len(job.source)
    intake = Intake(source, job.classifier, job.report, strict=job.strict)
    fragments: list[FragmentMetadata] = []
    with closing(Board()) as board:
        parts = _parts(source, job, connection.workers)
        tasks = ((f"images {start:,} to {start + len(items) - 1:,}", (start, items)) for start, items in parts)
        tick = partial(board.read, lambda done: job.progress("building", done, total))
        for written in crew.run((_setup(job, connection, board),), tasks, tick=tick):
            assert isinstance(written, Written)
            for outcome in written.outcomes:
                intake.take(outcome)
            _learn(source, written)
            fragments += written.fragments
        job.progress("building", total, total)
    intake.finish()
    lost = f"; {crew.lost} lost on the way and replaced, their work done again" if crew.lost else ""
    job.report.remarks += (f"embedded by {connection}{lost}",)
    return fragments


def _setup(job: BuildJob, connection: Connection, board: Board) -> Setup:
    source = job.source
    return Setup(
        folder=job.folder.resolve(),
        fingerprint=job.classifier.fingerprint,
        network=own_network(job.classifier),
        names=[column.name for column in job.columns],
        schema=job.schema,
        source=source.name,
        labels=source.labels,
        labelled=source.labelled,
        metadata_types=source.metadata_types,
        cpus=connection.cpus,
        board=board.actor,
    )


def _learn(source: AdaptedSource, written: Written) -> None:
    """What the source would know if it had been read here."""
    source.count(*written.counted)
    if isinstance(source.source, EncodedSource):
        source.source.told(written.assumed)


def _parts(source: AdaptedSource, job: BuildJob, workers: int) -> Iterator[tuple[int, list[Item]]]:
    """The places where parts of the source begin, and their images: whole batches of the network, as one process cuts
    them, no more than a fragment holds.
    """
    batch = forward_batch_size(job.classifier.image_shape)
    share = -(-len(source) // (PARTS_PER_WORKER * workers))
    size = batch * max(1, -(-min(share, rows_per_fragment(job.schema)) // batch))
    given = source.source
    items: Iterator[Item] = given.undecoded() if isinstance(given, EncodedSource) else given.read(job.classifier.target)
    start = 0
    while part := list(islice(items, size)):
        yield start, part
        start += len(part)
