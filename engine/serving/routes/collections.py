"""Collections and their exemplars."""

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Header, Path, Query, Response
from starlette.exceptions import HTTPException

from tmm_engine.engine import Engine
from tmm_engine.index.errors import nearest
from tmm_engine.index.names import spelled
from tmm_engine.index.types import Rows
from tmm_engine.serving.collection import Collection, Shown
from tmm_engine.serving.problems import documented
from tmm_engine.serving.responses import (
    CollectionAnswer,
    CollectionsAnswer,
    ExemplarAnswer,
    ExemplarsAnswer,
    LikenessAnswer,
)
from tmm_engine.serving.state import Chosen, Serving, may_read
from tmm_engine.serving.thumbnails import LARGEST
from tmm_engine.serving.wire import as_json

router = APIRouter(tags=["collections"], dependencies=[Depends(may_read)], responses=documented(401))
ExemplarId = Annotated[str, Path(alias="id", description="Of the exemplar, slashes and all.", examples=["cat/001.png"])]


@router.get("/collections", response_model=CollectionsAnswer)
def list_collections(state: Serving) -> dict[str, Any]:
    """What there is."""
    return {"collections": [summary(each, each.shown) for each in state.collections.values()]}


@router.get("/collections/{name}", response_model=CollectionAnswer, responses=documented(404, 422))
def describe_collection(collection: Chosen, state: Serving) -> dict[str, Any]:
    """What a collection holds: versions, classes, model, descriptors."""
    shown = collection.shown
    about = {"metadata": list(shown.metadata), "facts": shown.facts}
    trouble = None if collection.trouble is None else state.folders.left_out_of(collection.trouble)
    return summary(collection, shown) | about | {"changed": collection.changed, "trouble": trouble}


@router.get("/collections/{name}/likeness", response_model=LikenessAnswer, responses=documented(404, 422))
def usual_scores(collection: Chosen) -> dict[str, Any]:
    """What scores are usual: how near exemplars are to the one nearest to them, and any two to each other."""
    return collection.shown.likeness.told()


@router.get("/collections/{name}/exemplars", response_model=ExemplarsAnswer, responses=documented(404, 422))
def list_exemplars(
    collection: Chosen,
    where: Annotated[str | None, Query(description="Only those that match, as of a search.")] = None,
    start: Annotated[int, Query(ge=0, le=2**62, description="How many to pass over.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="How many to list.")] = 100,
) -> Response:
    """Exemplars in the order in which they are stored."""
    engine = collection.shown.engine if where is None else collection.shown.engine.matching(where)
    rows = np.arange(len(engine.store))[start : start + limit]
    content = {"total": len(engine.store), "exemplars": _told(engine, rows)}
    return Response(as_json(content), media_type="application/json")


@router.get("/collections/{name}/exemplars/{id:path}", response_model=ExemplarAnswer, responses=documented(404, 422))
def describe_exemplar(collection: Chosen, exemplar_id: ExemplarId) -> Response:
    """One exemplar, but for its pixels."""
    shown = collection.shown
    [found] = _told(shown.engine, np.array([row_of(shown, exemplar_id)]))
    return Response(as_json(found), media_type="application/json")


@router.get(
    "/collections/{name}/images/{id:path}",
    response_class=Response,
    responses=documented(404, 422)
    | {200: {"content": {"image/png": {}}}, 304: {"description": "It is what If-None-Match names."}},
)
def show_exemplar(
    collection: Chosen,
    exemplar_id: ExemplarId,
    size: Annotated[
        int | None,
        Query(ge=16, le=LARGEST, description="Side of a square that it fills, in pixels; by default as it is stored."),
    ] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The picture of an exemplar as PNG."""
    shown = collection.shown
    found = shown.thumbnails.of(row_of(shown, exemplar_id), side=size)
    headers = {"ETag": found.tag, "Cache-Control": "private, max-age=60"}
    known = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
    if known & {found.tag, "*"}:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type="image/png")


def row_of(shown: Shown, exemplar_id: str) -> int:
    """The place of an exemplar.

    Raises:
        HTTPException: 404, there is none of this id.
    """
    rows = shown.rows
    known = spelled([exemplar_id], rows).get(exemplar_id)
    if known is None:
        raise HTTPException(404, f"no exemplar has the id {exemplar_id!r}{nearest(exemplar_id, rows)}")
    return rows[known]


def summary(collection: Collection, shown: Shown) -> dict[str, Any]:
    """A version of a collection in short."""
    return {
        "name": collection.name,
        "version": shown.version,
        "exemplars": len(shown.engine),
        "modes": list(shown.modes),
    }


def _told(engine: Engine, rows: Rows) -> list[dict[str, Any]]:
    """Exemplars as plain values."""
    store, names, classes = engine.store, engine.label_names, len(engine.class_names)
    labels, predicted, metadata = store.labels[rows], store.predictions(rows), store.metadata(rows)
    return [
        {
            "id": str(store.ids[row]),
            "label": int(label),
            "class_name": names[label],
            "label_is_predicted": bool(store.label_is_predicted[row]),
            "label_is_class": bool(label < classes),
            "predicted_label": int(own),
            "predicted_class": names[own],
            "metadata": about,
        }
        for row, label, own, about in zip(rows, labels, predicted, metadata, strict=True)
    ]
