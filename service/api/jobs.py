"""POST and GET /jobs, and one job: its state, its images, its end. Its events are in events.py."""

import re
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from service.api.answers import JobAnswer, JobPage
from service.api.caching import cache_headers, matches
from service.api.negotiation import negotiate
from service.api.openapi import IDEMPOTENCY_KEY, SAMPLE_BODY, contents
from service.api.request import accept_header, read_parameters
from service.api.schemas import SampleRequest
from service.api.services import Services
from service.api.submission import accept
from service.errors import InvalidField
from service.images.encoder import MEDIA_TYPES, etag
from service.jobs.store import Place
from service.jobs.views import STATES

MAX_PAGE, DEFAULT_PAGE = 200, 50
CURSOR = re.compile(r"(\d{1,18})-([0-9a-f]{32})")


def job_routes(services: Services) -> APIRouter:
    """Make the routes."""
    router = APIRouter(prefix="/jobs", tags=["jobs"])

    @router.post(
        "",
        summary="Submit a durable job",
        status_code=202,
        response_model=JobAnswer,
        openapi_extra={"requestBody": SAMPLE_BODY, "parameters": [IDEMPOTENCY_KEY]},
    )
    async def post_job(request: Request) -> Response:
        parameters = await read_parameters(request, services.limits)
        return await accept(services, request, SampleRequest.parse(parameters, services.model, services.limits))

    @router.get("", summary="List jobs, newest first; those that are not durable only while they wait or run")
    async def list_jobs(state: str | None = None, limit: str | None = None, before: str | None = None) -> JobPage:
        return await page(services, state, limit, before)

    @router.get("/{job_id}", summary="Get one job")
    async def get_job(job_id: str) -> JobAnswer:
        return JobAnswer.of(await services.jobs.find(job_id))

    @router.get(
        "/{job_id}/image",
        summary="Get the images of a durable job that is done",
        response_class=Response,
        responses={200: contents(*MEDIA_TYPES)},
    )
    async def get_image(request: Request, job_id: str) -> Response:
        return await image(services, request, job_id)

    @router.post("/{job_id}/cancel", summary="Cancel a durable job that has not ended")
    async def cancel_job(job_id: str) -> JobAnswer:
        return JobAnswer.of(await services.jobs.cancel(job_id))

    @router.delete("/{job_id}", summary="Cancel a job, or delete it if it has ended")
    async def delete_job(job_id: str) -> Response:
        await services.jobs.delete(job_id)
        return Response(status_code=204)

    return router


async def page(services: Services, state: str | None, limit: str | None, before: str | None) -> JobPage:
    """One page of the jobs in some states. Raises InvalidField."""
    count = _count(limit)
    views = await services.jobs.page(_cursor(before), _states(state), count + 1)
    jobs = [JobAnswer.of(view) for view in views[:count]]
    if len(views) <= count:
        return JobPage(jobs=jobs, next=None)
    created_us, job_id = views[count - 1].record.place
    return JobPage(jobs=jobs, next=f"{created_us}-{job_id}")


async def image(services: Services, request: Request, job_id: str) -> Response:
    """What a job has made, in the media type that the client likes best."""
    media_type = negotiate(accept_header(request), MEDIA_TYPES)
    record, images = await services.jobs.images(job_id)
    made_by = replace(services.model, fingerprint=record.fingerprint or "")
    tag = etag(media_type, record.spec, made_by)
    headers = {
        "X-Job-ID": job_id,
        "X-Seed": str(record.spec.seed),
        "X-Fingerprint": made_by.fingerprint,
        "Vary": "Accept",
    } | cache_headers(tag)
    if matches(request.headers.getlist("if-none-match"), request.method, tag):
        return Response(status_code=304, headers=headers)
    content = await services.encoder.encode(media_type, record.spec, lambda: images, made_by)
    return Response(content, headers=headers, media_type=media_type)


def _states(given: str | None) -> tuple[str, ...]:
    if given is None:
        return STATES
    states = tuple(given.split(","))
    if not set(states) <= set(STATES):
        raise InvalidField.of("state", f"one or more of {', '.join(STATES)}, by commas", given)
    return states


def _count(given: str | None) -> int:
    if given is None:
        return DEFAULT_PAGE
    count = int(given) if given.isascii() and given.isdecimal() and len(given) < 9 else 0
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
