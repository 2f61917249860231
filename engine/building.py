"""Build an index that the default search works with: exemplars, features, and a global trigger with its features."""

from pathlib import Path

from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.search import EXACT
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.store.building import BuildReport, check_build
from tmm_engine.index.store.building import build_index as build_plain
from tmm_engine.rerank.global_trigger import GlobalColumn, make_global_trigger
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
    """As `index.build_index`, with a global trigger beside the exemplars.

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
        InputError: what `index.build_index` and `make_global_trigger` refuse.
    """
    check_build(source, index, classifier, overwrite=overwrite, neighbours=neighbours)
    column = None
    if global_trigger is not None:
        config = preset(global_trigger) if isinstance(global_trigger, str) else global_trigger
        column = GlobalColumn(make_global_trigger(source, classifier, config, progress=progress), classifier)
    return build_plain(
        source,
        index,
        classifier,
        global_column=column,
        overwrite=overwrite,
        neighbours=neighbours,
        strict=strict,
        progress=progress,
    )
