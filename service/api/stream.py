"""WS /sample/stream: each message starts a job. The client receives previews, and finally the images."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect

from tminus.service.access.access import Caller
from tminus.service.api.answers.problems import note_error, render
from tminus.service.api.answers.progress import Progress, result_of
from tminus.service.api.edge.authentication import has_key, identify
from tminus.service.api.edge.middleware import new_request_id, route_of, sender_of, target_of
from tminus.service.api.models import Models, Services
from tminus.service.api.request.reading import from_body, no_parameters, off_loop, parse_call
from tminus.service.api.request.schemas import StreamCall
from tminus.service.api.request.specs import refuse_float_depth
from tminus.service.api.submission import prepare_job, submit, warning_of
from tminus.service.errors import (
    BodyTooLarge,
    JobCancelled,
    MalformedMessage,
    ServiceError,
    Silence,
    Unauthorized,
)
from tminus.service.images.encoder import PNG
from tminus.service.preview import Mailbox, Watch
from tminus.service.spec import SampleSpec
from tminus.service.tracing import REQUEST_ID
from tminus.service.work import JobResult
from tminus.service.worker.running_job import NewJob

log = logging.getLogger(__name__)

FIRST_MESSAGE_S = 10.0  # seconds to wait for a key, and then for the first job
NEXT_MESSAGE_S = 60.0  # seconds to wait for the next job
KEY_CHARACTERS = 1024  # maximum length of a message with a key
SEND_S = 60.0  # timeout of each send in seconds, after which the client is disconnected
NORMAL = 1000


def stream_routes(models: Models) -> APIRouter:
    """Return a router with WS /sample/stream."""
    router = APIRouter(tags=["sample"])

    @router.websocket("/sample/stream")
    async def stream(ws: WebSocket) -> None:
        log.info("request %s of %s: WebSocket %s", new_request_id(ws.scope), sender_of(ws.scope), target_of(ws.scope))
        began_s, status, services = time.perf_counter(), 101, models.default
        try:
            services.allowed_sites.check(ws.scope)
            await no_parameters(ws)
            known = has_key(services.access, ws.scope)
            services = models.of(ws) if known else services  # do not reveal the models' names to a client without a key
            services.worker.state.check_open()  # before accepting, so that a proxy can try another server
            with services.streams.opened(ws.client.host if ws.client else ""):
                await ws.accept()
                await _Stream(models, services, ws, known=known).serve()
        except ServiceError as refusal:  # raised before the WebSocket was accepted
            note_error(refusal, services.metrics)
            status = refusal.status
            await ws.send_denial_response(render(refusal))
        finally:
            services.metrics.requested(route_of(ws.scope), status, time.perf_counter() - began_s)

    return router


class _Stream:
    """Runs the jobs of one connection, one at a time. The model is looked up again for each job."""

    def __init__(self, models: Models, services: Services, ws: WebSocket, *, known: bool) -> None:
        """known: False if the first message must contain a key; True if the handshake has one or needs none."""
        self._models, self._services, self._ws, self._known = models, services, ws, known
        self._secret: str | None = None  # a key from a message, because a page cannot set a WebSocket's headers

    async def serve(self) -> None:
        """Run jobs until the client closes the connection, disconnects or causes an error. Raises nothing."""
        with suppress(WebSocketDisconnect, TimeoutError):  # the client has disconnected or stopped reading
            try:
                if not self._known:
                    await self._introduce()
                patience_s, keep_open = FIRST_MESSAGE_S, True
                while keep_open:
                    values = await self._next_spec(patience_s)
                    caller = self._caller()
                    with (
                        caller.connected(),
                        self._services.streams.busy(),
                        self._models.used(self._ws) as self._services,
                    ):
                        asked = await parse_call(StreamCall, values, self._services.bounds)
                        del values  # frees megabytes of pictures, because the job may run for an hour
                        self._services, new = await prepare_job(self._services, caller, asked)
                        where = "in a stream, whose images are PNGs"
                        refuse_float_depth(new.spec, self._services.model, where)
                        await self._job(asked, new, caller)
                    keep_open = asked.keep_open
                    patience_s = NEXT_MESSAGE_S
                await self._close(NORMAL)
            except (WebSocketDisconnect, TimeoutError):
                raise
            except Exception as error:
                await self._end(error)

    async def _introduce(self) -> None:
        """Read the first message, which must contain a key. Raises Silence, Unauthorized or MalformedMessage."""
        try:
            async with asyncio.timeout(FIRST_MESSAGE_S):
                message = await self._receive(KEY_CHARACTERS)
        except TimeoutError:
            raise Silence(f"no key came in {FIRST_MESSAGE_S:g} s") from None
        if message.get("type") != "key":
            raise Unauthorized('the first message must be {"type": "key", "key": "…"}')
        self._secret = key_of(message)
        self._caller()

    def _caller(self) -> Caller:
        """Return the caller that the key belongs to now. Raises Unauthorized if the key has been removed."""
        access = self._services.access
        if self._secret is None or not access.has_keys:
            return identify(access, self._ws.scope)
        return access.with_secret(self._secret)

    async def _end(self, error: Exception) -> None:
        if not isinstance(error, ServiceError):
            log.error("a stream ended by an error", exc_info=error)
            error = ServiceError()
        note_error(error, self._services.metrics)
        with self._services.streams.busy():
            message = error.problem() | {"type": "error"}  # replaces the URN in the problem document's `type`
            if error.retry_after_s is not None:
                message["retry_after_s"] = error.retry_after_s
            await self._send(message)
            await self._close(error.ws_close, error.code)

    async def _next_spec(self, patience_s: float) -> dict[str, Any]:
        """Wait for the parameters of a job. Raises Silence.

        Ignores a cancel message that arrives after a job's end. Stores the key of a key message.
        """
        try:
            async with asyncio.timeout(patience_s):
                while (message := await self._receive()).get("type") in ("cancel", "key"):
                    if message["type"] == "key":
                        self._secret = key_of(message)
        except TimeoutError:
            raise Silence(f"no job was asked for in {patience_s:g} s") from None
        return message

    async def _receive(self, most_characters: int | None = None) -> dict[str, Any]:
        """Wait for a message and parse it. If it is longer than `most_characters`, return {}."""
        message = await self._ws.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message["code"], message.get("reason"))
        text: str | None = message.get("text")
        if text is None or not text.strip():
            what = "an empty" if text is not None else "a binary"
            raise MalformedMessage(f"a JSON object in a text message is expected, got {what} one")
        if most_characters is not None and len(text) > most_characters:
            return {}
        try:
            return await off_loop(len(text), from_body, text.encode(), self._services.limits.max_body_bytes)
        except BodyTooLarge:
            raise
        except ServiceError as error:
            raise MalformedMessage(error.detail.replace("the body", "the message")) from None

    async def _job(self, preview: StreamCall, new: NewJob, caller: Caller) -> None:
        model = self._services.model
        mailbox = Mailbox(
            asyncio.get_running_loop(), partial(self._services.metrics.count, "tminus_frames_dropped_total")
        )
        watch = Watch(preview.pace, preview.shows, mailbox.put)
        ticket = await submit(self._services, caller, replace(new, watch=watch))
        if caller.name:
            log.info("request %s: job %s is of %s", REQUEST_ID.get(), new.id, caller.name)
        done = result_of(ticket, new.deadline_s)
        tasks = [listening := asyncio.ensure_future(self._listen())]
        try:
            accepted = {
                "type": "accepted",
                "id": new.id,
                "seed": new.spec.seed,
                "sampler": new.spec.sampler,
                "steps": new.spec.steps,
                "guidance": new.spec.guidance,
                "eta_s": round(ticket.outlook.eta_s, 3),
                "position": ticket.outlook.position,
                "fingerprint": model.fingerprint,
            }
            others = {"quality": self._services.quality_of(new.spec), "warning": warning_of(new.spec, model)}
            await self._send(accepted | {name: value for name, value in others.items() if value is not None})
            progress = Progress(self._services, preview, new.id, new.spec, ticket.outlook.eta_s)
            tasks.append(showing := asyncio.ensure_future(self._show(mailbox, progress)))
            any_of: set[asyncio.Future[Any]] = {done, listening, showing}
            await asyncio.wait(any_of, return_when=asyncio.FIRST_COMPLETED)
            mailbox.close()
            error = await self._stop_listening(listening, done, new.id)
            await showing  # let it finish the current frame
            if error is not None:
                raise error
            try:
                result = await done
            except JobCancelled:
                await self._send({"type": "cancelled", "id": new.id})
            else:
                await self._deliver(preview, new.spec, result, mailbox.dropped)
        finally:
            mailbox.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not done.done():
                self._services.worker.cancel(new.id, "client_gone")

    async def _stop_listening(
        self, listening: "asyncio.Task[None]", done: "asyncio.Future[JobResult]", job_id: str
    ) -> BaseException | None:
        """Cancel the job if it is still running. Return the client's error, if any. Raises WebSocketDisconnect."""
        error = listening.exception() if listening.done() else None
        if not done.done():
            was_asked = listening.done() and error is None
            self._services.worker.cancel(job_id, "client_cancelled" if was_asked else "client_gone")
        if isinstance(error, WebSocketDisconnect):
            raise error
        listening.cancel()  # later messages belong to the next job
        await asyncio.wait([listening])
        return error

    async def _listen(self) -> None:
        """Return when the client cancels the job. Raises MalformedMessage for any other message."""
        message = await self._receive()
        if message.get("type") != "cancel":
            raise MalformedMessage('while a job runs only {"type": "cancel"} is understood')

    async def _show(self, mailbox: Mailbox, progress: Progress) -> None:
        while (frame := await mailbox.take()) is not None:
            if not (shown := await progress.shown(frame)):
                continue
            async with asyncio.timeout(SEND_S):
                for members, picture in shown:
                    await self._send({"type": "frame", **members})
                    await self._send(picture)
            self._services.metrics.count("tminus_frames_sent_total")

    async def _deliver(self, preview: StreamCall, spec: SampleSpec, result: JobResult, dropped: int) -> None:
        pictures = await self._services.encoder.encode_pictures(preview.layout, spec, result, self._services.model)
        times = {"queue_s": result.queue_s, "first_step_s": result.first_step_s, "denoise_s": result.denoise_s}
        await self._send(
            {"type": "done", "media_type": PNG, "images": len(pictures), "frames_dropped": dropped}
            | {name: round(seconds, 4) for name, seconds in times.items()}
        )
        for picture in pictures:
            await self._send(picture)

    async def _send(self, message: dict[str, Any] | bytes) -> None:
        async with _in_time():
            await (self._ws.send_bytes(message) if isinstance(message, bytes) else self._ws.send_json(message))

    async def _close(self, code: int, reason: str = "") -> None:
        async with _in_time():
            await self._ws.close(code, reason)


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    """Limit how long a send may take. Raises TimeoutError, or WebSocketDisconnect if the connection was closed."""
    try:
        async with asyncio.timeout(SEND_S):
            yield
    except RuntimeError:
        raise WebSocketDisconnect(1006) from None


def key_of(message: dict[str, Any]) -> str:
    """Return the key in a message of type `key`. Raises MalformedMessage."""
    secret = message.get("key")
    if message.keys() != {"type", "key"} or not isinstance(secret, str):
        raise MalformedMessage("a message of type key must have a key, which is text, and nothing else")
    return secret
