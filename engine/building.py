"""Build an index: exemplars, features, descriptors that hold under noise, and, where asked for, a global trigger."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from tmm_engine.cluster.connection import RayOptions, connected
from tmm_engine.describing import DEFAULT_VIEWS, describe
from tmm_engine.index.arguments import checked
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.factories import EXACT
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.opening import SourceLike, as_source
from tmm_engine.index.store.building import Embed, check_build, embed_here, write_index
from tmm_engine.index.store.embedding import BuildReport
from tmm_engine.rerank.settings import GlobalRecipe, TmmConfig


@checked
def build_index(
    source: SourceLike,
    index: str | Path,
    classifier: Classifier,
    *,
    views: int = DEFAULT_VIEWS,
    recogniser: str | None = None,
    global_trigger: GlobalRecipe | TmmConfig | str | None = None,
    overwrite: bool = False,
    neighbours: str = EXACT,
    strict: bool = False,
    ray: RayOptions | str | bool | None = None,
    progress: Progress = silent,
) -> BuildReport:
    """Build an index of a source's images. It appears at `index` whole, or not at all.

    Args:
        source: The exemplars, or what `open_source` takes: a folder, a Parquet file, a `datasets.Dataset`, …
        index: A folder that does not exist yet, or an index to replace.
        classifier: Computes the features.
        views: Symmetric views that the descriptors of mode ``robust`` look at, 1 to 10: so many more passes
            of the network over the images. 0: no descriptors.
        recogniser: The layer that recognises copies, as in ``layer2:4x4``, or ``pixels``; None: the one that does best
            on a sample of the images.
        global_trigger: For mode ``tmm`` with the preset ``fast``: that name, or a recipe or configuration that is to be
            searched with, by which the trigger and the exemplars' features under it are made. None: without.
        overwrite: Replace an index that is there; it stays usable until the new one is whole.
        neighbours: FAISS factory string, for every mode but `tmm` over all exemplars: ``Flat`` is exact.
        strict: Fail at an unreadable image instead of skipping it.
        ray: Embed on the machines of a Ray cluster (extra ``ray``): its address as ``host:port``, True for the one on
            this machine, or a new one here where there is none, or `RayOptions`. The index is on a path that all
            machines share. The rows are those of a build without, in the same order.
        progress: Told of images read and embedded, and of the trigger's optimisation.

    Raises:
        IndexStateError: the target is in the way, not writable, full, or being built by another process.
        InputError: no image can be read, an id is there twice, a label is out of range, the images are such that
            `make_global_trigger` refuses them, or, with `strict`, one is unreadable; there is no Ray at the address.
        ModelError: the features of most images are not finite.
    """
    source, index = as_source(source), Path(index)
    check_build(index, classifier, exemplars=len(source), overwrite=overwrite, neighbours=neighbours)
    with _embedding(RayOptions.of(ray)) as embed:
        described = describe(
            source, classifier, views=views, recogniser=recogniser, global_trigger=global_trigger, progress=progress
        )
        return write_index(
            source,
            index,
            classifier,
            columns=described.columns,
            overwrite=overwrite,
            neighbours=neighbours,
            strict=strict,
            embed=embed,
            progress=progress,
        )


@contextmanager
def _embedding(ray: RayOptions | None) -> Iterator[Embed]:
    """Who embeds: this process, or workers, which start while descriptors are chosen here."""
    if ray is None:
        yield embed_here
        return
    with connected(ray) as connection:
        from tmm_engine.cluster.building import embed_with
        from tmm_engine.cluster.crew import Crew
        from tmm_engine.cluster.embedder import Embedder

        with closing(Crew(Embedder, connection)) as crew:
            yield partial(embed_with, crew, connection)
