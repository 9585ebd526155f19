"""POST and GET /jobs, and one job: its state, its images, its end. Its events are in events.py."""

import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service.api.conditional import matches
from service.api.negotiation import negotiate
from service.api.request import REQUEST_BODY, idempotency_key, read_request, to_job
from service.api.schemas import SampleRequest, parameters_of
from service.errors import InvalidField
from service.images.decoder import Decoder
from service.images.encoder import MEDIA_TYPES, Encoder, etag
from service.jobs.jobs import Jobs
from service.jobs.store import Place, now_us
from service.jobs.views import STATES, JobView
from service.model_info import Limits, ModelInfo

MAX_PAGE, DEFAULT_PAGE = 200, 50
CURSOR = re.compile(r"(\d{1,18})-([0-9a-f]{32})")


def job_routes(jobs: Jobs, decoder: Decoder, encoder: Encoder, model: ModelInfo, limits: Limits) -> APIRouter:
    """Make the routes."""
    router = APIRouter(prefix="/jobs", tags=["jobs"])

    @router.post(
        "",
        summary="Ask for a durable job: answered at once, finished whatever happens",
        status_code=202,
        response_class=JSONResponse,
        openapi_extra={
            "requestBody": REQUEST_BODY,
            "parameters": [
                {
                    "name": "Idempotency-Key",
                    "in": "header",
                    "schema": {"type": "string", "maxLength": 255},
                    "description": "makes a retry safe: the same key and parameters are the same job",
                }
            ],
        },
    )
    async def post_job(request: Request) -> Response:
        return await accept(request, await read_request(request, model, limits), jobs, decoder, model, limits)

    @router.get("", summary="All jobs, the newest first; those that are not durable while they wait or run")
    async def list_jobs(
        state: str | None = None, limit: str | None = None, before: str | None = None
    ) -> dict[str, Any]:
        count = _count(limit)
        views = await jobs.page(_cursor(before), _states(state), count + 1)
        more = len(views) > count
        created_us, job_id = views[count - 1].record.place if more else (0, "")
        return {"jobs": [document(view) for view in views[:count]], "next": f"{created_us}-{job_id}" if more else None}

    @router.get("/{job_id}", summary="One of them")
    async def get_job(job_id: str) -> dict[str, Any]:
        return document(await jobs.find(job_id))

    @router.get(
        "/{job_id}/image",
        summary="The images of a job that is done, as POST /sample gives them",
        response_class=Response,
        responses={200: {"content": {media_type: {} for media_type in MEDIA_TYPES}}},
    )
    async def get_image(request: Request, job_id: str) -> Response:
        media_type = negotiate(", ".join(request.headers.getlist("accept")), MEDIA_TYPES)
        record, images = await jobs.images(job_id)
        made_by = replace(model, fingerprint=record.fingerprint or "")
        headers = {
            "X-Job-ID": job_id,
            "X-Seed": str(record.spec.seed),
            "X-Fingerprint": made_by.fingerprint,
            "Vary": "Accept",
            "ETag": etag(media_type, record.spec, made_by),
            "Cache-Control": "no-cache",
        }
        if matches(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        content = await encoder.encode(media_type, record.spec, lambda: images, made_by)
        return Response(content, headers=headers, media_type=media_type)

    @router.post("/{job_id}/cancel", summary="Cancel it if it has not ended; its rows are free before the next tick")
    async def cancel_job(job_id: str) -> dict[str, Any]:
        return document(await jobs.cancel(job_id))

    @router.delete(
        "/{job_id}", summary="Cancel it, its rows are free before the next tick; one that has ended is forgotten"
    )
    async def delete_job(job_id: str) -> Response:
        await jobs.delete(job_id)
        return Response(status_code=204)

    return router


async def accept(
    request: Request, asked: SampleRequest, jobs: Jobs, decoder: Decoder, model: ModelInfo, limits: Limits
) -> Response:
    """Accept a durable job: 202 and where it is, and the same again for a key that was used for it before."""
    key = idempotency_key(request, asked)
    spec, inputs = await to_job(asked, model, limits, decoder)
    view, again = await jobs.create(spec, asked.deadline_s, key, inputs)
    headers = {
        "Location": f"{request.scope.get('root_path', '')}/jobs/{view.record.id}",
        "X-Job-ID": view.record.id,
        "X-Seed": str(view.record.spec.seed),
        "Cache-Control": "no-store",
    }
    if again:
        headers["Idempotent-Replayed"] = "true"
    return JSONResponse(document(view), status_code=202, headers=headers)


def document(view: JobView) -> dict[str, Any]:
    """What clients are told of a job."""
    record = view.record
    ended_us = record.finished_us
    return {
        "id": record.id,
        "state": view.state,
        "durable": view.durable,
        "step": view.step,
        "steps": record.spec.num_steps,
        "n": record.spec.n,
        "sampler": record.spec.sampler,
        "seed": record.spec.seed,
        "position": view.position,
        "eta_s": None if view.eta_s is None else round(view.eta_s, 3),
        "age_s": round(max(0, now_us() - record.created_us) / 1e6, 3),
        "created": _iso(record.created_us),
        "finished": _iso(ended_us) if ended_us is not None else None,
        "fingerprint": record.fingerprint,
        "parameters": parameters_of(record.spec),
        "problem": record.problem,
    }


def _iso(unix_us: int) -> str:
    return datetime.fromtimestamp(unix_us / 1e6, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _states(given: str | None) -> tuple[str, ...]:
    if given is None:
        return STATES
    states = tuple(given.split(","))
    if not set(states) <= set(STATES):
        raise InvalidField.of("state", f"one or more of {', '.join(STATES)}, by commas", given)
    return states


def _count(given: str | None) -> int:
    count = int(given) if given is not None and given.isascii() and given.isdecimal() and len(given) < 9 else 0
    if given is None:
        return DEFAULT_PAGE
    if not 1 <= count <= MAX_PAGE:
        raise InvalidField.of("limit", f"an integer in 1..{MAX_PAGE}", given)
    return count


def _cursor(given: str | None) -> Place | None:
    if given is None:
        return None
    match = CURSOR.fullmatch(given)
    if match is None:
        raise InvalidField.of("before", "`next` of an earlier answer", given)
    return int(match[1]), match[2]
