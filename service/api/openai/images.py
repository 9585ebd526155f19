"""The routes below /v1, in OpenAI's format: generate images, edit images and list the models."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.sse import format_sse_event

from tminus.service.api.answers.openapi import BODY_ERRORS, WORK_ERRORS, failures, path_parameter
from tminus.service.api.answers.operations import described
from tminus.service.api.answers.problems import as_openai, note_error, respond
from tminus.service.api.answers.progress import EventStream, finished_or_gone, result_of, server_timing
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.models import Models, Services
from tminus.service.api.openai.answers import (
    EDITS,
    GENERATIONS,
    IMAGES,
    CompletedImage,
    ImageEntry,
    ImagesAnswer,
    ModelEntries,
    ModelEntry,
    PartialImage,
    recipe_of,
)
from tminus.service.api.openai.schemas import ONLY_MODEL, EditsCall, ImagesCall, bounds_of_images
from tminus.service.api.request.multipart import FORM
from tminus.service.api.request.reading import (
    BARE,
    check_encoding,
    from_items,
    is_form,
    key_in_headers,
    off_loop,
    read_form,
    read_json,
    while_connected,
)
from tminus.service.api.request.schemas import DIFFUSERS_NAMES, PICTURES, by_our_names, named_as_given
from tminus.service.api.submission import create, prepare_job, spec_headers, submit
from tminus.service.errors import (
    ConflictingField,
    InvalidImage,
    ModelNotFound,
    NoImages,
    ServiceError,
    UnsupportedMediaType,
    ValidationErrors,
)
from tminus.service.images.encoder import JSON, Encoder, as_pictures, encode_each, encode_frame
from tminus.service.jobs.jobs import JobView
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.preview import Frame, Pace, Watch
from tminus.service.spec import Pixels, SampleSpec
from tminus.service.work import JobResult
from tminus.service.worker.running_job import NewJob

log = logging.getLogger(__name__)

LIST = "[]"  # in forms, OpenAI's libraries append this to the names of lists
NO_STORE = {"Cache-Control": "no-store"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A job to submit, and what its response needs."""

    name: str  # prefix of event names: image_generation or image_edit
    members: ImagesCall
    new: NewJob

    def recipe(self, k: int, model: ModelInfo) -> dict[str, Any]:
        return recipe_of(self.new.spec, k, model.class_names, model.fingerprint, self.new.id)

    async def pictures(self, encoder: Encoder, result: JobResult, model: ModelInfo) -> list[bytes]:
        """Encode the images. Raises NotFinite.

        PNGs have the same bytes as those of POST /sample, unless alpha is removed.
        """
        spec, kind, quality = self.new.spec, self.members.output_format, self.members.lossy_quality
        opaque = model.alpha and not self.members.keeps_alpha(model)

        def make(images: Pixels) -> list[bytes]:
            if quality is None:
                return encode_each(spec, images, model, opaque=opaque)
            return [encode_frame(image, kind, quality, opaque=opaque) for image in as_pictures(images, model)]

        return await encoder.make(result.read, make, kind, f"image/{kind}", spec.n)


def openai_routes(models: Models) -> APIRouter:
    """Return a router with the routes. There are none below /models/NAME, because the request body names the model."""
    router = APIRouter(prefix="/v1", tags=["openai"], dependencies=BARE)
    responses: dict[int | str, Any] = {200: IMAGES, **failures(404, 410, *BODY_ERRORS, *WORK_ERRORS, 507)}

    @router.post(
        "/images/generations",
        **described("openai_generate_images"),
        response_class=Response,
        responses=responses,
        openapi_extra=GENERATIONS,
    )
    async def generate_images(request: Request) -> Response:
        return await _answer(models, request, edits=False)

    @router.post(
        "/images/edits",
        **described("openai_edit_image"),
        response_class=Response,
        responses=responses,
        openapi_extra=EDITS,
    )
    async def edit_image(request: Request) -> Response:
        return await _answer(models, request, edits=True)

    @router.get("/models", **described("openai_list_models"), responses=failures(422))
    async def list_models() -> ModelEntries:
        return ModelEntries(data=[ModelEntry(id=each.model.name, created=each.loaded_s) for each in models])

    @router.get(
        "/models/{model}",
        **described("openai_get_model"),
        responses=failures(404, 422),
        # If the path parameter were an argument of the handler, FastAPI would document a 422 that never occurs.
        openapi_extra={"parameters": [path_parameter("model")]},
    )
    async def get_model_entry(request: Request) -> ModelEntry:
        services = _named(models, request.path_params["model"])
        return ModelEntry(id=services.model.name, created=services.loaded_s)

    return router


