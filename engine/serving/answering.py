"""From a request to answers: read, decoded off the event loop, worked off in a lane."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from anyio import to_thread
from fastapi import Request

from tmm_engine.index.errors import ImageError
from tmm_engine.options import SearchOptions
from tmm_engine.query import Query
from tmm_engine.results import FailedQuery
from tmm_engine.serving.collection import Collection, Shown
from tmm_engine.serving.lane import BusyError, Lane
from tmm_engine.serving.reading import Forms, Parameters, decoded, read_queries
from tmm_engine.serving.state import State

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, eq=False)
class Asked(Generic[Parameters]):
    """What is asked of one version of a collection.

    Attributes:
        shown: That version.
        parameters: How.
        options: As the engine takes them.
        queries: Decoded, or what is wrong with them.
        single: Whether it is one query and no list.
    """

    shown: Shown
    parameters: Parameters
    options: SearchOptions
    queries: list[Query | FailedQuery]
    single: bool


async def read(
    request: Request,
    forms: Forms[Parameters],
    collection: Collection,
    state: State,
    *,
    change: Callable[[Query, Parameters], Query] | None = None,
) -> Asked[Parameters]:
    """A request's queries and options.

    Args:
        request: Not read yet.
        forms: In which it may come.
        collection: That is asked.
        state: Of the application.
        change: Of every query, by the parameters.

    Raises:
        BusyError: too many images wait to be decoded.
        HTTPException: as `read_queries`.
        InputError: options without effect, or no exemplar has an id.
    """
    limits, shown = state.settings.limits, collection.shown
    if state.decoding.statistics().tasks_waiting >= limits.waiting:
        raise BusyError(1.0)
    given = await read_queries(request, forms, limits)
    options = given.parameters.asked()

    def prepared() -> list[Query | FailedQuery]:
        found = decoded(given.queries, shown.engine, limits)
        if change is None:
            return found
        return [change(each, given.parameters) if isinstance(each, Query) else each for each in found]

    queries = await to_thread.run_sync(prepared, limiter=state.decoding)
    return Asked(shown, given.parameters, options, queries, given.single)


async def answers(
    lane: Lane,
    asked: Asked[Parameters],
    work: Callable[[list[Query]], Sequence[Answer | FailedQuery]],
    *,
    alone: bool = False,
) -> list[Answer | FailedQuery]:
    """In the order of the queries, with what is wrong in the place of an answer.

    Queries of different requests that are asked alike may be worked off together; those of one request are one list.

    Args:
        lane: Where.
        asked: What.
        work: Answers queries, in their order.
        alone: Without those of other requests.

    Raises:
        ImageError: the only query cannot be answered.
        BusyError: too much waits.
    """
    good = [each for each in asked.queries if isinstance(each, Query)]
    found: list[Answer | FailedQuery] = []
    if good:
        kind = None if alone or len(good) > 1 else (asked.shown, asked.options)
        found = await asyncio.wrap_future(lane.ask(good, work, kind=kind))
    ready = iter(found)
    results = [next(ready) if isinstance(each, Query) else each for each in asked.queries]
    if asked.single and isinstance(results[0], FailedQuery):
        raise ImageError(results[0].error)
    return results
