"""What an index stores of its images beside φ(x): descriptors that hold under noise, and features under one trigger."""

from dataclasses import dataclass

import numpy as np

from tmm_engine.index.columns import FeatureColumn
from tmm_engine.index.descriptors.calibration import calibrate, sample_size
from tmm_engine.index.descriptors.columns import Describer, Descriptors, descriptor_columns
from tmm_engine.index.descriptors.layers import Layer
from tmm_engine.index.descriptors.views import MAX_VIEWS
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.sources.sampling import sampled
from tmm_engine.rerank.columns import StretchedColumn, global_columns
from tmm_engine.rerank.global_trigger import GlobalTrigger, make_global_trigger
from tmm_engine.rerank.settings import GlobalRecipe, TmmConfig, preset

DEFAULT_VIEWS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Described:
    """What describes an index's images.

    Attributes:
        columns: Of features, beside φ(x).
        describer: Of the descriptors, if there are any.
        global_trigger: If there is one.
    """

    columns: tuple[FeatureColumn, ...]
    describer: Describer | None
    global_trigger: GlobalTrigger | None


def describe(
    source: ImageSource,
    classifier: Classifier,
    *,
    views: int,
    recogniser: str | None,
    global_trigger: GlobalRecipe | TmmConfig | str | None,
    progress: Progress,
) -> Described:
    """Choose descriptors on a sample of the source, and make a global trigger, where they are asked for.

    Args:
        source: The exemplars; read once for each.
        classifier: The index's.
        views: Symmetric views that descriptors look at, 1 to 10; 0: no descriptors.
        recogniser: The layer that recognises copies, as in ``layer2:4x4``; None: the one that does best.
        global_trigger: As `build_index`.
        progress: Told of images read and measured.

    Raises:
        InputError: no such number of views, no such layer, no image can be read; or as `make_global_trigger`.
    """
    if isinstance(views, bool) or not 0 <= views <= MAX_VIEWS:
        raise InputError(f"views: expected 1 to {MAX_VIEWS}, or 0 for no descriptors, got {views!r}")
    if recogniser is not None and not views:
        raise InputError("recogniser has no effect without descriptors (views=0): leave it out")
    describer, trigger = None, None
    if views:
        layer = None if recogniser is None else Layer.parse(recogniser)
        describer = Describer(chosen_descriptors(source, classifier, views, layer, progress), classifier)
    if global_trigger is not None:
        config = preset(global_trigger) if isinstance(global_trigger, str) else global_trigger
        trigger = make_global_trigger(source, classifier, config, progress=progress)
    return Described(columns_of(classifier, describer, trigger), describer, trigger)


def columns_of(
    classifier: Classifier, describer: Describer | None, trigger: GlobalTrigger | None
) -> tuple[FeatureColumn, ...]:
    """The columns of an index beside φ(x), in their order, sharing passes of the network.

    Args:
        classifier: The index's.
        describer: Of its descriptors, if it has them.
        trigger: Its global trigger, if it has one.
    """
    columns: tuple[FeatureColumn, ...] = ()
    if describer is not None:
        columns += (*descriptor_columns(describer, classifier), StretchedColumn(classifier, describer))
    if trigger is not None:
        own = global_columns(trigger, classifier)
        columns += tuple(column for column in own if column.name not in [known.name for known in columns])
    return columns


def chosen_descriptors(
    source: ImageSource, classifier: Classifier, views: int, recogniser: Layer | None, progress: Progress
) -> Descriptors:
    """Measured on a sample of the source; the same every time.

    Raises:
        InputError: no such layer, or no image can be read.
    """
    size, queries = sample_size(len(source), views)
    sample = sampled(source, classifier.target, size, progress=progress)
    labels = [record.label for record in sample]
    images = np.stack([record.image for record in sample])
    del sample  # photographs are large
    chosen = calibrate(
        images,
        None if None in labels else np.array(labels, dtype=np.int64),
        classifier,
        queries=queries,
        views=views,
        recogniser=recogniser,
        progress=progress,
    )
    return Descriptors(chosen.recogniser, chosen.robust, views, chosen.report)