def _named(models: Models, name: str) -> Services:
    """Return the model that a request asks for. Raises ModelNotFound."""
    return models.default if name == ONLY_MODEL and len([*models]) == 1 else models.named(name)


async def _read_edit(request: Request, limits: Limits) -> dict[str, Any]:
    """Read the form of an edit. The name `image` and the names of lists may end with `[]`."""
    if not is_form(request):
        raise UnsupportedMediaType.of(request.headers.get("content-type", ""), (FORM,))
    names = [*PICTURES, PICTURES[0] + LIST]
    form = await read_form(request, limits.max_image_bytes, names)
    errors = ValidationErrors()
    members = from_items(((name.removesuffix(LIST), value) for name, value in form.fields), "the form", errors)
    errors.check()
    if {"image", "image" + LIST} <= form.files.keys():
        raise ConflictingField("image is in the form twice", field="image", value="2 files")
    return members | {name.removesuffix(LIST): data for name, data in form.files.items()}


async def _answer(models: Models, request: Request, *, edits: bool) -> Response:
    with ExitStack() as stack:
        services, members, wanted = await _prepare(models, request, stack, edits=edits)
        if isinstance(wanted, JobView):
            return await _with_urls(services, request, members, wanted)
        if members.stream:
            return await stream(services, request, wanted, stack)
        return await _with_images(services, request, wanted)


async def _prepare(
    models: Models, request: Request, stack: ExitStack, *, edits: bool
) -> tuple[Services, ImagesCall, Wanted | JobView]:
    """Read and check a request. If the client wants URLs, submit a durable job; otherwise, only prepare the job.

    Enters `models.using` on `stack`, so the model stays loaded. Frees the uploads, because the job can be slow.
    """
    check_encoding(request)
    key_in_headers(request)  # only to check it: OpenAI's libraries send this header with every retry
    limits = models.default.limits
    values = await (_read_edit(request, limits) if edits else read_json(request, limits.max_body_bytes))
    # A null member counts as missing.
    values, given_as = by_our_names({k: v for k, v in values.items() if v is not None}, DIFFUSERS_NAMES)
    named, services = values.get("model"), models.default
    with suppress(ModelNotFound):  # raised again below, once everything else has been checked
        services = _named(models, named) if isinstance(named, str) else services
    with named_as_given(given_as):
        bounds = bounds_of_images(services.bounds, services.limits)
        members = (EditsCall if edits else ImagesCall).parse(values, bounds)
        if members.model is not None:
            services = _named(models, members.model)
        stack.enter_context(models.using(services))
        parameters = members.sampling(services.model, services.limits)
        if isinstance(members, EditsCall):
            members.image = members.mask = None
        if edits and parameters.image is None:
            raise InvalidImage.of("image", "a file in the form", "a form without it")
        if edits and parameters.mask is None and parameters.strength is None:
            parameters.mask = parameters.image  # as in OpenAI's API, regenerate the image's transparent part
        del values
        if members.as_url:
            view, _ = await create(services, request, parameters, transparent=edits)
            return services.models.numbered(view.model), members, view
        services, new = await prepare_job(services, caller_of(request), parameters, request, transparent=edits)
    return services, members, Wanted("image_edit" if edits else "image_generation", members, new)


def _headers(job_id: str, spec: SampleSpec, services: Services, fingerprint: str) -> dict[str, str]:
    return {"X-Job-ID": job_id, "X-Fingerprint": fingerprint} | NO_STORE | spec_headers(spec, services)


async def _with_images(services: Services, request: Request, wanted: Wanted) -> Response:
    loop, model = asyncio.get_running_loop(), services.model
    done = result_of(await submit(services, caller_of(request), wanted.new), wanted.new.deadline_s)
    result = await finished_or_gone(request, services.worker, wanted.new.id, done)
    started_s = loop.time()
    pictures = await wanted.pictures(services.encoder, result, model)

    def body() -> bytes:
        encoded = [base64.b64encode(picture).decode("ascii") for picture in pictures]
        data = [ImageEntry(b64_json=each, **wanted.recipe(k, model)) for k, each in enumerate(encoded)]
        return _document(wanted.members, model, data, without="url")

    content = await off_loop(sum(map(len, pictures)), body)
    timing = server_timing(result, loop.time() - started_s, model)
    headers = _headers(wanted.new.id, wanted.new.spec, services, model.fingerprint)
    return Response(content, headers=headers | {"Server-Timing": timing}, media_type=JSON)


