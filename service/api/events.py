"""GET /jobs/{id}/events: streams a durable job as server-sent events, with frames if the client requests them.

Events report the current state, not the history. A client that reconnects continues after the last event that it
received, and never misses the final event.
"""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.sse import format_sse_event

from tminus.service.api.answers.documents import JobAnswer
from tminus.service.api.answers.headers import with_headers
from tminus.service.api.answers.messages import EVENTS
from tminus.service.api.answers.openapi import LAST_EVENT_ID, Contract, failures
from tminus.service.api.answers.operations import described
from tminus.service.api.answers.progress import EVENT_HEADERS, EventStream, Progress, head_answer, none_when_quiet
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.models import Models, Services
from tminus.service.api.other_replicas import came_from_a_replica
from tminus.service.api.request.reading import in_query
from tminus.service.api.request.schemas import PreviewRequest
from tminus.service.errors import JobNotFound, StorageFailed
from tminus.service.jobs.held_job import HeldJob
from tminus.service.jobs.jobs import JobView, held_view
from tminus.service.jobs.store.records import OUTCOMES
from tminus.service.preview import Frame, Mailbox, Watch

POLL_S = 1.0  # seconds between two reads of a job's state when no frame arrives
RECONNECT_MS = 2000
LAST = "end"  # id of the final event


def event_routes(models: Models, contract: Contract) -> APIRouter:
    """Return a router with GET /jobs/{id}/events."""
    router = APIRouter(prefix="/jobs", tags=["jobs"])

    @router.get(
        "/{job_id}/events",
        **described("watch_job"),
        response_class=Response,  # FastAPI's EventSourceResponse requires a handler that yields
        responses={
            200: {
                "description": "The events",
                "content": {"text/event-stream": {}},
                "x-events": EVENTS,
                **with_headers("Cache-Control"),
            },
            204: {"description": "The client has the final event"},
            **failures(404, 422, 429, 500, 507),
        },
        openapi_extra={"parameters": [*contract.query(PreviewRequest), LAST_EVENT_ID]},
    )
    async def get_events(
        request: Request, job_id: str, preview: Annotated[PreviewRequest, in_query(PreviewRequest)]
    ) -> Response:
        last_id = request.headers.get("last-event-id", "")
        services = models.default  # any model will do: only parts that all models share are used
        view = await services.jobs.find_durable(job_id, caller_of(request).sees)
        if last_id == LAST and view.state in OUTCOMES:  # status 204 stops an EventSource from reconnecting
            return Response(status_code=204)
        if request.method == "HEAD":
            return head_answer(EVENT_HEADERS, "text/event-stream")
        with ExitStack() as stack:
            stack.enter_context(services.streams.opened(request.client.host if request.client else ""))
            follower = _Follower(models, request, preview, view, last_id)
            stack.callback(follower.close)
            return EventStream(follower.events(), stack.pop_all().close)

    return router


