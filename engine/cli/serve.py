"""The command serve. Nothing heavy is imported early."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from tmm_engine.cli.options import device_option, size_in_bytes
from tmm_engine.index.errors import InputError


@click.command()
@click.argument("indexes", nargs=-1, required=True, metavar="[NAME=]INDEX...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; elsewhere than here with keys.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With lines 'read-only KEY' and 'read-write KEY'. Also: the environment's TMM_ENGINE_API_KEY and "
    "TMM_ENGINE_READ_ONLY_API_KEY.",
)
@click.option("--max-upload", callback=size_in_bytes, default="32MiB", show_default=True, help="Of one request.")
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=32 << 20,
    show_default=True,
    help="Height times width of an image.",
)
@click.option("--max-images", type=click.IntRange(min=1), default=64, show_default=True, help="Queries in one request.")
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Images that may wait for an index; what is more is answered 503, with when to ask again.",
)
@click.option(
    "--batched",
    is_flag=True,
    help="Let images of different requests pass the network together: more a second where many ask, and scores that "
    "differ by rounding, about 1e-6, from those of an image alone.",
)
@click.option(
    "--builds",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Let clients that may write build collections, whose indexes are kept there; those that are there are served.",
)
@click.option(
    "--sources",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="What such a collection may be built of beside images in the request: what is in there.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]MODULE:FACTORY",
    help="Of an index whose model is your own code; with NAME= where several indexes are served; repeatable.",
)
@device_option
def serve(indexes: tuple[str, ...], *, host: str, port: int, keys: Path | None, device: str, **options: Any) -> None:
    """Serve indexes over HTTP, each as a collection: for programs at /docs, for eyes at /.

    Without keys only this machine may ask. Ctrl-C finishes what has begun.

    \b
    Examples:
      engine serve photos.idx
      engine serve cats=photos.idx dogs=other.idx --port 8080
      engine serve photos.idx --host 0.0.0.0 --keys keys.txt
      engine serve photos.idx --builds built/ --sources photos/
    """
    _require_extra()
    from tmm_engine.serving.keys import Keys
    from tmm_engine.serving.running import add_built, listening, named_indexes, open_collections, serving
    from tmm_engine.serving.settings import Limits, Settings

    if options["sources"] and not options["builds"]:
        raise click.UsageError("--sources needs --builds: nothing else reads them")
    named = named_indexes(indexes)
    limits = Limits(
        body_bytes=options["max_upload"],
        pixels=options["max_pixels"],
        images=options["max_images"],
        waiting=options["queue"],
    )
    settings = Settings(
        limits=limits,
        keys=Keys.given(keys),
        batched=options["batched"],
        builds=options["builds"],
        sources=options["sources"],
    )
    with listening(host, port, settings) as socket:
        collections = open_collections(named, models=_models(options["models"], named), device=device, limits=limits)
        for left_out in add_built(collections, options["builds"]) if options["builds"] else ():
            click.echo(left_out, err=True)
        for name, collection in collections.items():
            shown = collection.shown
            click.echo(f"{name}: {collection.path}, version {shown.version}, {len(shown.engine):,} exemplars", err=True)
        host, port = socket.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        click.echo(f"serving at http://{address} (page: /, API: /docs); Ctrl-C stops", err=True)
        serving(collections, settings, socket)


def _models(given: tuple[str, ...], named: dict[str, Path]) -> dict[str, str]:
    """By name of the collection; where there is only one, a model alone is its."""
    found = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not equals:
            if len(named) > 1:
                raise click.UsageError(f"--model {text}: of which index? Say NAME={text}")
            [name], model = named, text
        found[name] = model
    for name, model in found.items():
        click.echo(f"{name}: the model is your code, {model}", err=True)
    return found


def _require_extra() -> None:
    packages = ("fastapi", "prometheus_client", "python_multipart", "uvicorn")
    if missing := [name for name in packages if find_spec(name) is None]:
        raise InputError(
            f"engine serve needs the 'serve' extra: pip install 'tmm-engine[serve]' (missing: {', '.join(missing)})"
        )
