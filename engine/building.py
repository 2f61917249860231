"""Build an index: exemplars, features, descriptors that hold under noise, and, where asked for, a global trigger."""

from pathlib import Path

from tmm_engine.describing import DEFAULT_VIEWS, describe
from tmm_engine.index.arguments import checked
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.factories import EXACT
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.opening import SourceLike, as_source
from tmm_engine.index.store.building import check_build, write_index
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
    progress: Progress = silent,
) -> BuildReport:
    """Build an index of a source's images. It appears at `index` whole, or not at all.

    Args:
        source: The exemplars, or what `open_source` takes: a folder, a Parquet file, a `datasets.Dataset`, …
        index: A folder that does not exist yet, or an index to replace.
        classifier: Computes the features.
        views: Symmetric views that the descriptors of mode ``robust`` are the mean of, 1 to 10: so many more passes
            of the network over the images. 0: no descriptors.
        recogniser: The layer that recognises copies, as in ``layer2:4x4``, or ``pixels``; None: the one that does best
            on a sample of the images.
        global_trigger: For mode ``tmm`` with the preset ``fast``: that name, or a recipe or configuration that is to be
            searched with, by which the trigger and the exemplars' features under it are made. None: without.
        overwrite: Replace an index that is there; it stays usable until the new one is whole.
        neighbours: FAISS factory string, for every mode but `tmm` over all exemplars: ``Flat`` is exact.
        strict: Fail at an unreadable image instead of skipping it.
        progress: Told of images read and embedded, and of the trigger's optimisation.

    Raises:
        IndexStateError: the target is in the way, not writable, full, or being built by another process.
        InputError: no image can be read, an id is there twice, a label is out of range, the images are such that
            `make_global_trigger` refuses them, or, with `strict`, one is unreadable.
        ModelError: the features of most images are not finite.
    """
    source, index = as_source(source), Path(index)
    check_build(index, classifier, exemplars=len(source), overwrite=overwrite, neighbours=neighbours)
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
        progress=progress,
    )
