"""Auditing a collection, as a job."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse

from tmm_engine.auditing.options import AuditOptions
from tmm_engine.index.progress import Progress
from tmm_engine.serving.collection import Collection
from tmm_engine.serving.problems import documented
from tmm_engine.serving.requests import AuditBody
from tmm_engine.serving.responses import JobAnswer
from tmm_engine.serving.state import Chosen, Serving, may_read

router = APIRouter(tags=["audit"], dependencies=[Depends(may_read)])


@router.post(
    "/collections/{name}/audit",
    status_code=202,
    response_model=JobAnswer,
    responses=documented(400, 401, 403, 404, 408, 413, 422, 503),
)
async def audit(collection: Chosen, asked: AuditBody, state: Serving) -> Response:
    """Look for what is wrong with the images, as a job whose result has findings, rules and notes."""
    against = None if asked.against is None else state.collections[asked.against]
    AuditOptions(kinds=asked.kinds, k=asked.k, rate=asked.rate, sources=asked.sources)  # what is wrong is said at once
    job = state.jobs.start("audit", collection.name, partial(_audited, collection, against, asked))
    return JSONResponse(job.told(), 202, headers={"Location": f"/jobs/{job.id}"})


def _audited(
    collection: Collection, against: Collection | None, asked: AuditBody, progress: Progress
) -> dict[str, Any]:
    shown = collection.shown
    found = shown.engine.audit(
        kinds=asked.kinds,
        k=asked.k,
        rate=asked.rate,
        against=None if against is None else against.shown.engine,
        sources=asked.sources,
        where=asked.where,
        progress=progress,
    )
    rules = {
        str(kind): {"text": rule.text, "threshold": rule.threshold, "looked_at": rule.looked_at}
        for kind, rule in found.rules.items()
    }
    return {
        "collection": collection.name,
        "version": shown.version,
        "exemplars": found.exemplars,
        "findings": [finding.to_json() for finding in found.findings],
        "rules": rules,
        "notes": list(found.notes),
    }
