"""Build an index that the default search works with: exemplars, features, and a global trigger with its features."""

from collections.abc import Sequence
from pathlib import Path

from tmm_engine.index.columns import FeatureColumn
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.search import EXACT
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.store.building import check_build, write_index
from tmm_engine.index.store.embedding import BuildReport
from tmm_engine.rerank.columns import robust_columns
from tmm_engine.rerank.global_trigger import make_global_trigger
from tmm_engine.rerank.settings import DEFAULT_PRESET, GlobalRecipe, TmmConfig, preset


def build_index(
    source: ImageSource,
    index: Path,
    classifier: Classifier,
    *,
    global_trigger: GlobalRecipe | TmmConfig | str | None = DEFAULT_PRESET,
    overwrite: bool = False,
    neighbours: str = EXACT,
    strict: bool = False,
    progress: Progress = silent,
) -> BuildReport:
    """Build an index of a source's images. It appears at `index` whole, or not at all.

    Args:
        source: The exemplars.
        index: A folder that does not exist yet, or an index to replace.
        classifier: Computes the features.
        global_trigger: A recipe, or the preset or configuration that is to be searched with: what the trigger and the
            exemplars' features under it are made with. None: without; the default search then fails.
        overwrite: Replace an index that is there; it stays usable until the new one is whole.
        neighbours: FAISS factory string.
        strict: Fail at an unreadable image instead of skipping it.
        progress: Told of images read and embedded, and of the trigger's optimisation.

    Raises:
        IndexStateError: the target is in the way, not writable, full, or being built by another process.
        InputError: source and classifier do not fit, no image can be read, an id is there twice, a label is out of
            range, the images are such that `make_global_trigger` refuses them, or, with `strict`, one is unreadable.
    """
    check_build(source, index, classifier, overwrite=overwrite, neighbours=neighbours)
    columns: Sequence[FeatureColumn] = ()
    if global_trigger is not None:
        config = preset(global_trigger) if isinstance(global_trigger, str) else global_trigger
        trigger = make_global_trigger(source, classifier, config, progress=progress)
        columns = robust_columns(trigger, classifier)
    return write_index(
        source,
        index,
        classifier,
        columns=columns,
        overwrite=overwrite,
        neighbours=neighbours,
        strict=strict,
        progress=progress,
    )
