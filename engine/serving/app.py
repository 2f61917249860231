"""The application: collections behind routes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from tmm_engine import __version__
from tmm_engine.index.errors import TmmEngineError, WriterBusyError
from tmm_engine.serving import problems
from tmm_engine.serving.collection import Collections, UnknownCollectionError
from tmm_engine.serving.folders import Folders
from tmm_engine.serving.jobs import Jobs, UnknownJobError
from tmm_engine.serving.lane import BusyError
from tmm_engine.serving.metrics import Counting, Metrics
from tmm_engine.serving.problems import BodyLimit, OwnOrigin, Problem, problem
from tmm_engine.serving.requests import (
    ClassifyBody,
    ClassifyForm,
    NewCollection,
    NewExemplar,
    NewExemplars,
    SearchBody,
    SearchForm,
)
from tmm_engine.serving.routes import audit, builds, changes, classify, health, jobs, page, search
from tmm_engine.serving.routes import collections as of_collections
from tmm_engine.serving.settings import REFRESH_SECONDS, Settings
from tmm_engine.serving.state import State

ABOUT = """\
Which known images does a classifier see as like this one? Collections are indexes of `tmm-engine`.

Errors are problems (RFC 9457), in the words of the command line. Where the server was started with keys, the header
`api-key` has one.
"""

BY_HAND = (SearchBody, SearchForm, ClassifyBody, ClassifyForm, NewExemplar, NewExemplars, NewCollection, Problem)


def make_app(collections: Collections, settings: Settings | None = None) -> FastAPI:
    """An application over collections, which it closes when it ends.

    Args:
        collections: Open.
        settings: Limits, keys and hosts.
    """
    settings, metrics = settings or Settings(), Metrics(collections)

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        folders = Folders(collections, settings)
        jobs, decoding = Jobs(folders.left_out_of), CapacityLimiter(settings.limits.decoding)
        state = State(collections, settings, decoding, jobs, metrics, folders)
        app.state.serving = state
        watching = asyncio.create_task(_watch(collections))
        yield
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await to_thread.run_sync(state.jobs.close)
        await to_thread.run_sync(collections.close)

    app = _Described(
        title="tmm-engine",
        version=__version__,
        description=ABOUT,
        docs_url=None,
        redoc_url=None,
        lifespan=living,
    )
    problems.install(app)
    _install_own_problems(app)
    for room in (search, classify, of_collections, builds, changes, audit, jobs, health):
        app.include_router(room.router)
    page.mount(app)
    app.add_middleware(Counting, metrics=metrics)
    app.add_middleware(BodyLimit, limit=settings.limits.body_bytes, patience=settings.limits.body_seconds)
    if settings.hosts:
        app.add_middleware(OwnOrigin, hosts=settings.hosts)
    return app


class _Described(FastAPI):
    """Whose OpenAPI has the schemas of bodies that are read by hand, and of problems."""

    def openapi(self) -> dict[str, Any]:
        """As FastAPI's."""
        schema = super().openapi()
        known = schema["components"]["schemas"]
        for name, own in _by_hand().items():
            known.setdefault(name, own)
        return schema


def _install_own_problems(app: FastAPI) -> None:
    @app.exception_handler(BusyError)
    async def of_busy(_: Request, error: BusyError) -> JSONResponse:
        return problem(503, str(error), headers={"Retry-After": f"{error.seconds:.0f}"})

    @app.exception_handler(WriterBusyError)
    async def of_writing(request: Request, error: WriterBusyError) -> JSONResponse:
        said = request.app.state.serving.folders.left_out_of(str(error))
        return problem(503, said, headers={"Retry-After": "5"})

    @app.exception_handler(UnknownCollectionError)
    @app.exception_handler(UnknownJobError)
    async def of_unknown(_: Request, error: TmmEngineError) -> JSONResponse:
        return problem(404, str(error))


def _by_hand() -> dict[str, Any]:
    """Schemas by name."""
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in BY_HAND]
    _, found = models_json_schema(models, ref_template="#/components/schemas/{model}")
    return dict(found["$defs"])


async def _watch(collections: Collections) -> None:
    """Show what others have changed on disk."""
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        for collection in collections.values():
            if collection.changed:
                with suppress(Exception):  # the collection says so itself, whatever it is
                    await to_thread.run_sync(collection.refresh)
