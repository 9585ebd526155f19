"""GET /jobs, GET and DELETE /jobs/{id}: what waits and runs, each with its place and time; give one up."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response

from service.errors import JobNotFound, short
from service.job import JobStatus
from service.worker import Worker


def job_routes(worker: Worker) -> APIRouter:
    """Make the routes."""
    router = APIRouter(prefix="/jobs", tags=["jobs"])

    @router.get("", summary="Jobs that wait or run, in order of arrival")
    async def list_jobs() -> dict[str, Any]:
        return {"jobs": [_document(status) for status in worker.statuses()]}

    @router.get("/{job_id}", summary="One of them")
    async def get_job(job_id: str) -> dict[str, Any]:
        status = worker.status(job_id)
        if status is None:
            raise _not_found(job_id)
        return _document(status)

    @router.delete("/{job_id}", summary="Give it up: its rows are free before the next tick", status_code=204)
    async def delete_job(job_id: str) -> Response:
        if not worker.cancel(job_id, "deleted"):
            raise _not_found(job_id)
        return Response(status_code=204)

    return router


def _document(status: JobStatus) -> dict[str, Any]:
    return asdict(status) | {"eta_s": round(status.eta_s, 3), "age_s": round(status.age_s, 3)}


def _not_found(job_id: str) -> JobNotFound:
    detail = f"no job {short(job_id)!r} waits or runs here"
    return JobNotFound(detail, field="job_id", value=job_id, bound="a job that GET /jobs lists")
