"""POST and GET /jobs, and a single job's routes: state, images, cancel and delete. Its events are in events.py."""

from contextlib import suppress
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from tminus.service.api.answers.documents import JobAnswer, JobPage
from tminus.service.api.answers.openapi import (
    BODY_ERRORS,
    IDEMPOTENCY_KEY,
    IF_NONE_MATCH,
    IMAGES_OF_JOB,
    JOB_BODY,
    NOT_MODIFIED,
    SUBMITTED,
    Contract,
    failures,
)
from tminus.service.api.answers.operations import described
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.models import Models, Services
from tminus.service.api.other_replicas import came_from_a_replica
from tminus.service.api.request.reading import (
    BARE,
    from_query,
    has_answer,
    in_query,
    negotiate,
    parse_call,
    read_parameters,
    while_connected,
)
from tminus.service.api.request.schemas import AsInteger, FloatsRequest, Index, JobCall, RequestSchema, in_words
from tminus.service.api.sample import of_images
from tminus.service.api.submission import cache_headers, create, spec_headers
from tminus.service.errors import InvalidField, StorageFailed
from tminus.service.images.encoder import MEDIA_TYPES, NPY, etag, one_image
from tminus.service.jobs.jobs import STATES
from tminus.service.jobs.store.records import Place

MAX_PAGE = 200
COPIES = 3  # copies of a job's images in memory during a read: packed, unpacked, and as an array


class JobsCall(RequestSchema):
    """Query parameters of GET /jobs."""

    state: Annotated[
        str | None,
        Field(pattern=f"^({'|'.join(STATES)})(,({'|'.join(STATES)}))*$"),
        in_words("all", f"one or more of {', '.join(STATES)}, separated by commas"),
    ] = None
    """Only jobs in these states, separated by commas: waiting, running, done, failed, cancelled."""
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE), AsInteger, in_words("50")] = 50
    """The most jobs in an answer."""
    before: Annotated[
        str | None,
        Field(pattern="^[0-9]{1,18}-[0-9a-f]{32}$"),
        in_words("the newest jobs", "`next` of an earlier answer"),
    ] = None
    """The `next` of an earlier answer: the jobs that follow it."""

    @property
    def states(self) -> tuple[str, ...]:
        return STATES if self.state is None else tuple(self.state.split(","))

    @property
    def place(self) -> Place | None:
        """The position after which the page starts, or None to start with the newest job."""
        if self.before is None:
            return None
        created_us, _, job_id = self.before.partition("-")
        return int(created_us), job_id


class JobImageCall(FloatsRequest):
    """Query parameters of GET /jobs/{id}/image."""

    index: Annotated[Index | None, in_words("all images")] = None
    """The index of the one image to return."""


