"""POST /v1/images/generations and /v1/images/edits: OpenAI's members to a spec, and its images in OpenAI's answer."""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from tminus.service.api.answers.problems import respond
from tminus.service.api.answers.progress import finished_or_gone, result_of, server_timing
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.models import Models
from tminus.service.api.openai.answers import ImageEntry, ImagesAnswer, recipe_of
from tminus.service.api.openai.described import EDITS, GENERATIONS, IMAGES, openai_failures
from tminus.service.api.openai.schemas import EXTENSIONS, OF_EDITS, EditsRequest, ImagesRequest
from tminus.service.api.openai.streaming import stream
from tminus.service.api.openai.wanted import Wanted, about
from tminus.service.api.request.advice import advice_headers
from tminus.service.api.request.multipart import FORM, is_form, read_form
from tminus.service.api.request.reading import (
    check_encoding,
    from_items,
    key_in_headers,
    no_parameters,
    off_loop,
    read_json,
    unless_gone,
    while_connected,
)
from tminus.service.api.request.schemas import PICTURES
from tminus.service.api.services import Services
from tminus.service.api.submission import create, submit, to_job, understand
from tminus.service.errors import ConflictingField, InvalidImage, NoImages, UnsupportedMediaType, short
from tminus.service.images.encoder import JSON
from tminus.service.jobs.views import JobView
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.spec import SampleSpec

