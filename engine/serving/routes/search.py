"""Searching a collection."""

import asyncio
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request, Response

from tmm_engine.index.errors import ImageError
from tmm_engine.options import Mode, SearchOptions
from tmm_engine.query import Query as Decoded
from tmm_engine.results import FailedQuery, SearchResult
from tmm_engine.serving.changing import changed
from tmm_engine.serving.collection import Collection, Shown
from tmm_engine.serving.problems import documented
from tmm_engine.serving.reading import FORM, Asked, decoded, read_search
from tmm_engine.serving.schemas import SearchAnswer, SearchParameters
from tmm_engine.serving.settings import Limits
from tmm_engine.serving.state import Chosen, Serving, may_read
from tmm_engine.serving.wire import as_json, told

router = APIRouter(tags=["search"], dependencies=[Depends(may_read)])
BODIES = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/SearchBody"}},
            FORM: {"schema": {"$ref": "#/components/schemas/SearchForm"}},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


@router.post(
    "/collections/{name}/search",
    response_model=SearchAnswer,
    openapi_extra=BODIES,
    responses=documented(400, 401, 404, 413, 415, 422, 503),
)
async def search(
    request: Request,
    collection: Chosen,
    state: Serving,
    _parameters: Annotated[SearchParameters, Query()],
) -> Response:
    """The exemplars that the model sees as most like each query: JSON, a form with files, or an image as the body.

    A query among several that cannot be searched with has an error in its place; one that is alone is an error.
    """
    limits = state.settings.limits
    asked = await read_search(request, limits)
    options = asked.parameters.asked()
    shown = collection.shown
    read = partial(_read, asked, shown, limits)
    queries = await to_thread.run_sync(read, limiter=state.decoding)
    results = await _answers(collection, shown, queries, options)
    if len(results) == 1 and isinstance(results[0], FailedQuery):
        raise ImageError(results[0].error)
    content = partial(_content, collection, shown, results, asked.parameters)
    heavy = asked.parameters.pictures or asked.parameters.pixels
    return Response(await to_thread.run_sync(content) if heavy else content(), media_type="application/json")


def _read(asked: Asked, shown: Shown, limits: Limits) -> list[Decoded | FailedQuery]:
    found = decoded(asked.queries, shown.engine, limits)
    return [changed(each, asked.parameters) if isinstance(each, Decoded) else each for each in found]


async def _answers(
    collection: Collection, shown: Shown, queries: list[Decoded | FailedQuery], options: SearchOptions
) -> list[SearchResult | FailedQuery]:
    """In the order of the queries; those of a request are one search, as a list in Python is."""
    good = [each for each in queries if isinstance(each, Decoded)]
    if not good:
        return [each for each in queries if isinstance(each, FailedQuery)]
    lane = collection.thorough if options.mode == Mode.TMM or options.explain else collection.quick
    asked = lane.ask(
        good, lambda items: shown.engine.search_each(items, options), kind=(shown, options) if len(good) == 1 else None
    )
    found = await asyncio.wrap_future(asked)
    answers = iter(found)
    return [next(answers) if isinstance(each, Decoded) else each for each in queries]


def _content(
    collection: Collection, shown: Shown, results: list[SearchResult | FailedQuery], asked: SearchParameters
) -> bytes:
    found: list[dict[str, Any]] = [told(each, pictures=asked.pictures, pixels=asked.pixels) for each in results]
    return as_json({"collection": collection.name, "version": shown.version, "results": found})
