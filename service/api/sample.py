"""POST and GET /sample: parameters to spec, spec to the worker, images, an animation or a trajectory to the client."""

import asyncio
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from fastapi import APIRouter, Request, Response

from tminus.service.api.answers.caching import cache_directives, cache_headers, matches
from tminus.service.api.answers.openapi import (
    ACCEPTED,
    IF_NONE_MATCH,
    IMAGES_OR_STEPS,
    NOT_MODIFIED,
    OF_BODY,
    OF_WORK,
    PREFER,
    SAMPLE_BODY,
    Contract,
    Described,
    failures,
)
from tminus.service.api.answers.previews import AnimationRequest, Frames, Steps
from tminus.service.api.answers.progress import finished_or_gone, result_of, server_timing
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.models import Models, Services
from tminus.service.api.request.headers import accept_header, negotiate, prefers_async
from tminus.service.api.request.job_requests import NOT_DURABLE, WebhookRequest
from tminus.service.api.request.reading import read_parameters
from tminus.service.api.request.schemas import SampleRequest
from tminus.service.api.submission import accept, advice_headers, submit, understand
from tminus.service.errors import InvalidField
from tminus.service.images.encoder import JSON, MEDIA_TYPES, WEBP, WEBP_VERSION, Encoder, etag
from tminus.service.images.trajectory import TRAJECTORY
from tminus.service.jobs.webhooks.receivers import refused
from tminus.service.model_info import ModelInfo
from tminus.service.preview import SHOWS
from tminus.service.spec import SampleSpec
from tminus.service.work import JobResult
from tminus.service.worker.recording import Recorder, Recording
from tminus.service.worker.running_job import NewJob

WITHOUT_EVERY = (*MEDIA_TYPES, TRAJECTORY)
ANY_TYPE = (*WITHOUT_EVERY, WEBP)
WITH_EVERY = ", or image/webp together with the parameter `every`"


def sample_routes(models: Models, contract: Contract) -> APIRouter:
    """Make the routes."""
    router = APIRouter(tags=["sample"])
    sample, query = models.handler(answer, "sample"), contract.query(SampleRequest, AnimationRequest)
    responses: dict[int | str, Described] = {
        200: IMAGES_OR_STEPS,
        304: NOT_MODIFIED,
        **failures(406, *OF_BODY, *OF_WORK),
    }
    router.post(
        "/sample",
        summary="Sample and wait",
        response_class=Response,
        responses=responses | {202: ACCEPTED} | failures(507),
        openapi_extra={"parameters": [*query, IF_NONE_MATCH, PREFER], "requestBody": SAMPLE_BODY},
    )(sample)
    router.get(
        "/sample",
        summary="The same, for an <img>",
        response_class=Response,
        responses=responses,
        openapi_extra={"parameters": [*query, IF_NONE_MATCH]},
    )(sample)
    return router


class Answer(Protocol):
    """An answer that can be made once its job is done: what the job must record for it, and how it is encoded."""

    @property
    def spec(self) -> SampleSpec:
        """The spec of the images."""

    @property
    def media_type(self) -> str:
        """The media type of the body."""

    @property
    def kind(self) -> str:
        """What the bytes depend on beside the spec, as a text."""

    @property
    def held_bytes(self) -> int:
        """The bytes that are held beside the images, until they are encoded."""

    @property
    def held_for(self) -> str:
        """The parameter that held_bytes depends on."""

    @property
    def recording(self) -> Recorder[Any] | None:
        """The recorder that the worker gives rows on the way."""

    async def encode(self, encoder: Encoder, result: JobResult, made_by: ModelInfo) -> bytes:
        """Make the body. Raises NotFinite."""


@dataclass(frozen=True, slots=True)
class Still:
    """An answer with the finished images, as PNG, zip or JSON."""

    spec: SampleSpec
    media_type: str
    held_bytes: ClassVar[int] = 0
    held_for: ClassVar[str] = "n"
    recording: ClassVar[None] = None

    @property
    def kind(self) -> str:
        """What the bytes depend on beside the spec, as a text."""
        return self.media_type

    async def encode(self, encoder: Encoder, result: JobResult, made_by: ModelInfo) -> bytes:
        """Make the body. Raises NotFinite."""
        return await encoder.encode(self.media_type, self.spec, result.read, made_by)


