"""Images by server-sent events, in OpenAI's form: the estimate of x_0 on the way, then each image."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from typing import Any

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel

from tminus.service.api.answers.event_stream import QUIET_S, EventStream
from tminus.service.api.answers.problems import noted
from tminus.service.api.answers.progress import result_of
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.openai.answers import CompletedImage, PartialImage
from tminus.service.api.openai.errors import as_openai
from tminus.service.api.openai.wanted import Wanted
from tminus.service.api.services import Services
from tminus.service.api.submission import submit
from tminus.service.errors import ServiceError
from tminus.service.preview import Frame, Pace, Watch
from tminus.service.work import JobResult

log = logging.getLogger(__name__)


def steps_shown(passes: int, count: int) -> tuple[int, ...]:
    """After which passes an image is shown on its way: so often, evenly, at most once a pass, not after the last."""
    return tuple(sorted({round(passes * k / (count + 1)) for k in range(1, count + 1)} - {0, passes}))


async def stream(
    services: Services, request: Request, wanted: Wanted, headers: dict[str, str], stack: ExitStack
) -> EventStream:
    """Begin the job, and answer by its events. stack: is closed when they end; a client that left frees its rows.

    Raises TooManyStreams, and what `submit` does.
    """
    loop, model, spec = asyncio.get_running_loop(), services.model, wanted.spec
    at = steps_shown(spec.num_passes, wanted.members.partial_images)
    stack.enter_context(services.streams.opened(request.client.host if request.client else ""))
    stack.enter_context(services.streams.busy())
    held_bytes = len(at) * spec.n * model.height_px * model.width_px * model.channels
    stack.enter_context(services.recordings.taken(held_bytes, "partial_images"))
    # All of them are kept until they are sent: unlike a viewer's, they are few, and were asked for one by one.
    arrived: asyncio.Queue[Frame | None] = asyncio.Queue()

    def put(frame: Frame) -> None:  # in the worker's thread
        with suppress(RuntimeError):  # the event loop is closed, so there is no reader
            loop.call_soon_threadsafe(arrived.put_nowait, frame)

    ticket = await submit(
        services,
        caller_of(request),
        wanted.job_id,
        spec,
        wanted.deadline_s,
        watch=Watch(Pace(steps=at), ("x_0",), put) if at else None,
        inputs=wanted.inputs,
    )
    done = result_of(ticket, wanted.deadline_s)
    done.add_done_callback(lambda _: arrived.put_nowait(None))
    stack.callback(lambda: done.done() or services.worker.cancel(wanted.job_id, "client_gone"))
    return EventStream(_events(services, wanted, arrived, done), stack.pop_all().close, headers)


async def _events(
    services: Services, wanted: Wanted, arrived: "asyncio.Queue[Frame | None]", done: "asyncio.Future[JobResult]"
) -> AsyncIterator[bytes]:
    """Yield events until the job has ended; frames come before its end, since the worker's thread tells both."""
    shown = 0
    try:
        while True:
            try:
                async with asyncio.timeout(QUIET_S):
                    frame = await arrived.get()
            except TimeoutError:
                yield KEEPALIVE_COMMENT
                continue
            if frame is None:
                break
            try:
                events = await _partial(services, wanted, frame, shown)
            except Exception:  # a lost frame does not end the job
                log.exception("a frame of job %s could not be encoded", wanted.job_id)
                continue
            shown += 1
            for event in events:
                yield event
        for event in await _completed(services, wanted, await done):
            yield event
    except ServiceError as error:
        noted(error, services.metrics)
        yield _error(error)
    except Exception:
        log.exception("the events of job %s ended by an error", wanted.job_id)
        yield _error(ServiceError("something went wrong on the server; its log has the details"))


async def _partial(services: Services, wanted: Wanted, frame: Frame, number: int) -> list[bytes]:
    pictures = await services.encoder.encode_frame(frame, wanted.members.output_format, "images", wanted.quality)
    services.metrics.frame_sent()
    return [
        _event(
            PartialImage(
                type=f"{wanted.name}.partial_image",
                b64_json=base64.b64encode(picture).decode("ascii"),
                partial_image_index=number,
                created_at=int(time.time()),
                image_index=image or 0,
                **wanted.about(services.model),
            )
        )
        for _, image, picture in pictures
    ]


async def _completed(services: Services, wanted: Wanted, result: JobResult) -> list[bytes]:
    pictures = await wanted.pictures(services.encoder, result, services.model)
    return [
        _event(
            CompletedImage(
                type=f"{wanted.name}.completed",
                b64_json=base64.b64encode(picture).decode("ascii"),
                created_at=int(time.time()),
                image_index=k,
                **wanted.about(services.model),
                **wanted.recipe(k, services.model),
            )
        )
        for k, picture in enumerate(pictures)
    ]


def _event(document: Any) -> bytes:
    assert isinstance(document, BaseModel)
    members = document.model_dump()
    return format_sse_event(data_str=json.dumps(members), event=members["type"])


def _error(error: ServiceError) -> bytes:
    return format_sse_event(data_str=json.dumps(as_openai(error.problem())[1]), event="error")