def job_routes(models: Models, contract: Contract) -> APIRouter:
    """Return a router with the routes under /jobs. The routes of a single job accept the id of any model's job."""
    router = APIRouter(prefix="/jobs", tags=["jobs"])
    of_job = failures(404, 422, 500, 507)

    router.post(
        "",
        **described("submit_job"),
        status_code=202,
        response_model=JobAnswer,
        responses={202: SUBMITTED, **failures(*BODY_ERRORS, 500, 503, 507)},
        openapi_extra={
            "requestBody": JOB_BODY,
            "parameters": [*contract.query(JobCall), IDEMPOTENCY_KEY],
        },
    )(models.handler(post_job, "post_job"))

    @router.get(
        "",
        **described("list_jobs"),
        responses=failures(422, 429, 500, 507),
        openapi_extra={"parameters": contract.query(JobsCall)},
    )
    async def list_jobs(request: Request, asked: Annotated[JobsCall, in_query(JobsCall)]) -> JobPage:
        named = models.of(request).model.name if "model" in request.path_params else None
        views = await models.default.jobs.page(
            asked.place, asked.states, asked.limit + 1, caller_of(request).sees, named
        )
        jobs = [JobAnswer.of(view) for view in views[: asked.limit]]
        if len(views) <= asked.limit:
            return JobPage(jobs=jobs, next=None)
        created_us, job_id = views[asked.limit - 1].record.place
        return JobPage(jobs=jobs, next=f"{created_us}-{job_id}")

    @router.get("/{job_id}", **described("get_job"), dependencies=BARE, responses=of_job)
    async def get_job(request: Request, job_id: str) -> JobAnswer:
        services = models.default
        view, address = await services.jobs.find(job_id, caller_of(request).sees), None
        if not came_from_a_replica(request):
            with suppress(StorageFailed):
                address = await services.jobs.held_at(view)
        answer = await services.other_replicas.job(address, request, job_id) if address is not None else None
        return answer or JobAnswer.of(view)

    @router.get(
        "/{job_id}/image",
        **described("get_job_images"),
        response_class=Response,
        responses={200: IMAGES_OF_JOB, 304: NOT_MODIFIED, **failures(404, 406, 409, 410, 422, 429, 500, 503, 507)},
        openapi_extra={"parameters": [*contract.query(JobImageCall), IF_NONE_MATCH]},
    )
    async def get_image(request: Request, job_id: str) -> Response:
        media_type = negotiate(request, (*MEDIA_TYPES, NPY))
        values, errors = from_query(request)
        asked = JobImageCall.parse(values, errors=errors, context=media_type)
        making = image(models, request, job_id, media_type, asked.index, clip=asked.clip_output)
        return await while_connected(request, making)

    @router.post("/{job_id}/cancel", **described("cancel_job"), dependencies=BARE, responses=of_job)
    async def cancel_job(request: Request, job_id: str) -> JobAnswer:
        return JobAnswer.of(await models.default.jobs.cancel(job_id, caller_of(request).sees))

    @router.delete(
        "/{job_id}",
        **described("delete_job"),
        status_code=204,
        response_class=Response,
        dependencies=BARE,
        responses=of_job,
    )
    async def delete_job(request: Request, job_id: str) -> None:
        await models.default.jobs.delete(job_id, caller_of(request).sees)

    return router


async def post_job(services: Services, request: Request) -> Response:
    """Accept a durable job and respond with 202 and its URL. A repeated Idempotency-Key returns the earlier job."""
    values, errors = await read_parameters(request, services.limits)
    parameters = await parse_call(JobCall, values, services.bounds, errors, services.webhooks)
    del values  # frees the picture, if any
    view, again = await create(services, request, parameters)
    headers = {
        "Location": f"{request.scope.get('root_path', '')}/jobs/{view.record.id}",
        "X-Job-ID": view.record.id,
        "Cache-Control": "no-store",
    }
    headers |= spec_headers(view.record.spec, services.models.numbered(view.model))
    if again:
        headers["Idempotent-Replayed"] = "true"
    return JSONResponse(JobAnswer.of(view).model_dump(), status_code=202, headers=headers)


async def image(
    models: Models, request: Request, job_id: str, media_type: str, index: int | None, *, clip: bool
) -> Response:
    """Respond with a job's images, or with 304 if the client has them. Limits each caller to a few requests at once."""
    caller, jobs = caller_of(request), models.default.jobs
    async with caller.usage.turns:
        view = await jobs.done(job_id, caller.sees)
        record, services = view.record, models.numbered(view.model)
        made_by, spec, which = replace(services.model, fingerprint=record.fingerprint or ""), record.spec, slice(None)
        pixel_bytes = spec.n * made_by.height_px * made_by.width_px * made_by.channels * spec.depth // 8
        if media_type == NPY and spec.depth != 32:
            media_type = negotiate(request, MEDIA_TYPES, f"; {NPY} needs a job that was submitted with bit_depth=32")
        if index is not None:
            k = index - spec.index
            if not 0 <= k < spec.n:
                bound = f"that of an image of this job, {spec.index}..{spec.index + spec.n - 1}"
                raise InvalidField.of("index", bound, index)
            spec, which = one_image(spec, k), slice(k, k + 1)
        answer = of_images(media_type, spec, made_by, clip=clip)
        tag = etag(answer.etag_form, spec, made_by)
        headers = {"X-Job-ID": job_id, "X-Fingerprint": made_by.fingerprint, "Vary": "Accept"}
        headers |= cache_headers(tag) | spec_headers(spec, services) | answer.headers
        if has_answer(request, tag):
            return Response(status_code=304, headers=headers)
        with services.recordings.taken(COPIES * pixel_bytes + answer.held_bytes, "job_id"):
            images = await jobs.images(view)
            content = await services.encoder.make(
                lambda: images[which], answer.make, answer.metric_label, media_type, spec.n
            )
    return Response(content, headers=headers, media_type=media_type)
