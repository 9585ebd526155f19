"""WS /sample/stream: a spec in, previews out while the job runs, the image at the end."""

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect

from service import parameters
from service.encoder import PNG, Encoder
from service.errors import ForeignOrigin, JobCancelled, MalformedMessage, ServiceError, Silence, TooManyStreams
from service.job import JobResult, Limits, ModelInfo, SampleSpec, Ticket, timesteps_of
from service.mailbox import Mailbox
from service.metrics import Metrics
from service.preview import Frame, Watch
from service.preview_schemas import PreviewRequest
from service.problems import render
from service.schemas import SampleRequest
from service.worker import Worker

FIRST_MESSAGE_S = 10.0  # from connecting to the spec
NEXT_MESSAGE_S = 60.0  # between two jobs
SEND_S = 60.0  # for a message to leave: a reader that takes nothing is let go
FORECAST_S = 5.0  # how old a forecast may be; what it said counts down meanwhile
NORMAL, INTERNAL = 1000, 1011


def stream_routes(
    worker: Worker,
    encoder: Encoder,
    metrics: Metrics,
    model: ModelInfo,
    limits: Limits,
    allowed_origins: frozenset[str] = frozenset(),
) -> APIRouter:
    """Make the route. It holds how many streams each address has open.

    allowed_origins: whose pages may connect, beside the server's own; "*" is any.
    """
    router = APIRouter(tags=["sample"])
    open_streams: Counter[str] = Counter()

    @contextmanager
    def counted(address: str) -> Iterator[None]:
        if open_streams[address] >= limits.max_streams_per_address:
            raise TooManyStreams(limits.max_streams_per_address)
        open_streams[address] += 1
        try:
            yield
        finally:
            open_streams[address] -= 1
            if not open_streams[address]:
                del open_streams[address]

    @router.websocket("/sample/stream")
    async def stream(ws: WebSocket) -> None:
        try:
            _check_origin(ws, allowed_origins)
            with counted(ws.client.host if ws.client else ""):
                await ws.accept()
                await _Stream(ws, worker, encoder, metrics, model, limits).serve()
        except ServiceError as refusal:  # before it was accepted
            metrics.rejected(refusal.code)
            await ws.send_denial_response(render(refusal))

    return router


def _check_origin(ws: WebSocket, allowed: frozenset[str]) -> None:
    """Refuse pages of other sites: a browser would let them connect. What is no browser sends no Origin."""
    origin = ws.headers.get("origin")
    if origin is None or "*" in allowed or origin.lower() in allowed:
        return
    if urlsplit(origin).netloc.lower() != ws.headers.get("host", "").lower():
        raise ForeignOrigin(f"pages of {origin} may not connect here", field="Origin", value=origin)


