"""The command build-index. Nothing heavy is imported early."""

from pathlib import Path
from typing import Any

import click

from tmm_engine.cli.models import classifier_of
from tmm_engine.cli.options import (
    device_option,
    lines,
    model_option,
    numbers,
    opened_source,
    ray_asked,
    ray_options,
    size,
    source_options,
)


@click.command("build-index")
@click.argument("source")
@click.argument("index", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Checkpoint: safetensors, the index of its shards, or torch.load(weights_only=True); of timm also its folder.",
)
@click.option("--ema", is_flag=True, help="Of a checkpoint with raw and averaged weights, take the averaged ones.")
@click.option(
    "--preprocessing",
    metavar="WEIGHTS",
    help="Resize, crop and normalise as torchvision does for these weights, as in ResNet18_Weights.IMAGENET1K_V1. "
    "Models of timm and hf bring their own.",
)
@source_options
@click.option("--num-classes", type=click.IntRange(min=2), help="Classes of the head. Default: as the checkpoint says.")
@click.option(
    "--small-stem/--standard-stem",
    default=None,
    help="First convolution 3x3, stride 1. Default: as the checkpoint says.",
)
@click.option(
    "--max-pool/--no-max-pool",
    default=None,
    help="After a small stem. Default: what agrees better with the labels; where that is not clear, you are asked.",
)
@click.option("--image-size", callback=size, metavar="N|HxW", help="Default: most of the first images', at most 224.")
@click.option("--channels", type=click.Choice(["1", "3"]), help="Convert images to grey or RGB. Default: as most are.")
@click.option("--mean", callback=numbers, metavar="R,G,B", help="Normalisation mean of pixels in [0, 1]. Default: 0.")
@click.option("--std", callback=numbers, metavar="R,G,B", help="Normalisation standard deviation. Default: 1.")
@click.option(
    "--class-names",
    callback=lines,
    metavar="FILE",
    help="Names of the model's classes, in their order, one a line. Default: its own, or those of SOURCE.",
)
@click.option("--head", metavar="NAME", help="The final linear layer, where it is not found by itself.")
@click.option(
    "--neighbours", default="Flat", show_default=True, metavar="FACTORY", help="FAISS factory string; Flat is exact."
)
@click.option(
    "--overwrite", is_flag=True, help="Replace an index that is there; it stays usable until the new one is whole."
)
@click.option(
    "--views",
    type=click.IntRange(min=0, max=10),  # as index.descriptors.views, which is too heavy to import here
    default=4,
    show_default=True,
    help="Views that the descriptors of mode robust look at: so many more passes over the images. 0: none.",
)
@click.option(
    "--recogniser",
    metavar="LAYER",
    help="What recognises copies: a layer as in layer2:4x4, or pixels. Default: what does best on a sample of SOURCE.",
)
@click.option(
    "--global-trigger/--no-global-trigger",
    default=False,
    show_default=True,
    help="Also store features under one trigger for all, for --mode tmm --preset fast: optimised, then one more pass.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of the global trigger: blend, clamp, intensity, stretch, trigger.steps, trigger.lr, trigger.tolerance, seed; "
    "as in blend=added; repeatable.",
)
@click.option(
    "--compare-backends",
    is_flag=True,
    help="Export to ONNX, time it against PyTorch, and let searches use the faster.",
)
@click.option("--strict", is_flag=True, help="Fail at an unreadable image instead of skipping it.")
@device_option
@ray_options
def build_index(source: str, index: Path, **options: Any) -> None:
    """Build INDEX from the images in SOURCE and a classifier.

    SOURCE is a folder of class folders, a flat folder (labels are then the model's predictions), Parquet (a file or a
    folder of shards), a folder that save_to_disk of datasets wrote, a CSV or JSON Lines file of paths and labels,
    tar shards of WebDataset, or mnist, cifar10, svhn, gtsrb with --root.

    \b
    Examples:
      engine build-index photos/ photos.idx --model resnet18 --weights resnet18.safetensors --image-size 224
      engine build-index cifar10/ cifar.idx --split train --model resnet18 --small-stem --weights cifar.pt \\
          --mean .4914,.4822,.4465 --std .2470,.2435,.2616
      engine build-index photos/ photos.idx --model hf:vit-folder
      engine build-index photos/ photos.idx --model timm:convnext_tiny.fb_in1k --weights convnext.safetensors
      engine build-index mnist mnist.idx --root data --model mypackage.models:make_net --overwrite
      engine build-index /nfs/photos /nfs/photos.idx --model hf:/nfs/vit-folder --ray head:6379
    """
    from tmm_engine.backends import choose_device
    from tmm_engine.building import build_index as build
    from tmm_engine.cli.display import progress_bar, say_agreement, say_remarks, say_skipped
    from tmm_engine.engine import Engine
    from tmm_engine.index.sources.records import remarks_of
    from tmm_engine.index.store.target import check_target
    from tmm_engine.rerank.settings import GLOBAL_PRESET, GlobalRecipe, preset

    if options["settings"] and not options["global_trigger"]:
        raise click.UsageError("--set needs --global-trigger: no other part of a build has TMM settings")
    ray = ray_asked(options)
    check_target(index, overwrite=options["overwrite"])
    device = choose_device(options["device"])
    images = opened_source(source, options)
    classifier = classifier_of(images, options).to(device)
    said = (*classifier.notes, *remarks_of(images))
    say_remarks(said)
    recipe = GlobalRecipe.of(preset(GLOBAL_PRESET)).with_settings(options["settings"])
    with progress_bar() as progress:
        report = build(
            images,
            index,
            classifier,
            views=options["views"],
            recogniser=options["recogniser"],
            global_trigger=recipe if options["global_trigger"] else None,
            overwrite=options["overwrite"],
            neighbours=options["neighbours"],
            strict=options["strict"],
            ray=ray,
            progress=progress,
        )
    say_skipped(report)
    say_remarks(report.remarks, said=said)
    if options["compare_backends"]:
        with Engine.open(index, model=options["model"], device=options["device"]) as engine:
            speeds = engine.compare_backends()
        click.echo(", ".join(f"{name}: {speed:,.0f} images/s" for name, speed in speeds.items()), err=True)
    if options["views"]:
        click.echo(f"mode robust: {_chosen(index)}", err=True)
    say_agreement(report)
    labels = "labels predicted by the model" if report.labels_predicted else "labels given"
    click.echo(f"{index}: {report.exemplars:,} exemplars of {images.name}, {labels}")


def _chosen(index: Path) -> str:
    """What was chosen for mode robust, in a line."""
    from tmm_engine.info import describe_index

    found = describe_index(index)["descriptors"]
    weights = ", ".join(f"{weight:g} · {source}" for source, weight in found["robust"].items())
    how = f"chosen on {found['sample']:,} images" if found["changed"] else "by default: too few to measure on"
    return f"ranks by {weights}; recognises copies by {found['recogniser']}; {how} (engine info says more)"
