"""Building a collection, as a job: for those who have a key to write with, if there are keys."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tmm_engine.building import build_index
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.preprocessing import shape_of
from tmm_engine.index.progress import Progress
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.sources.records import EncodedSource, ImageSource
from tmm_engine.results import FailedQuery
from tmm_engine.serving.arriving import Arriving, all_arriving, remarked, source_of
from tmm_engine.serving.collection import Collection
from tmm_engine.serving.problems import documented
from tmm_engine.serving.reading import json_of, valid
from tmm_engine.serving.requests import NewCollection
from tmm_engine.serving.responses import JobAnswer
from tmm_engine.serving.routes.collections import summary
from tmm_engine.serving.settings import SUFFIX
from tmm_engine.serving.state import Serving, State, may_write

router = APIRouter(tags=["changes"], dependencies=[Depends(may_write)])


@router.post(
    "/collections",
    status_code=202,
    response_model=JobAnswer,
    responses=documented(400, 401, 403, 404, 408, 409, 413, 415, 422, 503),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/NewCollection"}}},
        }
    },
)
async def build_collection(request: Request, state: Serving) -> Response:
    """Build an index and serve it, as a job: it is there whole, or not at all."""
    asked = valid(NewCollection, await json_of(request))
    folder = state.settings.builds
    if folder is None:
        raise HTTPException(403, "this server builds no collections; `engine serve --builds FOLDER` does")
    like, path = state.collections[asked.like], folder / f"{asked.name}{SUFFIX}"
    if asked.name in state.collections or path.exists():
        raise HTTPException(409, f"there is a collection {asked.name!r} already; choose another name")
    shape, limits = shape_of(like.shown.engine.classifier.target), state.settings.limits
    given = asked.exemplars or []
    arriving = await to_thread.run_sync(all_arriving, given, shape, limits, limiter=state.decoding)
    source = await to_thread.run_sync(_source, asked, state.settings.sources)
    job = state.jobs.start("build", asked.name, partial(_built, state, asked, source or arriving, path))
    return JSONResponse(job.told(), 202, headers={"Location": f"/jobs/{job.id}"})


def _source(asked: NewCollection, sources: Path | None) -> Path | None:
    """Of the server's own images, if it is those."""
    if (asked.source is None) == (asked.exemplars is None):
        raise InputError("expected either exemplars or a source, got " + ("none" if asked.source is None else "both"))
    if asked.source is None:
        return None
    if sources is None:
        raise HTTPException(403, "this server has no sources to build of; `engine serve --sources FOLDER` does")
    root = sources.resolve()
    try:
        found = (root / asked.source).resolve()
        if found.is_relative_to(root) and found.exists():
            return found
    except (OSError, ValueError, RuntimeError):  # no name of a file, or a link to itself
        pass
    raise InputError(f"source: expected a folder or a file among the server's sources, got {asked.source!r}")


def _built(
    state: State, asked: NewCollection, given: Path | list[Arriving], path: Path, progress: Progress
) -> dict[str, Any]:
    collection, remarks = _opened(state, asked, given, path, progress)
    return summary(collection, collection.shown) | remarks


def _opened(
    state: State, asked: NewCollection, given: Path | list[Arriving], path: Path, progress: Progress
) -> tuple[Collection, dict[str, Any]]:
    """The new collection, open, and what is said of its images; nothing is left of one that cannot be opened."""
    if asked.name in state.collections:  # since it was asked for
        raise InputError(f"there is a collection {asked.name!r} already; choose another name")
    like = state.collections[asked.like]
    classifier = like.classifier()
    failed: list[FailedQuery] = []
    if isinstance(given, Path):
        source = _opened_within(given, state.settings.sources)
        source.name = str(asked.source)
    else:
        source, failed = source_of(given, classifier.target, max_pixels=state.settings.limits.pixels)
    report = build_index(
        source,
        path,
        classifier,
        views=asked.views,
        recogniser=asked.recogniser,
        neighbours=asked.neighbours,
        progress=progress,
    )
    try:
        collection, remarks = like.beside(asked.name, path), _public(remarked(report, failed), state)
        state.collections.add(collection)
        return collection, remarks
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)  # it was built here, just now: what was there before is refused above
        raise


def _public(said: dict[str, Any], state: State) -> dict[str, Any]:
    """What is said of images, without the server's folders."""
    skipped = [{name: state.folders.left_out_of(text) for name, text in each.items()} for each in said["skipped"]]
    return {"skipped": skipped, "remarks": [state.folders.left_out_of(text) for text in said["remarks"]]}


def _opened_within(given: Path, sources: Path | None) -> ImageSource:
    """A source none of whose files is outside of the server's sources, whatever links or tables say.

    Raises:
        InputError: a link leads outside, or as `open_source`.
    """
    assert sources is not None
    root = sources.resolve()
    for folder, below, files in os.walk(given):
        for path in (Path(folder, name) for name in (*below, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise InputError(f"{path}: expected nothing from outside of the server's sources, got a link to it")
    source = open_source(given)
    if isinstance(source, EncodedSource):
        source.within = root
    return source
