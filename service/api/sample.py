"""POST and GET /sample: parameters to spec, spec to the worker, images to the client."""

import asyncio
import uuid
from concurrent.futures import Future
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.conditional import matches
from service.api.jobs import accept
from service.api.negotiation import negotiate
from service.api.preview_schemas import AnimationRequest
from service.api.request import QUERY_PARAMETERS, REQUEST_BODY, prefers_async, read_parameters, to_job
from service.api.result_cache import ResultCache
from service.api.schemas import SampleRequest
from service.errors import InvalidField, JobCancelled
from service.images.animation import WEBP_VERSION
from service.images.decoder import Decoder
from service.images.encoder import MEDIA_TYPES, WEBP, Encoder, etag
from service.jobs.jobs import Jobs
from service.metrics import Metrics
from service.model_info import Limits, ModelInfo
from service.work import JobResult
from service.worker.recording import RecordingRoom
from service.worker.worker import Worker

ANY_TYPE = (*MEDIA_TYPES, WEBP)
WITH_EVERY = ", or image/webp together with the parameter `every`"
_ANIMATION = AnimationRequest.model_json_schema()["properties"]


def sample_routes(
    worker: Worker,
    jobs: Jobs,
    decoder: Decoder,
    encoder: Encoder,
    cache: ResultCache,
    metrics: Metrics,
    model: ModelInfo,
    limits: Limits,
) -> APIRouter:
    """Make the routes; all the state they hold is how much of recordings there is."""
    router = APIRouter(tags=["sample"])
    room = RecordingRoom()

    async def sample(request: Request) -> Response:
        accept_header = ", ".join(request.headers.getlist("accept"))
        negotiate(accept_header, ANY_TYPE)  # before the body is read
        animation, rest = AnimationRequest.split(await read_parameters(request, limits))
        offered = MEDIA_TYPES if animation is None else (WEBP,)
        media_type = negotiate(accept_header, offered, WITH_EVERY if animation is None else "")
        asked = SampleRequest.parse(rest, model, limits)
        if request.method == "POST" and prefers_async(request):  # a GET must leave nothing behind
            if animation is not None:
                raise InvalidField.of(
                    "every", "absent with Prefer: respond-async: a job keeps no frames", animation.every
                )
            answer = await accept(request, asked, jobs, decoder, model, limits)
            answer.headers["Preference-Applied"] = "respond-async"
            return answer
        spec, inputs = await to_job(asked, model, limits, decoder)
        deadline_s, is_named = asked.deadline_s, asked.seed is not None
        del rest, asked  # which hold the uploads as they came; the job may be a long one
        request.state.release_body()
        size_bytes = animation.size_bytes(spec, model) if animation is not None else 0
        headers = {"X-Seed": str(spec.seed), "X-Fingerprint": model.fingerprint, "Vary": "Accept"}

        # With a given seed the answer is a function of the spec: it has a name before it is made.
        name = (
            media_type
            if animation is None
            else f"{media_type}; every={animation.every}; show={animation.show}; {WEBP_VERSION}"
        )
        tag = etag(name, spec, model) if is_named and model.exact else None
        if tag is None:
            headers["Cache-Control"] = "no-store"
        else:
            headers |= {"ETag": tag, "Cache-Control": "no-cache"}
            if matches(request, tag):
                metrics.answered_without_work("not_modified")
                return Response(status_code=304, headers=headers)
            if (kept := cache.get(tag)) is not None:
                metrics.answered_without_work("cache_hit")
                return Response(kept, headers=headers | {"Cache-Status": "tminus; hit"}, media_type=media_type)

        job_id, recording = uuid.uuid4().hex, animation.recording(spec) if animation is not None else None
        with room.taken(size_bytes):
            ticket = worker.submit(job_id, spec, deadline_s, inputs=inputs, recording=recording)
            result = await _finished_or_gone(request, worker, job_id, ticket.future)
            started = asyncio.get_running_loop().time()
            if recording is None:
                content = await encoder.encode(media_type, spec, result.read)
            else:
                content = await encoder.encode_animation(recording.frames, result)
            encode_s = asyncio.get_running_loop().time() - started
        if tag is not None:
            cache.put(tag, content)
        headers |= {
            "X-Job-ID": job_id,
            "X-Queue-Position": str(ticket.position),
            "X-ETA-Seconds": f"{ticket.eta_s:.3f}",
            "Server-Timing": _server_timing(
                queue=result.queue_s, first_step=result.first_step_s, denoise=result.denoise_s, encode=encode_s
            ),
        }
        return Response(content, headers=headers, media_type=media_type)

    openapi: dict[str, Any] = {
        "parameters": [
            *QUERY_PARAMETERS,
            *(
                {"name": name, "in": "query", "schema": schema, "description": schema["description"]}
                for name, schema in _ANIMATION.items()
            ),
        ],
        "requestBody": REQUEST_BODY,
        "responses": {
            "200": {"description": "The images", "content": {media_type: {} for media_type in ANY_TYPE}},
            "202": {"description": "With Prefer: respond-async: a durable job; Location says where"},
            "304": {"description": "The client has them: If-None-Match names this answer's ETag"},
        },
    }
    router.post("/sample", summary="Sample and wait", response_class=Response, openapi_extra=openapi)(sample)
    openapi = {key: value for key, value in openapi.items() if key != "requestBody"}
    router.get("/sample", summary="The same, for an <img>", response_class=Response, openapi_extra=openapi)(sample)
    return router


async def _finished_or_gone(request: Request, worker: Worker, job_id: str, future: "Future[JobResult]") -> JobResult:
    """Wait for a job; a client that goes away frees its rows at the next tick."""
    done = asyncio.ensure_future(asyncio.wrap_future(future))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        waited: set[asyncio.Future[Any]] = {done, gone}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise JobCancelled("the client went away")
        return done.result()
    finally:
        gone.cancel()
        if not done.done():
            worker.cancel(job_id, "client_gone")
            done.add_done_callback(_retrieve)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _retrieve(done: "asyncio.Future[JobResult]") -> None:
    # The cancelled job's error has no reader; without this asyncio would complain that nobody looked.
    if not done.cancelled():
        done.exception()


def _server_timing(**seconds: float) -> str:
    return ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in seconds.items())
