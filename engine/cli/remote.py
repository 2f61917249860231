"""A search whose index is on a server. Nothing heavy is imported early."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmm_engine.index.errors import InputError

if TYPE_CHECKING:
    from tmm_engine.client import Asked
    from tmm_engine.options import SearchOptions
    from tmm_engine.results import FailedQuery, SearchResult

HERE_ONLY = {
    "source": None,
    "limit": None,
    "precision": "fp32",
    "backend": "auto",
    "memory": None,
    "search_precision": None,
    "version": None,
    "verify": False,
    "model": None,
    "device": "auto",
}
"""Options of what is opened here, and their values where they were not given."""
TOGETHER = 16


def is_address(index: str) -> bool:
    """Whether an index is one on a server."""
    return index.startswith(("http://", "https://"))


def remote_answers(
    address: str, images: tuple[Path, ...], asked: "list[SearchOptions]", options: dict[str, Any]
) -> "list[SearchResult | FailedQuery]":
    """The answer to every query in every mode, query by query; a query that is alone raises its error."""
    from tmm_engine.client import Client
    from tmm_engine.index.errors import ImageError
    from tmm_engine.results import FailedQuery
    from tmm_engine.serving.keys import READING, WRITING

    for name, default in HERE_ONLY.items():
        if options[name] != default:
            raise click.UsageError(f"--{name.replace('_', '-')} has no effect on an index that is on a server")
    key = os.environ.get(READING) or os.environ.get(WRITING)
    results: list[SearchResult | FailedQuery] = []
    with Client(address, key=key) as client:
        queries: list[Asked] = [*_files(images), *map(client.exemplar, options["ids"])]
        for start in range(0, len(queries), TOGETHER):
            part = queries[start : start + TOGETHER]
            for answers in zip(*(client.search_each(part, each) for each in asked), strict=True):
                results += answers
    if len(queries) == 1 and isinstance(results[0], FailedQuery):
        raise ImageError(results[0].error)
    return results


def _files(paths: tuple[Path, ...]) -> Iterator[Path]:
    """Files, and the images in folders."""
    from tmm_engine.index.sources.images import IMAGE_SUFFIXES

    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(each for each in path.rglob("*") if each.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise InputError(f"{path}: expected images, got none")
        yield from found
