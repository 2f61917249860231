"""Options that several commands share, and how their texts are read. Nothing heavy is imported."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.sizes import parse_size

if TYPE_CHECKING:
    from tmm_engine.cluster.connection import RayOptions
    from tmm_engine.index.sources.records import ImageSource

Command = TypeVar("Command", bound=Callable[..., Any])

MODES = ("robust", "tmm", "l2", "cosine")


def joined(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in their order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """Parse `1,2,3`."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"expected numbers separated by commas, got {text!r}") from None


def lines(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Read a text file's lines, without empty ones."""
    if text is None:
        return None
    try:
        found = tuple(line.strip() for line in Path(text).read_text("utf-8").split("\n") if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"expected a text file with a name in each line, got {text!r}: {error}") from None
    if not found:
        raise click.BadParameter(f"expected a text file with a name in each line, got an empty one, {text!r}")
    return found


def modes(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Parse `tmm,l2`; every mode once."""
    if text is None:
        return None
    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for mode in chosen:
        if mode not in MODES:
            raise click.BadParameter(f"unknown mode {mode!r}{nearest(mode, MODES)}; known: {', '.join(MODES)}")
    return chosen


def size(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """Parse `224` or `HEIGHTxWIDTH`."""
    if text is None:
        return None
    try:
        height, width = (int(side) for side in (text.split("x") if "x" in text else (text, text)))
    except ValueError:
        raise click.BadParameter(f"expected a side or HEIGHTxWIDTH, got {text!r}") from None
    if min(height, width) < 1:
        raise click.BadParameter(f"expected sides of at least 1, got {text!r}")
    return height, width


def ratio(context: click.Context, parameter: click.Parameter, text: str | None) -> float | Literal[False] | None:
    """Parse `0.8`; `off` is False."""
    if text is None or text.lower() in ("off", "none", "false"):
        return None if text is None else False
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value <= 1.0:  # as TmmConfig, which is too heavy to import here
        raise click.BadParameter(f"expected a ratio from 0.01 to 1, or off, got {text!r}")
    return value


def size_in_bytes(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """Parse `4GiB`, `512 MB` or a plain number of bytes."""
    try:
        return None if text is None else parse_size(text)
    except InputError as error:
        raise click.BadParameter(str(error)) from None


source_options = joined(
    click.option(
        "--split", help="Split of a data set or folder: train, test, … Default: the only one; torchvision: train."
    ),
    click.option(
        "--root", type=click.Path(path_type=Path), help="Where torchvision data sets are, or are downloaded to."
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Only the first so many images."),
    click.option("--image-column", metavar="NAME", help="Of a table, where several columns could be the images."),
    click.option("--label-column", metavar="NAME", help="Of a table, where several columns could be the labels."),
)


def opened_source(source: str, options: Mapping[str, Any]) -> "ImageSource":
    """The source that a command names, with its options."""
    from tmm_engine.index.sources.opening import open_source

    names = ("split", "root", "limit", "image_column", "label_column")
    return open_source(source, **{name: options[name] for name in names})


cache_option = click.option(
    "--cache-images",
    callback=size_in_bytes,
    default="4GiB",
    show_default=True,
    help="What may stay in memory between searches: images, then features.",
)
model_option = click.option(
    "--model",
    metavar="NAME",
    help="torchvision architecture, vit_tiny_32, timm:NAME, hf:FOLDER, or package.module:factory.",
)
device_option = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, or auto.")
ray_options = joined(
    click.option(
        "--ray",
        is_flag=False,
        flag_value="auto",
        metavar="[ADDRESS]",
        help="Use a Ray cluster: HOST:PORT, or the one on this machine, else a new one here. Needs the extra 'ray'.",
    ),
    click.option("--ray-cpus", type=click.IntRange(min=1), help="CPUs for each worker of --ray. Default: 1."),
)


def ray_asked(options: Mapping[str, Any]) -> "RayOptions | None":
    """The cluster that a command names; None for none."""
    from tmm_engine.cluster.connection import RayOptions

    if options["ray"] is None:
        if options["ray_cpus"] is not None:
            raise click.UsageError("--ray-cpus has no effect without --ray")
        return None
    return RayOptions(address=options["ray"], cpus=options["ray_cpus"] or 1, device=options["device"])