@dataclass(frozen=True, slots=True)
class Animation:
    """An answer with the steps from noise to the images, as an animated WebP."""

    spec: SampleSpec
    asked: AnimationRequest
    held_bytes: int
    recording: Recording
    held_for: ClassVar[str] = "every"
    media_type: ClassVar[str] = WEBP

    @classmethod
    def of(cls, spec: SampleSpec, asked: AnimationRequest, model: ModelInfo) -> "Animation":
        """Prepare to record a job's frames. Raises InvalidField where their pixels are too many."""
        if len(asked.shows) > 1:
            raise InvalidField.of("show", f"one of {', '.join(SHOWS)} in an animation", asked.show)
        if asked.until is not None:
            raise InvalidField.of("until", "absent in an animation", asked.until)
        held_bytes = asked.held_bytes(spec, model)
        return cls(spec, asked, held_bytes, Recording(asked.every, asked.shows, spec.n, spec.num_passes))

    @property
    def kind(self) -> str:
        """What the bytes depend on beside the spec, as a text."""
        return f"{WEBP}; every={self.asked.every}; show={self.asked.shows[0]}; {WEBP_VERSION}"

    async def encode(self, encoder: Encoder, result: JobResult, _made_by: ModelInfo) -> bytes:
        """Make the body. Raises NotFinite."""
        (show,) = self.asked.shows
        return await encoder.encode_animation(
            lambda: [frame[show] for frame in self.recording.frames().values()], result
        )


async def answer(services: Services, request: Request) -> Response:
    """Sample and wait; or accept a durable job where the client prefers that."""
    accepted = accept_header(request)
    negotiate(accepted, ANY_TYPE)  # before the body is read
    parameters = await read_parameters(request, services.limits)
    animation = AnimationRequest.take_from(parameters)
    webhook = WebhookRequest.take_from(parameters, services.webhooks)
    offered, hint = (WITHOUT_EVERY, WITH_EVERY) if animation is None else ((WEBP, JSON), "")
    media_type = negotiate(accepted, offered, hint)
    if request.method == "POST" and prefers_async(request):  # a GET must leave nothing behind
        _check_durable(request, animation, media_type)
        response = await accept(services, request, parameters, webhook)
        response.headers["Preference-Applied"] = "respond-async"
        return response
    if webhook is not None:
        raise refused(NOT_DURABLE, webhook.url)
    new = await understand(services, caller_of(request), parameters, request)
    return await respond(services, request, new, _answer_of(new.spec, media_type, animation, services.model))


async def respond(services: Services, request: Request, new: NewJob, made: Answer) -> Response:
    """Answer with what the client or the cache has, or else run the job and encode what comes of it."""
    model, metrics = services.model, services.metrics
    tag = etag(made.kind, made.spec, model) if new.is_repeatable and model.exact else None
    headers = {"X-Seed": str(made.spec.seed), "X-Fingerprint": model.fingerprint, "Vary": "Accept"}
    headers |= cache_headers(tag) | advice_headers(made.spec, model)
    directives = cache_directives(request.headers.getlist("cache-control"), request.headers.getlist("pragma"))
    if tag is not None:
        if matches(request.headers.getlist("if-none-match"), request.method, tag):
            metrics.answered_without_work("not_modified")
            return Response(status_code=304, headers=headers)
        if "no-cache" not in directives and (kept := services.cache.get(tag)) is not None:
            metrics.answered_without_work("cache_hit")
            return Response(kept, headers=headers | {"Cache-Status": "tminus; hit"}, media_type=made.media_type)
    loop = asyncio.get_running_loop()
    with services.recordings.taken(made.held_bytes, made.held_for):
        ticket = await submit(services, caller_of(request), replace(new, recording=made.recording))
        result = await finished_or_gone(request, services.worker, new.id, result_of(ticket, new.deadline_s))
        started_s = loop.time()
        content = await made.encode(services.encoder, result, model)
        encode_s = loop.time() - started_s
    if tag is not None and "no-store" not in directives:
        services.cache.put(tag, content)
    headers |= {
        "X-Job-ID": new.id,
        "X-Queue-Position": str(ticket.outlook.position),
        "X-ETA-Seconds": f"{ticket.outlook.eta_s:.3f}",
        "Server-Timing": server_timing(result, encode_s, model),
    }
    return Response(content, headers=headers, media_type=made.media_type)


def _answer_of(spec: SampleSpec, media_type: str, animation: AnimationRequest | None, model: ModelInfo) -> Answer:
    if animation is not None:
        return (Animation if media_type == WEBP else Frames).of(spec, animation, model)
    return Steps.of(spec, model) if media_type == TRAJECTORY else Still(spec, media_type)


def _check_durable(request: Request, animation: AnimationRequest | None, media_type: str) -> None:
    """Raise InvalidField where the answer would need what no job keeps."""
    if animation is not None:
        raise InvalidField.of("every", "absent with Prefer: respond-async: a job keeps no frames", animation.every)
    if media_type == TRAJECTORY:
        bound = f"absent with Accept: {TRAJECTORY}: a job keeps no steps"
        raise InvalidField.of("Prefer", bound, request.headers["prefer"])
