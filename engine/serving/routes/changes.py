"""Changing a collection: for those who have a key to write with, if there are keys."""

import asyncio
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from tmm_engine.index.progress import Progress
from tmm_engine.index.store.changes import ChangeReport
from tmm_engine.results import FailedQuery
from tmm_engine.serving.arriving import Arriving, all_arriving, remarked, source_of
from tmm_engine.serving.collection import Collection
from tmm_engine.serving.problems import documented
from tmm_engine.serving.reading import FORM, RAW, from_base64, json_object, json_of, kind_of, valid
from tmm_engine.serving.requests import NewExemplar, NewExemplars
from tmm_engine.serving.responses import ChangeAnswer, JobAnswer, RefreshAnswer
from tmm_engine.serving.routes.collections import ExemplarId, row_of, summary
from tmm_engine.serving.settings import Limits
from tmm_engine.serving.state import Chosen, Serving, may_write
from tmm_engine.serving.wire import as_json

router = APIRouter(tags=["changes"], dependencies=[Depends(may_write)])
REFUSED = (401, 403, 404, 422, 503)
BINARY = {"schema": {"type": "string", "format": "binary"}}
BODIES = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/NewExemplar"}},
            FORM: {
                "schema": {
                    "type": "object",
                    "properties": {"image": BINARY["schema"], "label": {"type": "string"}},
                    "required": ["image"],
                }
            },
            "image/png": BINARY,
        },
    }
}


@router.put(
    "/collections/{name}/exemplars/{id:path}",
    response_model=ChangeAnswer,
    openapi_extra=BODIES,
    responses=documented(400, 408, 413, 415, 507, *REFUSED)
    | {201: {"model": ChangeAnswer, "description": "It is new."}},
)
async def put_exemplar(
    request: Request,
    collection: Chosen,
    exemplar_id: ExemplarId,
    state: Serving,
    label: Annotated[str | None, Query(description="Its label's name, where the body is the image.")] = None,
) -> Response:
    """Add an exemplar, or put another in its place: it is on disk, and found, when this answers."""
    limits = state.settings.limits
    arriving = await _arriving(request, exemplar_id, label)
    read = partial(source_of, [arriving], collection.shown.engine.classifier.target, max_pixels=limits.pixels)
    source, _ = await to_thread.run_sync(read, limiter=state.decoding)
    asked = collection.changes.ask([source], lambda items: [collection.add(items[0], replace=True)])
    [report] = await asyncio.wrap_future(asked)
    return JSONResponse(_told(report, []), 201 if report.added else 200)


@router.delete(
    "/collections/{name}/exemplars/{id:path}",
    response_model=ChangeAnswer,
    responses=documented(507, *REFUSED),
)
async def delete_exemplar(collection: Chosen, exemplar_id: ExemplarId) -> Response:
    """Remove an exemplar: it is gone, and not found any more, when this answers."""
    row_of(collection.shown, exemplar_id)
    asked = collection.changes.ask([exemplar_id], lambda items: [collection.delete(items)])
    [report] = await asyncio.wrap_future(asked)
    return JSONResponse(_told(report, []))


@router.post(
    "/collections/{name}/exemplars",
    status_code=202,
    response_model=JobAnswer,
    responses=documented(400, 408, 413, 415, *REFUSED),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/NewExemplars"}}},
        }
    },
)
async def add_exemplars(request: Request, collection: Chosen, state: Serving) -> Response:
    """Add many exemplars, as a job: one new version, whole or not at all."""
    body = valid(NewExemplars, await json_of(request))
    limits, shape = state.settings.limits, collection.shown.engine.store.image_shape
    arriving = await to_thread.run_sync(all_arriving, body.exemplars, shape, limits, limiter=state.decoding)
    work = partial(_add, collection, arriving, limits, body.replace)
    job = state.jobs.start("add", collection.name, work)
    return JSONResponse(job.told(), 202, headers={"Location": f"/jobs/{job.id}"})


@router.post("/collections/{name}/refresh", response_model=RefreshAnswer, responses=documented(*REFUSED))
async def refresh(collection: Chosen) -> Response:
    """Search the newest version on disk, from now on; this also happens by itself, within seconds."""
    refreshed = await to_thread.run_sync(collection.refresh)
    return Response(
        as_json(summary(collection, collection.shown) | {"refreshed": refreshed}), media_type="application/json"
    )


def _add(
    collection: Collection, arriving: list[Arriving], limits: Limits, replace: bool, progress: Progress
) -> dict[str, Any]:
    source, failed = source_of(arriving, collection.shown.engine.classifier.target, max_pixels=limits.pixels)
    return _told(collection.add(source, replace=replace, progress=progress), failed)


async def _arriving(request: Request, exemplar_id: str, label: str | None) -> Arriving:
    kind = kind_of(request)
    if kind == "application/json":
        body = valid(NewExemplar, {"label": label} | json_object(await request.body()))
        return Arriving(exemplar_id, from_base64(body.image, "image"), body.label, body.metadata)
    if kind == FORM:
        async with request.form(max_files=2, max_fields=10) as form:
            fields = dict(form.multi_items())
            image, told = fields.pop("image", None), fields.pop("label", label)
            if not isinstance(image, UploadFile) or not isinstance(told, str | None) or fields:
                raise HTTPException(422, "expected a form with the file 'image' and perhaps the text 'label'")
            return Arriving(exemplar_id, await image.read(), told)
    if RAW.fullmatch(kind):
        return Arriving(exemplar_id, await request.body(), label)
    raise HTTPException(
        415, f"expected a body of application/json, {FORM}, or image/…, got {kind or 'no content-type'!r}"
    )


def _told(report: ChangeReport, failed: list[FailedQuery]) -> dict[str, Any]:
    names = ("version", "exemplars", "added", "replaced", "deleted")
    return {name: getattr(report, name) for name in names} | remarked(report, failed)