LIST = "[]"  # what OpenAI's libraries add to the name of a list in a form
NO_STORE = {"Cache-Control": "no-store"}


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the two calls."""

    name: str  # of its events
    schema: type[ImagesRequest]
    extensions: tuple[str, ...]
    read: Callable[[Request, Limits], Awaitable[dict[str, Any]]]


def image_routes(models: Models) -> APIRouter:
    """Make the routes. A request names its model, so that there are none below /models/NAME."""
    router = APIRouter(prefix="/v1/images", tags=["openai"], dependencies=[Depends(no_parameters)])
    generation = Kind("image_generation", ImagesRequest, EXTENSIONS, _read_generation)
    edit = Kind("image_edit", EditsRequest, OF_EDITS, _read_edit)
    statuses = (400, 401, 404, 410, 413, 415, 429, 500, 503, 504, 507)
    responses: dict[int | str, Any] = {200: IMAGES, **openai_failures(*statuses)}

    @router.post(
        "/generations",
        summary="Sample, as OpenAI's clients ask for images",
        response_class=Response,
        responses=responses,
        openapi_extra=GENERATIONS,
    )
    async def generate_images(request: Request) -> Response:
        return await _answer(models, request, generation)

    @router.post(
        "/edits",
        summary="Edit an image, as OpenAI's clients ask for it",
        response_class=Response,
        responses=responses,
        openapi_extra=EDITS,
    )
    async def edit_image(request: Request) -> Response:
        return await _answer(models, request, edit)

    return router


async def _read_generation(request: Request, limits: Limits) -> dict[str, Any]:
    return await unless_gone(read_json(request, limits.max_body_bytes))


async def _read_edit(request: Request, limits: Limits) -> dict[str, Any]:
    """Read the form; a list has one name for each of its items, and so may a single image have."""
    if not is_form(request):
        declared = request.headers.get("content-type", "")
        detail = f"Content-Type must be {FORM}, got {short(declared)!r}"
        raise UnsupportedMediaType(detail, field="Content-Type", value=declared, bound=FORM)
    names = [*PICTURES, PICTURES[0] + LIST]
    form = await unless_gone(read_form(request, limits.max_image_bytes, names))
    members = from_items(((name.removesuffix(LIST), value) for name, value in form.fields), "the form")
    if {"image", "image" + LIST} <= form.files.keys():
        raise ConflictingField("image is in the form twice", field="image", value="2 files")
    return members | {name.removesuffix(LIST): data for name, data in form.files.items()}


async def _answer(models: Models, request: Request, kind: Kind) -> Response:
    with ExitStack() as stack:
        services, members, wanted = await _understand(models, request, kind, stack)
        request.state.release_body()
        if isinstance(wanted, JobView):
            return await _with_urls(services, request, members, wanted)
        if members.stream:
            return await stream(services, request, wanted, _headers(wanted, services.model), stack)
        return await _with_images(services, request, wanted)


async def _understand(
    models: Models, request: Request, kind: Kind, stack: ExitStack
) -> tuple[Services, ImagesRequest, Wanted | JobView]:
    """Read and check a request; returns a durable job where addresses are wanted, which is accepted by then.

    stack: notes that the model is used. The uploads are not kept: the job may take long.
    """
    check_encoding(request)
    key_in_headers(request)  # its libraries send one with each retry, where there is no job too
    given = await kind.read(request, models.default.limits)
    uploads = {name: given.pop(name) for name in PICTURES if isinstance(given.get(name), bytes)}
    members, extensions = kind.schema.take_from(given, kind.extensions)
    services = models.default if members.model is None else models.named(members.model)
    stack.enter_context(models.using(services))
    edits = kind.schema is EditsRequest
    if edits:
        if "image" not in uploads:
            raise InvalidImage.of("image", "a file in the form", "a form without it")
        if not ("mask" in uploads or "strength" in extensions):
            uploads["mask"] = uploads["image"]  # as OpenAI has it: what is transparent in the image is made new
    parameters = members.parameters(extensions, services.model, services.limits)
    asked = await understand(services, parameters | uploads)
    if members.as_url:
        view, _ = await create(services, request, asked, transparent=edits)
        return services, members, view
    spec, inputs = await to_job(services, asked, request, transparent=edits)
    return services, members, Wanted(kind.name, members, spec, inputs, asked.deadline_s)


def _headers(wanted: Wanted, model: ModelInfo) -> dict[str, str]:
    return _headers_of(wanted.job_id, wanted.spec, model, model.fingerprint)


def _headers_of(job_id: str, spec: SampleSpec, model: ModelInfo, fingerprint: str) -> dict[str, str]:
    headers = {"X-Job-ID": job_id, "X-Seed": str(spec.seed), "X-Fingerprint": fingerprint}
    return headers | NO_STORE | advice_headers(spec, model)


async def _with_images(services: Services, request: Request, wanted: Wanted) -> Response:
    """Wait for the job, and answer with its images."""
    loop, model = asyncio.get_running_loop(), services.model
    caller, deadline_s = caller_of(request), wanted.deadline_s
    ticket = await submit(services, caller, wanted.job_id, wanted.spec, deadline_s, inputs=wanted.inputs)
    done = result_of(ticket, deadline_s)
    result = await finished_or_gone(request, services.worker, wanted.job_id, done)
    started_s = loop.time()
    pictures = await wanted.pictures(services.encoder, result, model)

    def body() -> bytes:
        encoded = [base64.b64encode(picture).decode("ascii") for picture in pictures]
        data = [ImageEntry(b64_json=each, **wanted.recipe(k, model)) for k, each in enumerate(encoded)]
        return _document(wanted.members, model, data, without="url")

    content = await off_loop(sum(map(len, pictures)), body)
    timing = server_timing(result, loop.time() - started_s, model)
    return Response(content, headers=_headers(wanted, model) | {"Server-Timing": timing}, media_type=JSON)


async def _with_urls(services: Services, request: Request, members: ImagesRequest, view: JobView) -> Response:
    """Wait for a durable job, and answer with the addresses of its images. It goes on if the client goes away."""
    ended = await while_connected(request, services.jobs.ended(view.record.id, caller_of(request).sees))
    record, model = ended.record, services.model
    if record.problem is not None:
        # Without headers: no failure that is kept says when to try again.
        return respond(record.problem, {}, request.scope)
    if record.outcome != "done":
        raise NoImages("this job was cancelled, and has no images", None)
    base, fingerprint = str(request.base_url).rstrip("/"), record.fingerprint or ""
    data = [
        ImageEntry(
            url=f"{base}/jobs/{record.id}/image?index={record.spec.index + k}",
            **recipe_of(record.spec, k, model.class_names, fingerprint, record.id),
        )
        for k in range(record.spec.n)
    ]
    headers = _headers_of(record.id, record.spec, model, fingerprint)
    return Response(_document(members, model, data, without="b64_json"), headers=headers, media_type=JSON)


def _document(members: ImagesRequest, model: ModelInfo, data: list[ImageEntry], without: str) -> bytes:
    answer = ImagesAnswer(created=int(time.time()), data=data, **about(members, model))
    return answer.model_dump_json(exclude={"data": {"__all__": {without}}}).encode()
