"""The classifier that the options of build-index describe. Nothing heavy is imported early."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmm_engine.cli.wording import for_command_line
from tmm_engine.index.errors import InputError

if TYPE_CHECKING:
    from tmm_engine.index.models.classifier import Classifier
    from tmm_engine.index.sources.records import ImageRecord, ImageSource

MODEL_OPTIONS = (
    "num_classes", "small_stem", "max_pool", "preprocessing", "image_size", "channels", "mean", "std", "head",
    "class_names",
)  # fmt: skip
COMPARED = 256  # images that two readings of a checkpoint are compared on
CLEARLY = 0.1  # by so much more of the labels the better one must agree with


def classifier_of(source: "ImageSource", options: dict[str, Any]) -> "Classifier":
    """The classifier that the options of build-index describe, for images of the source; what was guessed is said.

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
    if classifier.max_pool_assumed:
        return _settled(source, classifier, options)
    for note in classifier.notes:
        click.echo(for_command_line(note), err=True)
    return classifier


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
    """What is asked for, the rest as the source's images are; None where the model brings its own preprocessing."""
    from tmm_engine.index.models.drafting import brings_shape

    size, channels = options["image_size"], options["channels"]
    weights: Path | None = options["weights"]
    if options["preprocessing"] is not None or brings_shape(options["model"], weights):
        if size is None and channels is None:
            return None
        if size is None or channels is None:
            missing = "--image-size" if size is None else "--channels"
            raise click.UsageError(f"{options['model']} brings its own image shape: to change it, give {missing} too")
    usual, *usual_size = source.natural_shape() if size is None or channels is None else (0, 0, 0)
    height, width = size or usual_size
    return int(channels or usual), height, width


def _settled(source: "ImageSource", with_pool: "Classifier", options: dict[str, Any]) -> "Classifier":
    """Of the two stems that weights do not tell apart the one that agrees with the labels; said, or asked for."""
    from tmm_engine.index.sources.sampling import sampled

    without = _built(source, options, max_pool=False)
    for note in without.notes:
        click.echo(for_command_line(note), err=True)
    sample = sampled(source, with_pool.target, COMPARED) if source.labelled else []
    found = [_agreement(source, each, sample) for each in (with_pool, without)]
    better = max(found)
    if sample and better - min(found) >= CLEARLY and better >= 2 / with_pool.num_classes:
        chosen, word = (with_pool, "with") if found[0] == better else (without, "without")
        click.echo(
            f"the small stem is taken {word} a max-pool: the model then agrees with {better:.0%} of the labels of "
            f"{len(sample)} images, else with {min(found):.0%} (--max-pool or --no-max-pool says which)",
            err=True,
        )
        return chosen
    if options["small_stem"]:
        click.echo("after the small stem a max-pool is taken to be there; --no-max-pool leaves it out", err=True)
        return with_pool
    agreed = f", nor do the labels: {found[0]:.0%} of them agree with it, {found[1]:.0%} without" if sample else ""
    raise InputError(
        "the first convolution of the weights is 3×3, as in ResNets for small images, and nothing tells whether a "
        f"max-pool follows it{agreed}: say --max-pool (as torchvision's) or --no-max-pool (as most for CIFAR)"
    )


def _agreement(source: "ImageSource", classifier: "Classifier", sample: "list[ImageRecord]") -> float:
    """With what share of the sample's labels the predictions agree, matched as a build matches them; 0 without any."""
    import numpy as np
    import torch

    from tmm_engine.index.agreement import Tally
    from tmm_engine.index.sources.adapted import AdaptedSource

    if not sample:
        return 0.0
    images = torch.from_numpy(np.stack([record.image for record in sample]))
    with torch.no_grad():
        parts = [classifier.logits(classifier.features(part.float() / 255)) for part in images.split(64)]
    matched = AdaptedSource.of_new_index(source, classifier.class_names, named=classifier.names_given).labels
    labels = [matched.label(record.label, record.id) for record in sample]
    given = np.array([label is not None for label in labels])
    tally = Tally(matched.vocabulary)
    tally.count(np.array([label or 0 for label in labels], dtype=np.int64), given, torch.cat(parts).argmax(1).numpy())
    return tally.result().share or 0.0
