"""Whether the server lives, and whether it can answer: without a key."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from tmm_engine.serving.state import Serving

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """The process answers."""

    alive: bool = True


class Ready(BaseModel):
    """Whether every collection can be searched as it is on disk."""

    ready: bool
    collections: dict[str, bool]


@router.get("/livez")
async def live() -> Alive:
    """Whether the process answers."""
    return Alive()


@router.get("/readyz", response_model=Ready, responses={503: {"model": Ready}})
async def ready(state: Serving) -> Response:
    """Whether every collection can be searched: 503 where the newest version of one cannot be opened."""
    found = {name: collection.trouble is None for name, collection in state.collections.items()}
    content = Ready(ready=all(found.values()), collections=found)
    return JSONResponse(content.model_dump(), 200 if content.ready else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(state: Serving) -> Response:
    """For Prometheus: requests, seconds by step and mode, queues, exemplars, memory, device."""
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