class _Stream:
    """One connection. Jobs run over it one after the other."""

    def __init__(
        self, ws: WebSocket, worker: Worker, encoder: Encoder, metrics: Metrics, model: ModelInfo, limits: Limits
    ) -> None:
        self._ws, self._worker, self._encoder = ws, worker, encoder
        self._metrics, self._model, self._limits = metrics, model, limits

    async def serve(self) -> None:
        """Run jobs until the client has no more, goes away or does something wrong. Raises nothing."""
        try:
            patience_s, keep_open = FIRST_MESSAGE_S, True
            while keep_open:
                keep_open = await self._job(await self._next_spec(patience_s))
                patience_s = NEXT_MESSAGE_S
            await self._ws.close(NORMAL)
        except WebSocketDisconnect:
            pass
        except TimeoutError:  # it reads nothing; so it will not read why
            with contextlib.suppress(WebSocketDisconnect, TimeoutError):
                await self._close(INTERNAL, "nothing is read")
        except ServiceError as error:
            if error.refusal:
                self._metrics.rejected(error.code)
            with contextlib.suppress(WebSocketDisconnect, TimeoutError):
                await self._send(_error_message(error))
                await self._close(error.ws_close, error.code)

    async def _next_spec(self, patience_s: float) -> dict[str, Any]:
        """Wait for the parameters of a job. A cancel that crossed a job's end is let pass."""
        try:
            async with asyncio.timeout(patience_s):
                while (message := await self._receive()).get("type") == "cancel":
                    pass
        except TimeoutError:
            raise Silence(f"no job was asked for in {patience_s:g} s") from None
        return message

    async def _receive(self) -> dict[str, Any]:
        message = await self._ws.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message["code"], message.get("reason"))
        text = message.get("text")
        if text is None:
            raise MalformedMessage("a JSON object in a text message is expected, got a binary one")
        try:
            return parameters.from_body(text.encode())
        except ServiceError as error:
            raise MalformedMessage(error.detail.replace("the body", "the message")) from None

    async def _job(self, message: dict[str, Any]) -> bool:
        """Run one job and say whether another may follow."""
        preview, rest = PreviewRequest.split(message)
        asked = SampleRequest.parse(rest, self._model, self._limits)
        spec = asked.to_spec(self._model, self._limits)
        job_id = uuid.uuid4().hex
        mailbox = Mailbox(asyncio.get_running_loop(), self._metrics.frame_dropped)
        watch = Watch(preview.pace, preview.shows, mailbox.put)
        ticket = self._worker.submit(job_id, spec, asked.deadline_s, watch)
        done = asyncio.ensure_future(asyncio.wrap_future(ticket.future))
        tasks = [asyncio.ensure_future(self._listen())]
        try:
            await self._send(
                {
                    "type": "accepted",
                    "id": job_id,
                    "seed": spec.seed,
                    "eta_s": round(ticket.eta_s, 3),
                    "position": ticket.position,
                    "fingerprint": self._model.fingerprint,
                }
            )
            tasks.append(asyncio.ensure_future(self._show(mailbox, preview, spec, job_id, ticket)))
            listening, showing = tasks
            any_of: set[asyncio.Future[Any]] = {done, listening, showing}
            await asyncio.wait(any_of, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                asked_to = listening.done() and listening.exception() is None
                self._worker.cancel(job_id, "client_cancelled" if asked_to else "client_gone")
            mailbox.close()
            await showing  # a frame that is on its way goes out whole
            if listening.done():
                listening.result()
            try:
                result = await done
            except JobCancelled:
                await self._send({"type": "cancelled", "id": job_id})
            else:
                await self._deliver(spec, preview, result, mailbox.dropped)
            return preview.keep_open
        finally:
            mailbox.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not done.done():
                self._worker.cancel(job_id, "client_gone")
                done.add_done_callback(lambda future: future.cancelled() or future.exception())

    async def _listen(self) -> None:
        """Return when the client cancels. Raises for anything else it says, and when it goes away."""
        message = await self._receive()
        if message.get("type") != "cancel":
            raise MalformedMessage('while a job runs only {"type": "cancel"} is understood')

    async def _show(
        self, mailbox: Mailbox, preview: PreviewRequest, spec: SampleSpec, job_id: str, ticket: Ticket
    ) -> None:
        """Send frames until the mailbox is closed."""
        timesteps = timesteps_of(spec, self._model)
        loop = asyncio.get_running_loop()
        told_s, eta_s = loop.time(), ticket.eta_s
        while (frame := await mailbox.take()) is not None:
            pictures = await self._encoder.encode_frame(frame, preview.frame_format, preview.layout)
            if loop.time() - told_s > FORECAST_S:
                status = await loop.run_in_executor(None, self._worker.status, job_id)
                told_s, eta_s = loop.time(), status.eta_s if status is not None else 0.0
            left_s = max(0.0, eta_s - (loop.time() - told_s))
            for show, image, picture in pictures:
                message = _frame_message(frame, spec, timesteps[frame.step], show, left_s)
                await self._send(message if image is None else message | {"image": spec.index + image})
                await self._send(picture)
            self._metrics.frame_sent()

    async def _deliver(self, spec: SampleSpec, preview: PreviewRequest, result: JobResult, dropped: int) -> None:
        """Send the end: what it took, and the picture or pictures."""
        pictures = await self._encoder.encode_pictures(preview.layout, spec, result)
        times = {"queue_s": result.queue_s, "first_step_s": result.first_step_s, "denoise_s": result.denoise_s}
        await self._send(
            {"type": "done", "media_type": PNG, "images": len(pictures), "frames_dropped": dropped}
            | {name: round(seconds, 4) for name, seconds in times.items()}
        )
        for picture in pictures:
            await self._send(picture)

    async def _send(self, message: dict[str, Any] | bytes) -> None:
        async with asyncio.timeout(SEND_S):
            if isinstance(message, bytes):
                await self._ws.send_bytes(message)
            else:
                await self._ws.send_json(message)

    async def _close(self, code: int, reason: str) -> None:
        async with asyncio.timeout(SEND_S):
            await self._ws.close(code, reason)


def _frame_message(frame: Frame, spec: SampleSpec, t: int, show: str, eta_s: float) -> dict[str, Any]:
    return {"type": "frame", "step": frame.step, "steps": spec.steps, "t": t, "show": show, "eta_s": round(eta_s, 3)}


def _error_message(error: ServiceError) -> dict[str, Any]:
    """The problem's members, but for its type, which a message has of its own."""
    message = error.problem() | {"type": "error"}
    if "Retry-After" in error.headers:
        message["retry_after_s"] = int(error.headers["Retry-After"])
    return message
