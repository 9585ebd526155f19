"""One job as its client waits for it, in the event loop: its result, how long it has left, what it took, its events."""

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

LATE_S = 2.0  # after a deadline, for the worker to say that it has passed
RECOUNT_S = 5.0  # until a job's forecast is asked for again
SEND_S = 40.0  # for each PIECE_BYTES of an event to leave: a client that reads nothing is disconnected
QUIET_S = 15.0  # until a comment is sent, so that no proxy takes the connection for dead
EVENT_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Item = TypeVar("Item")


class Progress:
    """What viewers of one running job are told of it. Its time left is asked for now and then, and counted down."""

    def __init__(
        self, services: Services, preview: PreviewRequest, job_id: str, spec: SampleSpec, eta_s: float | None
    ) -> None:
        """services: of the job's model. eta_s: the forecast that was made just now, if there was one."""
        self._services, self._job_id, self._spec, self._eta_s = services, job_id, spec, eta_s or 0.0
        self.preview = preview
        self._loop = asyncio.get_running_loop()
        self._asked_s = self._loop.time() if eta_s is not None else float("-inf")

    @cached_property
    def _timesteps(self) -> Sequence[float]:
        """The timesteps of a job that runs: one that waits may be of a table that is gone, and fail."""
        return timesteps_of(self._spec, self._services.model)

    async def after(self, step: int) -> dict[str, Any]:
        """Say where the job stands after a number of steps. t: the timestep of the next step."""
        if self._loop.time() - self._asked_s > RECOUNT_S:
            status = await self._services.statuses.of(self._job_id)
            if status is not None:  # otherwise it came after all jobs were last asked for, or has just ended
                self._asked_s, self._eta_s = self._loop.time(), status.eta_s
        left_s, steps = max(0.0, self._eta_s - (self._loop.time() - self._asked_s)), self._spec.num_passes
        t = self._timesteps[min(step, steps - 1)]
        return {"step": step, "steps": steps, "t": round(t, 3), "eta_s": round(left_s, 3)}

    async def shown(self, frame: Frame) -> list[tuple[dict[str, Any], bytes]]:
        """Encode a frame: the members that tell of each picture, and the picture. Empty, if it cannot be encoded."""
        preview = self.preview
        try:
            pictures = await self._services.encoder.encode_frame(frame, preview.frame_format, preview.layout)
        except Exception:  # a lost frame ends neither the job nor the stream
            log.exception("a frame of job %s could not be encoded", self._job_id)
            return []
        told = await self.after(frame.step)
        return [
            (told | {"show": show} | ({} if image is None else {"image": self._spec.index + image}), picture)
            for show, image, picture in pictures
        ]


def head_answer(headers: Mapping[str, str], media_type: str) -> Response:
    """Make the answer to a HEAD without making its body, whose length is then not known (RFC 9110, 9.3.2)."""
    answer = Response(headers=headers, media_type=media_type)
    del answer.headers["Content-Length"]
    return answer


def result_of(ticket: Ticket, deadline_s: float | None) -> "asyncio.Future[JobResult]":
    """Return the result of an accepted job, to wait for.

    The worker ends a job whose deadline passes; where it hangs in a step, this does, a little later.
    """
    result = asyncio.ensure_future(_result(ticket, deadline_s))
    # Its error may go unread, as a client that has gone does not wait for it, and asyncio would complain.
    result.add_done_callback(lambda done: done.cancelled() or done.exception())
    return result


async def finished_or_gone(
    request: Request, worker: Worker, job_id: str, done: "asyncio.Future[JobResult]"
) -> JobResult:
    """Wait for a job. A disconnect cancels it and frees its rows next tick."""
    try:
        return await while_connected(request, asyncio.shield(done))
    finally:
        if not done.done():
            worker.cancel(job_id, "client_gone")


def server_timing(result: JobResult, encode_s: float, model: ModelInfo) -> str:
    """Make the header Server-Timing: what a job's time was spent on, in milliseconds."""
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
    """Yield the items as they come, and None whenever none has come for so long."""
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
    """An answer of server-sent events, held to a time for each; comments fill its silence.

    It calls `close` when it ends, however it ends.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], close: Callable[[], None], headers: Mapping[str, str] | None = None
    ) -> None:
        self._events, self._close = _with_comments(events), close
        super().__init__(self._events, headers={**(headers or {}), **EVENT_HEADERS})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            size_bytes = len(message.get("body", b""))  # a large event may take a slow reader longer
            async with asyncio.timeout(SEND_S * max(1, math.ceil(size_bytes / PIECE_BYTES))):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            log.info("a client reads no events, and is disconnected")
        except TooManyBytes as error:  # the client comes back, and is told where the job is then
            log.info("an event is not sent, and its client is disconnected: %s", error.detail)
        finally:
            self._close()
            await self._events.aclose()