class _Follower:
    """Streams a job's events to one connection until the job ends.

    The events come from this replica's worker if this replica holds the job. If another replica holds it, that
    replica's events are forwarded. If none does, the job's state is read from the store.
    """

    def __init__(self, models: Models, request: Request, preview: PreviewRequest, view: JobView, last_id: str) -> None:
        """last_id: the id of the last event that the client received."""
        self._models, self._request, self._preview, self._last_id = models, request, preview, last_id
        self._services, self._jobs = models.default, models.default.jobs
        self._sees, self._view = caller_of(request).sees, view
        self._viewer = self._watch()  # start before the response begins, so that no frame is missed

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield events until the job ends, the job is deleted, or the server shuts down."""
        yield format_sse_event(retry=RECONNECT_MS)
        told = ""
        while self._view.record.outcome is None:
            if self._viewer is not None:
                async for event in self._viewer.events(self._view):
                    yield event
                job, told, self._last_id = self._viewer.job, "", self._viewer.last_id
                self.close()
                if job.record.outcome is not None:
                    (self._view,) = await self._jobs.with_deliveries([held_view(job, None)])
                    break
            elif (address := await self._holder()) is not None:
                async for events in self._passed_on(address):
                    told = ""
                    yield events
                if self._last_id == LAST:
                    return
            if self._is_ending:  # the client will reconnect to another replica
                return
            if self._view.state == "waiting" != told:
                yield _event("waiting", _standing(None, None))
            told = self._view.state
            await asyncio.sleep(POLL_S)
            try:
                self._view = await self._jobs.find_durable(self._view.record.id, self._sees)
            except JobNotFound:  # the job was deleted; a client that reconnects will get 404
                return
            except StorageFailed:
                continue
            self._viewer = self._watch()
        yield _event(self._view.state, JobAnswer.of(self._view).model_dump(), LAST)

    def close(self) -> None:
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None

    @property
    def _is_ending(self) -> bool:
        """Return True if this process will run no more steps of durable jobs."""
        return self._services.worker.state.draining or self._services.worker.state.crashed

    def _watch(self) -> "_Viewer | None":
        """Start watching the job. Return None if this process does not hold it."""
        mailbox = Mailbox(
            asyncio.get_running_loop(), partial(self._services.metrics.count, "tminus_frames_dropped_total")
        )
        shows = self._preview.shows if "show" in self._preview.model_fields_set else ()  # no pictures unless requested
        # A job that resumed from a snapshot may be behind the last step that the client saw. The client then sees steps
        # again.
        known = int(self._last_id) if self._last_id.isdecimal() and len(self._last_id) < 9 else 0
        watch = Watch(self._preview.pace, shows, mailbox.put, min(known, self._view.step or 0))
        job = self._jobs.watch(self._view.record.id, watch, mailbox)
        if job is None:
            return None
        services = self._models.numbered(job.model.number)
        progress = Progress(services, self._preview, job.record.id, job.record.spec, self._view.eta_s)
        return _Viewer(services, job, watch, mailbox, progress, self._last_id)

    async def _holder(self) -> str | None:
        """Return the address of the other replica that holds the job.

        Return None if no other replica holds it, if the store fails, or if this request was already forwarded by a
        replica.
        """
        with suppress(StorageFailed):
            return None if came_from_a_replica(self._request) else await self._jobs.held_at(self._view)
        return None

    async def _passed_on(self, address: str) -> AsyncIterator[bytes]:
        """Yield the events of the replica that holds the job, for as long as it holds the job.

        A replica that hangs keeps its connection open but sends nothing. So the store is checked each time POLL_S
        seconds pass without an event.
        """
        sent = self._services.other_replicas.events(address, self._request, self._view.record.id, self._last_id)
        async with aclosing(none_when_quiet(sent, POLL_S)) as parts:
            async for part in parts:
                if part is not None:
                    events, self._last_id = part
                    yield events
                if self._is_ending or (part is None and not await self._is_held_at(address)):
                    return

    async def _is_held_at(self, address: str) -> bool:
        try:
            return await self._jobs.held_at(self._view) == address
        except StorageFailed:  # while the store fails, no other replica can take over the job
            return True


@dataclass
class _Viewer:
    """Sends one connection the events of a job that this process holds."""

    services: Services  # of the job's model
    job: HeldJob
    watch: Watch
    mailbox: Mailbox
    progress: Progress
    last_id: str  # id of the last event sent

    def close(self) -> None:
        self.services.jobs.unwatch(self.job, self.watch)
        self.mailbox.close()

    async def events(self, view: JobView) -> AsyncIterator[bytes]:
        """Yield events until this process stops holding the job or the server shuts down."""
        waiting, last_sent = view.state == "waiting", None
        standing = _standing(view.position, view.eta_s)
        if not waiting:  # a client that reconnects may be showing an old state
            yield _event("progress", await self.progress.after(view.step or 0))
        while True:
            if waiting and standing != last_sent:
                last_sent = standing
                yield _event("waiting", standing)
            try:
                async with asyncio.timeout(POLL_S):
                    frame = await self.mailbox.take()
            except TimeoutError:
                if self.services.worker.state.draining:
                    return
                if waiting and (status := await self.services.statuses.of(self.job.record.id)) is not None:
                    waiting = status.state == "waiting"
                    standing = _standing(status.position, status.eta_s)
                continue
            if frame is None:
                break
            waiting = False
            for event in await self._events_of(frame):
                yield event

    async def _events_of(self, frame: Frame) -> list[bytes]:
        """Return a frame's events: its pictures, or `progress` if the client requested no pictures."""
        step = str(frame.step)
        if not self.watch.show:
            self.last_id = step
            return [_event("progress", await self.progress.after(frame.step), step)]
        shown = await self.progress.shown(frame)
        if not shown:
            return []
        self.last_id = step
        self.services.metrics.count("tminus_frames_sent_total")
        media_type = f"image/{self.progress.preview.frame_format}"
        # Only the last picture of a step carries the event id. A client that loses an earlier picture gets the step
        # again.
        ids = [None] * (len(shown) - 1) + [step]
        return [
            _event(
                "frame",
                members | {"media_type": media_type, "data": base64.b64encode(picture).decode("ascii")},
                event_id,
            )
            for (members, picture), event_id in zip(shown, ids, strict=True)
        ]


def _standing(position: int | None, eta_s: float | None) -> dict[str, float | None]:
    """Return the fields of a `waiting` event. The time is rounded, so that not every poll changes the event."""
    return {"position": position, "eta_s": None if eta_s is None else round(eta_s, 1)}


def _event(name: str, members: Mapping[str, Any], event_id: str | None = None) -> bytes:
    return format_sse_event(data_str=json.dumps(members), event=name, id=event_id)
