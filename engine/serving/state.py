"""What the routes of one application share, and how they get at it: on the event loop, since nothing there waits."""

from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader
from starlette.exceptions import HTTPException

from tmm_engine.serving.collection import Collection, Collections
from tmm_engine.serving.folders import Folders
from tmm_engine.serving.jobs import Jobs
from tmm_engine.serving.keys import HEADER, Right
from tmm_engine.serving.metrics import Metrics
from tmm_engine.serving.settings import Settings

header = APIKeyHeader(name=HEADER, auto_error=False, description="Where the server was started with keys.")


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Of one application.

    Attributes:
        collections: What is served.
        settings: How.
        decoding: How many images are decoded at once.
        jobs: Long work.
        metrics: What is counted.
        folders: Where its files are.
    """

    collections: Collections
    settings: Settings
    decoding: CapacityLimiter
    jobs: Jobs
    metrics: Metrics
    folders: Folders


async def state_of(request: Request) -> State:
    """The application's that a request came to."""
    found = request.app.state.serving
    assert isinstance(found, State)
    return found


Serving = Annotated[State, Depends(state_of)]


async def collection_of(name: str, state: Serving) -> Collection:
    """The one that an address names.

    Raises:
        UnknownCollectionError: there is none.
    """
    return state.collections[name]


Chosen = Annotated[Collection, Depends(collection_of)]


async def may_read(state: Serving, key: Annotated[str | None, Security(header)]) -> None:
    """Refuse who has no key.

    Raises:
        HTTPException: 401.
    """
    _right(state, key)


async def may_write(state: Serving, key: Annotated[str | None, Security(header)]) -> None:
    """Refuse who has no key, or one to read with.

    Raises:
        HTTPException: 401, 403.
    """
    if _right(state, key) is not Right.WRITE:
        raise HTTPException(403, f"this key is {Right.READ}; changes need one that is {Right.WRITE}")


def _right(state: State, key: str | None) -> Right:
    found = state.settings.keys.right_of(key)
    if found is None:
        expected = f"expected a key in the header {HEADER}"
        raise HTTPException(
            401,
            f"{expected}, got none" if key is None else f"{expected} that this server knows, got another",
            headers={"WWW-Authenticate": "ApiKey"},
        )
    return found
