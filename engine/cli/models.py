"""The classifier that the options of build-index describe. Nothing heavy is imported early."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmm_engine.index.errors import InputError

if TYPE_CHECKING:
    from tmm_engine.index.models.classifier import Classifier
    from tmm_engine.index.sources.records import ImageSource

MODEL_OPTIONS = (
    "num_classes", "small_stem", "max_pool", "preprocessing", "image_size", "channels", "mean", "std", "head",
    "class_names",
)  # fmt: skip


def classifier_of(source: "ImageSource", options: dict[str, Any]) -> "Classifier":
    """The classifier that the options of build-index describe, for a source's images; its notes say what was guessed.

    Raises:
        InputError: no model, or a stem that neither weights nor labels tell.
        ModelError: as `Classifier.from_architecture`.
    """
    from tmm_engine.index.models.classifier import Classifier

    if options["model"] is None:
        ignored = [name for name in MODEL_OPTIONS if options[name] is not None]
        if ignored or options["ema"]:
            raise click.UsageError(f"--{(ignored or ['ema'])[0].replace('_', '-')} needs --model NAME")
        if options["weights"] is None:
            raise InputError(
                "no model: pass --model NAME with --weights FILE, or --weights of a file saved by this program"
            )
        return Classifier.load(options["weights"])
    classifier = _built(source, options)
    return _with_stem(source, options) if classifier.max_pool_assumed else classifier


def _built(source: "ImageSource", options: dict[str, Any], **changed: Any) -> "Classifier":
    from tmm_engine.index.models.classifier import Classifier

    names = ("weights", "ema", "num_classes", "small_stem", "max_pool", "head", "mean", "std", "class_names")
    processor = None if options["preprocessing"] is None else _transform(options["preprocessing"])
    shape = _image_shape(source, options)
    given = {name: options[name] for name in names}
    return Classifier.from_architecture(options["model"], image_shape=shape, processor=processor, **given | changed)


def _transform(name: str) -> object:
    import torchvision

    try:
        return torchvision.models.get_weight(name).transforms()
    except ValueError as error:
        raise InputError(
            f"expected weights of torchvision, as in ResNet18_Weights.IMAGENET1K_V1, got {name!r}: {error}"
        ) from error


def _image_shape(source: "ImageSource", options: dict[str, Any]) -> tuple[int, int, int] | None:
    """What is asked for, the rest as the classifier was saved, else as the source's images are; None where the model
    brings its own preprocessing.
    """
    from tmm_engine.index.models.drafting import brings_shape, saved_shape

    size, channels = options["image_size"], options["channels"]
    weights: Path | None = options["weights"]
    if options["preprocessing"] is not None or brings_shape(options["model"], weights):
        if size is None and channels is None:
            return None
        if size is None or channels is None:
            missing = "--image-size" if size is None else "--channels"
            raise click.UsageError(f"{options['model']} brings its own image shape: to change it, give {missing} too")
    if size is not None and channels is not None:
        return int(channels), *size
    usual, *usual_size = saved_shape(weights) or source.natural_shape()
    height, width = size or usual_size
    return int(channels or usual), height, width


def _with_stem(source: "ImageSource", options: dict[str, Any]) -> "Classifier":
    """Of the two stems that weights do not tell apart the one that agrees with the labels, else it is asked for."""
    from tmm_engine.index.models.choosing import settled

    stems = {
        f"the small stem is taken {word} a max-pool": _built(source, options, max_pool=pool)
        for word, pool in (("with", True), ("without", False))
    }
    choice = settled(stems, source)
    if choice.classifier is not None:
        return choice.classifier
    if options["small_stem"]:
        return _built(source, options)  # whose notes say what it is taken for
    with_pool, without = choice.shares.values() if choice.shares else (0.0, 0.0)
    agreed = f", nor do the labels: {with_pool:.0%} of them agree with it, {without:.0%} without"
    raise InputError(
        "the first convolution of the weights is 3×3, as in ResNets for small images, and nothing tells whether a "
        f"max-pool follows it{agreed if choice.shares else ''}: say --max-pool (as torchvision's) or --no-max-pool (as "
        "most for CIFAR)"
    )
