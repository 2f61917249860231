"""Global triggers, kept beside the records: Eq. 2 takes minutes, and every benchmark of a set needs the same ones."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from tmm_engine.index.errors import IndexStateError, InputError
from tmm_engine.index.files import replacing
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank.global_trigger import GlobalTrigger, make_global_trigger
from tmm_engine.rerank.settings import GlobalRecipe

FOLDER = ".triggers"


def folder_beside(records: Path) -> Path:
    """Where the triggers that a file of records was made with are kept."""
    return records.absolute().parent / FOLDER


def optimisation(recipe: GlobalRecipe) -> tuple[int, float, float, int]:
    """The settings that τ of Eq. 2 depends on; it does not depend on the blend."""
    return recipe.trigger.steps, recipe.trigger.lr, recipe.trigger.tolerance, recipe.seed


def global_trigger(
    store: MemoryStore,
    classifier: Classifier,
    recipe: GlobalRecipe,
    *,
    folder: Path | None = None,
    progress: Progress = silent,
) -> GlobalTrigger:
    """τ for a store's exemplars, read from the folder or optimised, and then kept there.

    Classifier, images, `optimisation` and the kind of device tell triggers apart, the code does not: delete the folder
    when `make_global_trigger` changes.

    Args:
        store: The exemplars.
        classifier: f.
        recipe: `optimisation`, and a blend; its intensity is not looked at.
        folder: Made if it is missing; a damaged file in it is replaced. None keeps nothing.
        progress: Told of the optimisation.

    Returns:
        The same either way, but blend, clamping and stretching may be those of whoever optimised it.

    Raises:
        InputError: the folder cannot be written, or as `make_global_trigger`.
    """
    images = store.images(np.arange(len(store)))
    kept = None
    if folder is not None:
        about = [classifier.fingerprint, classifier.device.type, images.shape, *optimisation(recipe)]
        digest = hashlib.sha256(json.dumps(about).encode())
        digest.update(np.ascontiguousarray(images).data)
        kept = folder / f"{digest.hexdigest()}.safetensors"
        try:
            return GlobalTrigger.load(kept)
        except IndexStateError:  # none yet, or damaged
            pass
    recipe = replace(recipe, blending=replace(recipe.blending, intensity=None))
    trigger = make_global_trigger(ArraySource(images), classifier, recipe, progress=progress)
    if kept is not None:
        _keep(trigger, kept)
    return trigger


def _keep(trigger: GlobalTrigger, path: Path) -> None:
    """Whole or not at all."""
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as written:
            trigger.save(written)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror} (make room, or choose another folder)") from None
