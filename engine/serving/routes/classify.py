"""Classifying by the neighbours in a collection."""

from collections.abc import Sequence

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response

from tmm_engine.classifying.classification import Classification, Classifications
from tmm_engine.query import Query as Decoded
from tmm_engine.query import answered
from tmm_engine.results import FailedQuery
from tmm_engine.serving.answering import answers, read
from tmm_engine.serving.problems import documented
from tmm_engine.serving.reading import CLASSIFY, described
from tmm_engine.serving.responses import ClassifyAnswer
from tmm_engine.serving.state import Chosen, Serving, may_read
from tmm_engine.serving.wire import as_json, classified

router = APIRouter(tags=["search"], dependencies=[Depends(may_read)])


@router.post(
    "/collections/{name}/classify",
    response_model=ClassifyAnswer,
    openapi_extra=described(CLASSIFY),
    responses=documented(400, 401, 403, 404, 408, 413, 415, 422, 503),
)
async def classify(request: Request, collection: Chosen, state: Serving) -> Response:
    """The class that the neighbours of each query say, and how far to trust it: asked as a search is."""
    asked = await read(request, CLASSIFY, collection, state)
    how, notes = asked.parameters, list[str]()

    def ask(queries: Sequence[Decoded]) -> Classifications:
        found = asked.shown.engine.classify(
            [*queries], asked.options, alpha=how.alpha, outliers=how.outliers, calibration=how.calibration
        )
        state.metrics.searched([each.search for each in found])
        notes.extend(found.notes)
        return found

    def work(queries: list[Decoded]) -> list[Classification | FailedQuery]:
        return answered(queries, ask)

    results = await answers(collection.thorough, asked, work, alone=True)

    def content() -> bytes:
        told = [classified(each, pixels=how.pixels) for each in results]
        about = {"collection": collection.name, "version": asked.shown.version, "notes": notes}
        return as_json(about | {"results": told})

    return Response(await to_thread.run_sync(content), media_type="application/json")
