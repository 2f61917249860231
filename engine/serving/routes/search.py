"""Searching a collection."""

from dataclasses import replace
from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response

from tmm_engine.options import Mode
from tmm_engine.query import Query as Decoded
from tmm_engine.results import FailedQuery, SearchResult
from tmm_engine.serving.answering import Asked, answers, read
from tmm_engine.serving.changing import changed
from tmm_engine.serving.collection import Collection
from tmm_engine.serving.problems import documented
from tmm_engine.serving.reading import SEARCH, described
from tmm_engine.serving.requests import SearchParameters
from tmm_engine.serving.responses import SearchAnswer
from tmm_engine.serving.state import Chosen, Serving, may_read
from tmm_engine.serving.wire import as_json, told

router = APIRouter(tags=["search"], dependencies=[Depends(may_read)])


@router.post(
    "/collections/{name}/search",
    response_model=SearchAnswer,
    openapi_extra=described(SEARCH),
    responses=documented(400, 401, 403, 404, 408, 413, 415, 422, 503),
)
async def search(request: Request, collection: Chosen, state: Serving) -> Response:
    """The exemplars that the model sees as most like each query: JSON, a form with files, or an image as the body.

    A query among several that cannot be searched with has an error in its place; one that is alone is an error.
    """
    asked = await read(request, SEARCH, collection, state, change=changed)
    options = asked.options
    if len(asked.queries) == 1 and options.mode != Mode.TMM and not state.settings.batched:
        options = replace(options, alone=True)  # others' queries may be beside it, and are not to be seen in its answer

    def work(queries: list[Decoded]) -> list[SearchResult | FailedQuery]:
        found = asked.shown.engine.search_each(queries, options)
        state.metrics.searched(found)
        return found

    thorough = options.mode == Mode.TMM or options.explain
    lane = collection.thorough if thorough else collection.quick
    results = await answers(lane, asked, work, alone=options.together)  # strangers' triggers would be optimised with it
    content = partial(_content, collection, asked, results)
    heavy = asked.parameters.pictures or asked.parameters.pixels or len(results) > 1
    return Response(await to_thread.run_sync(content) if heavy else content(), media_type="application/json")


def _content(
    collection: Collection, asked: Asked[SearchParameters], results: list[SearchResult | FailedQuery]
) -> bytes:
    how = asked.parameters
    found = [told(each, pictures=how.pictures, pixels=how.pixels) for each in results]
    return as_json({"collection": collection.name, "version": asked.shown.version, "results": found})
