"""Errors as RFC 9457 problems, in the words of the command line."""

import asyncio
import errno
import os
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tmm_engine.cli.wording import for_command_line
from tmm_engine.index.errors import IndexStateError, InputError, ModelError, TmmEngineError, printable

FULL = ("is the disk full?", *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
MEDIA_TYPE = "application/problem+json"
SLOWEST = 8 << 10
PORT, ORIGIN = re.compile(r":\d*$"), re.compile(r"^https?://")


class Problem(BaseModel):
    """RFC 9457."""

    title: str = Field(description="What kind of problem, the same for every one of its kind.")
    status: int = Field(description="The HTTP status code.", ge=400, le=599)
    detail: str = Field(description="What was expected, what was got, and what to do.")


def problem(status: int, detail: str, *, headers: dict[str, str] | None = None) -> JSONResponse:
    """A response that says what is wrong."""
    text = printable(for_command_line(detail))
    content = Problem(title=HTTPStatus(status).phrase, status=status, detail=text).model_dump()
    return JSONResponse(content, status, headers=headers, media_type=MEDIA_TYPE)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: these statuses are answered with a problem."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in sorted(statuses)}


def status_of(error: TmmEngineError) -> int:
    """Of an error of ours: the request's fault, or that of what the server has."""
    if isinstance(error, InputError):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    said = f"{error} {error.__cause__}"  # Lance, too, says it in the system's words
    full = any(words in said for words in FULL)
    return HTTPStatus.INSUFFICIENT_STORAGE if full else HTTPStatus.INTERNAL_SERVER_ERROR


def install(app: FastAPI) -> None:
    """Answer every error of an application with a problem."""

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def of_validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, "; ".join(_sentence(each) for each in error.errors()))

    @app.exception_handler(Exception)
    async def of_others(_: Request, error: Exception) -> JSONResponse:
        return problem(500, f"this should not happen ({type(error).__name__}); the server's log says where")

    async def of_ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, TmmEngineError)
        return problem(status_of(error), request.app.state.serving.folders.left_out_of(str(error)))

    for kind in (InputError, ModelError, IndexStateError):
        app.add_exception_handler(kind, of_ours)


class BodyLimit:
    """Refuses a body that is too long, by its own account before anything of it is read, or as it comes; and one that
    does not come on.

    Args:
        app: What is asked otherwise.
        limit: In bytes.
        patience: Seconds that a body may take, beside one for every `SLOWEST` bytes of it.
    """

    def __init__(self, app: ASGIApp, limit: int, *, patience: float) -> None:
        self._app, self._limit, self._patience = app, limit, patience
        self._said = f"expected a body of at most {limit:,} bytes, got a longer one"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an application of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            await problem(413, self._said)(scope, receive, send)
            return
        length, whole, began = 0, False, asyncio.get_running_loop().time()

        async def counted() -> Message:
            nonlocal length, whole
            if whole:
                return await receive()  # that the client is gone, for which there is no hurry
            spent = asyncio.get_running_loop().time() - began
            left = self._patience + length / SLOWEST - spent
            try:
                async with asyncio.timeout(min(self._patience, left)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"expected a body that comes on, got {length:,} bytes of it, too slowly"
                ) from None
            length += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if length > self._limit:
                raise HTTPException(413, self._said)
            return message

        await self._app(scope, counted, send)


class OwnOrigin:
    """Refuses what a page of another origin asks through a visitor's browser, but for what changes nothing; and what is
    addressed to another name, which such a page could make lead here.

    Starlette's own check of names answers in plain text, which is no problem, and knows no IPv6 address.

    Args:
        app: What is asked otherwise.
        hosts: Names and addresses of this server.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an application of ASGI."""
        refused = self._refused(scope) if scope["type"] == "http" else None
        await (refused or self._app)(scope, receive, send)

    def _refused(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if PORT.sub("", host).lower() not in self._hosts:
            return problem(400, f"expected a request to {' or '.join(self._hosts)}, got one to {host!r}")
        changes = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if changes and origin is not None and ORIGIN.sub("", origin) != host:
            return problem(403, f"expected a request from this server's own page, got one from a page of {origin}")
        return None


def _sentence(error: dict[str, Any]) -> str:
    """One finding of pydantic's."""
    place = ".".join(str(part) for part in error["loc"] if part not in ("body", "query", "path"))
    said = str(error["msg"]).removeprefix("Value error, ")  # of ours, which says where itself
    return f"{place}: {said}" if place else said
