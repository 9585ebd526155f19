"""The progress of a job, as shown to clients: result, remaining time, timing and events."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

from tminus.service.api.edge.middleware import PIECE_BYTES
from tminus.service.api.models import Services
from tminus.service.api.request.reading import while_connected
from tminus.service.api.request.schemas import PreviewRequest
from tminus.service.errors import DeadlinePassed, TooManyBytes
from tminus.service.model_info import ModelInfo
from tminus.service.preview import Frame
from tminus.service.spec import SampleSpec
from tminus.service.work import JobResult, Ticket, timesteps_of
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

LATE_S = 2.0  # seconds that the worker has to end a job after its deadline
RECOUNT_S = 5.0  # seconds between two updates of a job's forecast
SEND_S = 40.0  # seconds that a client has to read PIECE_BYTES of an event before it is disconnected
QUIET_S = 15.0  # seconds of silence before a comment is sent, so that proxies keep the connection open
EVENT_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Item = TypeVar("Item")


class Progress:
    """The progress of a running job, for one viewer. Between two forecasts, the remaining time is counted down."""

    def __init__(
        self, services: Services, preview: PreviewRequest, job_id: str, spec: SampleSpec, eta_s: float | None
    ) -> None:
        """services: for the job's model. eta_s: a forecast made just now, or None."""
        self._services, self._job_id, self._spec, self._eta_s = services, job_id, spec, eta_s or 0.0
        self.preview = preview
        self._loop = asyncio.get_running_loop()
        self._asked_s = self._loop.time() if eta_s is not None else float("-inf")

    @cached_property
    def _timesteps(self) -> Sequence[float]:
        """The timesteps of the job. Computed on first use: a waiting job's sampler table may be missing."""
        return timesteps_of(self._spec, self._services.model)

    async def after(self, step: int) -> dict[str, Any]:
        """Return the progress of the job after `step` steps. The member `t` is the timestep of the next step."""
        if self._loop.time() - self._asked_s > RECOUNT_S:
            status = await self._services.statuses.of(self._job_id)
            if status is not None:  # None if the job is newer than the last forecast or has just ended
                self._asked_s, self._eta_s = self._loop.time(), status.eta_s
        left_s, steps = max(0.0, self._eta_s - (self._loop.time() - self._asked_s)), self._spec.num_passes
        t = self._timesteps[min(step, steps - 1)]
        return {"step": step, "steps": steps, "t": round(t, 3), "eta_s": round(left_s, 3)}

    async def shown(self, frame: Frame) -> list[tuple[dict[str, Any], bytes]]:
        """Encode a frame as pairs of metadata and picture. If encoding fails, return an empty list."""
        preview = self.preview
        try:
            pictures = await self._services.encoder.encode_frame(frame, preview.frame_format, preview.layout)
        except Exception:  # losing a frame must end neither the job nor the stream
            log.exception("a frame of job %s could not be encoded", self._job_id)
            return []
        told = await self.after(frame.step)
        return [
            (told | {"show": show} | ({} if image is None else {"image": self._spec.index + image}), picture)
            for show, image, picture in pictures
        ]


def head_answer(headers: Mapping[str, str], media_type: str) -> Response:
    """Return the response to a HEAD request. Its content length is unknown (RFC 9110, section 9.3.2)."""
    answer = Response(headers=headers, media_type=media_type)
    del answer.headers["Content-Length"]
    return answer


def result_of(ticket: Ticket, deadline_s: float | None) -> "asyncio.Future[JobResult]":
    """Return a future that will hold the result of an accepted job.

    The worker ends a job at its deadline. If the worker hangs, the future fails LATE_S seconds after the deadline.
    """
    result = asyncio.ensure_future(_result(ticket, deadline_s))
    # Retrieve the exception, so that asyncio does not log it when no client waits for the result.
    result.add_done_callback(lambda done: done.cancelled() or done.exception())
    return result


async def finished_or_gone(
    request: Request, worker: Worker, job_id: str, done: "asyncio.Future[JobResult]"
) -> JobResult:
    """Wait for a job. If the client disconnects, cancel the job, which frees its rows for the next tick."""
    try:
        return await while_connected(request, asyncio.shield(done))
    finally:
        if not done.done():
            worker.cancel(job_id, "client_gone")


def server_timing(result: JobResult, encode_s: float, model: ModelInfo) -> str:
    """Return the value of the Server-Timing header: the duration of each phase of a job, in milliseconds."""
    seconds = {"queue": result.queue_s, "first_step": result.first_step_s, "denoise": result.denoise_s}
    seconds |= {"decode": result.decode_s} if model.latent is not None else {}
    return ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in (seconds | {"encode": encode_s}).items())


async def _result(ticket: Ticket, deadline_s: float | None) -> JobResult:
    try:
        async with asyncio.timeout(None if deadline_s is None else deadline_s + LATE_S):
            return await asyncio.wrap_future(ticket.future)
    except TimeoutError:
        assert deadline_s is not None
        raise DeadlinePassed.of(deadline_s) from None


async def none_when_quiet(items: AsyncGenerator[Item], patience_s: float) -> AsyncGenerator[Item | None]:
    """Yield the items. Also yield None each time `patience_s` seconds pass without an item."""
    coming = asyncio.ensure_future(anext(items, None))
    try:
        while True:
            await asyncio.wait([coming], timeout=patience_s)
            if not coming.done():
                yield None
                continue
            if (item := coming.result()) is None:
                return
            yield item
            coming = asyncio.ensure_future(anext(items, None))
    finally:
        if not coming.done():
            coming.cancel()
            await asyncio.wait([coming])
        await items.aclose()


async def _with_comments(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(none_when_quiet(events, QUIET_S)) as parts:
        async for part in parts:
            yield KEEPALIVE_COMMENT if part is None else part


class EventStream(EventSourceResponse):
    """A response that streams server-sent events. Every event has a send timeout, and silence is filled with comments.

    Calls `close` when the response ends for any reason.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], close: Callable[[], None], headers: Mapping[str, str] | None = None
    ) -> None:
        self._events, self._close = _with_comments(events), close
        super().__init__(self._events, headers={**(headers or {}), **EVENT_HEADERS})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            size_bytes = len(message.get("body", b""))  # a large event gets more time
            async with asyncio.timeout(SEND_S * max(1, math.ceil(size_bytes / PIECE_BYTES))):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            log.info("a client reads no events, and is disconnected")
        except TooManyBytes as error:  # the client reconnects and gets the current state
            log.info("an event is not sent, and its client is disconnected: %s", error.detail)
        finally:
            self._close()
            await self._events.aclose()
