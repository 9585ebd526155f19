"""POST and GET /sample: parameters to spec, spec to the worker, images to the client."""

import asyncio
import uuid
from concurrent.futures import Future
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from service import parameters
from service.encoder import MEDIA_TYPES, Encoder
from service.errors import JobCancelled
from service.job import JobResult, Limits, ModelInfo, SampleSpec
from service.negotiation import negotiate
from service.schemas import SampleRequest
from service.worker import Worker


def sample_routes(worker: Worker, encoder: Encoder, model: ModelInfo, limits: Limits) -> APIRouter:
    """Make the routes; they hold no state of their own."""
    router = APIRouter(tags=["sample"])

    async def sample(request: Request) -> Response:
        media_type = negotiate(", ".join(request.headers.getlist("accept")), MEDIA_TYPES)
        query = parameters.from_query(request.query_params.multi_items())
        try:
            body = parameters.from_body(await request.body())
        except ClientDisconnect:
            raise JobCancelled("the client went away") from None
        spec = SampleRequest.parse(parameters.merge(query, body), model, limits).to_spec(model, limits)

        job_id = uuid.uuid4().hex
        result = await _finished_or_gone(request, worker, job_id, spec)
        started = asyncio.get_running_loop().time()
        content = await encoder.encode(media_type, job_id, spec, result)
        encode_s = asyncio.get_running_loop().time() - started
        headers = {
            "X-Job-ID": job_id,
            "X-Seed": str(spec.seed),
            "X-Fingerprint": model.fingerprint,
            "Server-Timing": _server_timing(queue=result.queue_s, denoise=result.denoise_s, encode=encode_s),
            "Vary": "Accept",
            "Cache-Control": "no-store",
        }
        return Response(content, headers=headers, media_type=media_type)

    fields = SampleRequest.model_json_schema()["properties"]
    openapi: dict[str, Any] = {
        "parameters": [
            {"name": name, "in": "query", "schema": schema, "description": schema.get("description", "")}
            for name, schema in fields.items()
        ],
        "requestBody": {"content": {"application/json": {"schema": SampleRequest.model_json_schema()}}},
        "responses": {"200": {"description": "The images", "content": {media_type: {} for media_type in MEDIA_TYPES}}},
    }
    router.post("/sample", summary="Sample and wait", response_class=Response, openapi_extra=openapi)(sample)
    openapi = {key: value for key, value in openapi.items() if key != "requestBody"}
    router.get("/sample", summary="The same, for an <img>", response_class=Response, openapi_extra=openapi)(sample)
    return router


async def _finished_or_gone(request: Request, worker: Worker, job_id: str, spec: SampleSpec) -> JobResult:
    """Submit a job and wait for it; a client that goes away frees its rows at the next tick."""
    future: Future[JobResult] = worker.submit(job_id, spec)
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
