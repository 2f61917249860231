"""Long work: how far it is, and what came of it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from tmm_engine.serving.problems import documented
from tmm_engine.serving.responses import JobAnswer, JobResultAnswer, JobsAnswer
from tmm_engine.serving.state import Serving, may_read, may_write
from tmm_engine.serving.wire import as_json

router = APIRouter(tags=["jobs"], dependencies=[Depends(may_read)], responses=documented(401))
LOOK_SECONDS = 0.1


@router.get("/jobs", response_model=JobsAnswer)
async def list_jobs(state: Serving) -> dict[str, Any]:
    """All that are remembered, the newest first."""
    return {"jobs": [job.told() for job in state.jobs.all()]}


@router.get("/jobs/{job_id}", response_model=JobResultAnswer, responses=documented(404, 422))
async def describe_job(job_id: str, state: Serving) -> Response:
    """How far it is; once it is done, with its result."""
    job = state.jobs[job_id]
    return Response(as_json(job.told() | {"result": job.result}), media_type="application/json")


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse, responses=documented(404, 422))
async def follow_job(job_id: str, state: Serving) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: the job, without its result, whenever something about it has changed, until it is over."""
    job, last = state.jobs[job_id], None
    while True:
        told, over = job.told(), job.over
        if told != last:
            yield ServerSentEvent(data=told, event="job")
        if over:
            return
        last = told
        await asyncio.sleep(LOOK_SECONDS)


@router.delete(
    "/jobs/{job_id}", response_model=JobAnswer, dependencies=[Depends(may_write)], responses=documented(403, 404, 422)
)
async def cancel_job(job_id: str, state: Serving) -> dict[str, Any]:
    """Cancel it: where it runs, it stops at the next sign of progress, and leaves everything as it was."""
    job = state.jobs[job_id]
    job.cancel()
    return job.told()
