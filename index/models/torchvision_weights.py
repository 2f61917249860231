"""Checkpoints that are torchvision's own: known by their digest, with what torchvision does to a picture before."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from tmm_engine.index.errors import ModelError
from tmm_engine.index.models.architectures import channels_hint
from tmm_engine.index.models.libraries import LibraryModel
from tmm_engine.index.models.pipelines import Pipeline, pipeline_of
from tmm_engine.index.models.preprocessing import Preprocessing
from tmm_engine.index.types import ImageShape

TRANSFORMS_INPUT = ("googlenet", "inception_v3")
"""With weights of torchvision's these networks normalise once more by themselves; ours do not."""


def torchvision_weights(architecture: str, weights: Path) -> Any | None:
    """The member of torchvision's enumeration whose checkpoint a file is, by its digest; None if it is another's."""
    import torchvision.models as zoo

    if architecture not in zoo.list_models(module=zoo) or not weights.is_file():
        return None
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return next(
        (each for each in zoo.get_model_weights(architecture) if f"-{digest[:8]}." in each.url.rpartition("/")[2]), None
    )


def torchvision_described(architecture: str, weights: Path, image_shape: ImageShape | None) -> LibraryModel | None:
    """What torchvision says of a checkpoint that is its own; None of another's.

    Args:
        architecture: Its name.
        weights: The file.
        image_shape: Another size than torchvision's: takes the place of its resize and crop, not of mean and std.

    Raises:
        ModelError: images of other channels than the weights take.
    """
    own = torchvision_weights(architecture, weights)
    if own is None:
        return None
    pipeline, notes = with_own_input(architecture, pipeline_of(own.transforms()))
    theirs, names = pipeline.preprocessing, tuple(own.meta["categories"])
    if image_shape is not None and image_shape[0] != theirs.shape[0]:
        raise ModelError(
            f"expected images of {theirs.shape[0]} channels, as the weights do, got image shape {image_shape} "
            f"({channels_hint(theirs.shape[0])})"
        )
    if image_shape not in (None, theirs.shape):
        pipeline = replace(pipeline, preprocessing=Preprocessing(image_shape))
        notes += (
            f"the weights are torchvision's {own}: their mean, std and class names are kept, images of {image_shape} "
            f"take the place of a resize to {theirs.size[0]} and a crop of {theirs.shape[1:]}",
        )
    return LibraryModel(architecture, pipeline, len(names), names, notes=notes)


def with_own_input(architecture: str, pipeline: Pipeline) -> tuple[Pipeline, tuple[str, ...]]:
    """What torchvision does to a picture for an architecture, its networks' own normalisation included, and a note.

    Those of GoogLeNet and Inception take x normalised by ImageNet's mean and std and make (x' − 0.5) / 0.5 of the
    pixels x' again (``transform_input``, which torchvision sets with its weights); ours are built without that.
    """
    import torchvision.models as zoo

    if architecture not in TRANSFORMS_INPUT:
        return pipeline, ()
    theirs = [pipeline_of(each.transforms()) for each in zoo.get_model_weights(architecture)]
    if pipeline not in theirs:
        return pipeline, ()
    half = (0.5,) * len(pipeline.mean)
    note = (
        f"{architecture} with torchvision's weights normalises once more by itself (transform_input): together that is "
        "a mean and std of 0.5, which are taken where no others are given (`mean=…`, `std=…`)"
    )
    return replace(pipeline, mean=half, std=half), (note,)