async def _with_urls(services: Services, request: Request, members: ImagesCall, view: JobView) -> Response:
    """Wait for a durable job and respond with the URLs of its images. The job goes on if the client disconnects."""
    ended = await while_connected(request, services.jobs.ended(view.record.id, caller_of(request).sees))
    record, model = ended.record, services.model
    if record.problem is not None:
        # There is no Retry-After header, because stored problems do not include a retry time.
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
    headers = _headers(record.id, record.spec, services, fingerprint)
    return Response(_document(members, model, data, without="b64_json"), headers=headers, media_type=JSON)


def _document(members: ImagesCall, model: ModelInfo, data: list[ImageEntry], without: str) -> bytes:
    answer = ImagesAnswer(created=int(time.time()), data=data, **members.about(model))
    return answer.model_dump_json(exclude={"data": {"__all__": {without}}}).encode()


def steps_shown(passes: int, count: int) -> tuple[int, ...]:
    """Return the passes that get a preview: up to `count` evenly spaced passes, never the last one."""
    return tuple(sorted({round(passes * k / (count + 1)) for k in range(1, count + 1)} - {0, passes}))


async def stream(services: Services, request: Request, wanted: Wanted, stack: ExitStack) -> EventStream:
    """Submit a job and return its event stream. If the client disconnects, the job is cancelled.

    stack: closed when the stream ends. Raises TooManyStreams, or the errors of `submit`.
    """
    loop, model, spec = asyncio.get_running_loop(), services.model, wanted.new.spec
    at = steps_shown(spec.num_passes, wanted.members.partial_images)
    stack.enter_context(services.streams.opened(request.client.host if request.client else ""))
    stack.enter_context(services.streams.busy())
    held_bytes = len(at) * spec.n * model.height_px * model.width_px * model.channels
    stack.enter_context(services.recordings.taken(held_bytes, "partial_images"))
    # Every frame is kept until it is sent, because the client asked for exactly these few frames.
    arrived: asyncio.Queue[Frame | None] = asyncio.Queue()

    def put(frame: Frame) -> None:  # runs in the worker's thread
        with suppress(RuntimeError):  # the event loop is closed, and with it the stream
            loop.call_soon_threadsafe(arrived.put_nowait, frame)

    new = replace(wanted.new, watch=Watch(Pace(steps=at), ("x_0",), put) if at else None)
    done = result_of(await submit(services, caller_of(request), new), new.deadline_s)
    done.add_done_callback(lambda _: arrived.put_nowait(None))
    stack.callback(lambda: done.done() or services.worker.cancel(wanted.new.id, "client_gone"))
    headers = _headers(new.id, spec, services, model.fingerprint)
    return EventStream(_events(services, wanted, arrived, done), stack.pop_all().close, headers)


async def _events(
    services: Services, wanted: Wanted, arrived: "asyncio.Queue[Frame | None]", done: "asyncio.Future[JobResult]"
) -> AsyncGenerator[bytes]:
    """Yield the previews of a job, followed by the images or an error.

    The worker's thread sends all frames before the job ends, so no preview is lost.
    """
    members, model, encoder, shown = wanted.members, services.model, services.encoder, 0
    try:
        while (frame := await arrived.get()) is not None:
            try:
                opaque = not members.keeps_alpha(model)
                pictures = await encoder.encode_frame(
                    frame, members.output_format, "images", members.lossy_quality, opaque=opaque
                )
            except Exception:  # losing a frame must not end the job
                log.exception("a frame of job %s could not be encoded", wanted.new.id)
                continue
            services.metrics.count("tminus_frames_sent_total")
            for _, image, picture in pictures:
                more = {"partial_image_index": shown, "image_index": image or 0}
                yield _event(PartialImage, f"{wanted.name}.partial_image", picture, **members.about(model), **more)
            shown += 1
        for k, picture in enumerate(await wanted.pictures(encoder, await done, model)):
            more = {"image_index": k, **wanted.recipe(k, model)}
            yield _event(CompletedImage, f"{wanted.name}.completed", picture, **members.about(model), **more)
    except Exception as error:
        if isinstance(error, ServiceError):
            note_error(error, services.metrics)
        else:
            log.exception("the events of job %s ended by an error", wanted.new.id)
            error = ServiceError()
        yield format_sse_event(data_str=json.dumps(as_openai(error.problem())[1]), event="error")


def _event(schema: type[PartialImage | CompletedImage], name: str, picture: bytes, **members: Any) -> bytes:
    encoded = base64.b64encode(picture).decode("ascii")
    document = schema(type=name, b64_json=encoded, created_at=int(time.time()), **members)
    return format_sse_event(data_str=json.dumps(document.model_dump()), event=name)
