"""GET /jobs/{id}/events: a durable job as server-sent events, with its frames if they are asked for.

What is sent is where the job stands, never a history: a client that comes back is told what is new to it, and never
misses the end.
"""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from tminus.service.api.answers import JobAnswer
from tminus.service.api.authentication import caller_of
from tminus.service.api.elsewhere import came_from_a_replica
from tminus.service.api.event_stream import QUIET_S, EventStream
from tminus.service.api.job_in_path import job_in_path
from tminus.service.api.models import Models
from tminus.service.api.openapi import LAST_EVENT_ID, Contract, failures
from tminus.service.api.previews import PreviewRequest
from tminus.service.api.progress import Countdown
from tminus.service.api.request import read_query
from tminus.service.api.services import Services
from tminus.service.errors import JobNotFound, StorageFailed
from tminus.service.jobs.live import Live
from tminus.service.jobs.store import OUTCOMES
from tminus.service.jobs.views import JobView, live_view
from tminus.service.preview import Frame, Show, Watch
from tminus.service.spec import SampleSpec
from tminus.service.work import timesteps_of
from tminus.service.worker.mailbox import Mailbox

log = logging.getLogger(__name__)

POLL_S = 1.0  # how often a job without frames is looked at
RECONNECT_MS = 2000
LAST = "end"  # the id of the last event of all


def event_routes(models: Models, contract: Contract) -> APIRouter:
    """Make the route."""
    router = APIRouter(prefix="/jobs", tags=["jobs"])
    query, own_id = contract.query(PreviewRequest), Depends(job_in_path(models))

    @router.get(
        "/{job_id}/events",
        summary="A durable job as server-sent events",
        response_class=Response,  # EventSourceResponse here would be for a function that yields
        responses={
            200: {"description": "The events", "content": {"text/event-stream": {}}},
            204: {"description": "The client knows the end"},
            **failures(404, 422, 429, 500, 507),
        },
        openapi_extra={"parameters": [*query, LAST_EVENT_ID]},
    )
    async def get_events(request: Request, job_id: Annotated[str, own_id]) -> Response:
        return await events(models, request, job_id)

    return router


async def events(models: Models, request: Request, job_id: str) -> Response:
    """Follow a job until it has ended."""
    services = models.default  # of which only what all models share is used
    preview = PreviewRequest.parse(read_query(request))
    shows = preview.shows if "show" in preview.model_fields_set else ()  # without it no pictures
    last_id = request.headers.get("last-event-id", "")
    sees = caller_of(request).sees
    view = await services.jobs.find_durable(job_id, sees)
    if last_id == LAST and view.state in OUTCOMES:  # an EventSource that is told so stops asking
        return Response(status_code=204)
    with ExitStack() as stack:
        stack.enter_context(services.streams.opened(request.client.host if request.client else ""))
        mailbox = Mailbox(asyncio.get_running_loop(), services.metrics.frame_dropped)
        stack.callback(mailbox.close)
        # A job that went on from a snapshot may be behind what the client has seen: steps done again are shown again.
        seen = min(int(last_id) if last_id.isdecimal() and len(last_id) < 9 else 0, view.step or 0)
        watch = Watch(preview.pace, shows, mailbox.put, seen)
        live = services.jobs.watch(job_id, watch, mailbox)
        if live is None:
            view = await services.jobs.find_durable(job_id, sees)
            return EventStream(_from_the_store(services, request, view, sees, last_id), stack.pop_all().close)
        stack.callback(services.jobs.unwatch, live, watch)
        viewer = _Viewer(models.numbered(live.model), live, preview, mailbox, view.eta_s)
        return EventStream(viewer.events(view), stack.pop_all().close)


class _Viewer:
    """One connection that follows a job."""

    def __init__(
        self, services: Services, live: Live, preview: PreviewRequest, mailbox: Mailbox, eta_s: float | None
    ) -> None:
        """eta_s: the forecast for the job that was made just now."""
        self._services, self._live, self._preview, self._mailbox = services, live, preview, mailbox
        self._countdown = Countdown(services.standings, live.record.id, eta_s)

    @cached_property
    def _timesteps(self) -> Sequence[float]:
        """Of a job that runs: one that waits may be of a table that the checkpoint has no more, and fail."""
        return timesteps_of(self._live.record.spec, self._services.model)

    async def events(self, view: JobView) -> AsyncIterator[bytes]:
        """Yield events until the job has ended, or the server is about to."""
        yield format_sse_event(retry=RECONNECT_MS)
        waiting, last_sent, quiet_s = view.state == "waiting", None, 0.0
        standing = _standing(view.position, view.eta_s)
        if not waiting:  # so that a client that comes back does not go on with an old state
            yield _event("progress", await self._progress(view.step or 0))
        while True:
            if waiting and standing != last_sent:
                last_sent, quiet_s = standing, 0.0
                yield _event("waiting", standing)
            try:
                async with asyncio.timeout(POLL_S):
                    frame = await self._mailbox.take()
            except TimeoutError:
                if self._services.worker.draining:
                    return
                if waiting and (status := await self._services.standings.of(self._live.record.id)) is not None:
                    waiting = status.state == "waiting"
                    standing = _standing(status.position, status.eta_s)
                quiet_s += POLL_S
                if quiet_s >= QUIET_S:
                    quiet_s = 0.0
                    yield KEEPALIVE_COMMENT
                continue
            if frame is None:
                break
            waiting, quiet_s = False, 0.0
            for event in await self._show(frame):
                yield event
        if self._live.record.outcome is not None:  # otherwise the next start of the server goes on with it
            (view,) = await self._services.jobs.with_deliveries([live_view(self._live, None)])
            yield _end(view)

    async def _show(self, frame: Frame) -> list[bytes]:
        """The events of a frame: its pictures, or where the job stands if none were asked for."""
        spec, preview = self._live.record.spec, self._preview
        progress = await self._progress(frame.step)
        try:
            pictures = await self._services.encoder.encode_frame(frame, preview.frame_format, preview.layout)
        except Exception:  # a lost frame does not end the stream
            log.exception("a frame of job %s could not be encoded", self._live.record.id)
            return []
        if not pictures:
            return [_event("progress", progress, str(frame.step))]
        self._services.metrics.frame_sent()
        events = []
        for count, (show, image, picture) in enumerate(pictures, 1):
            members = _picture_members(spec, show, image, picture, preview.frame_format)
            # The id comes with the last picture of a step: a client that loses an earlier one gets the step again.
            events.append(_event("frame", progress | members, str(frame.step) if count == len(pictures) else None))
        return events

    async def _progress(self, step: int) -> dict[str, Any]:
        steps = self._live.record.spec.num_passes
        return {
            "step": step,
            "steps": steps,
            "t": round(self._timesteps[min(step, steps - 1)], 3),
            "eta_s": round(await self._countdown.left_s(), 3),
        }


def _standing(position: int | None, eta_s: float | None) -> dict[str, float | None]:
    """The members of a `waiting` event; the time is rounded, so that not every second brings an event."""
    return {"position": position, "eta_s": None if eta_s is None else round(eta_s, 1)}


def _picture_members(
    spec: SampleSpec, show: Show, image: int | None, picture: bytes, frame_format: str
) -> dict[str, Any]:
    members: dict[str, Any] = {"show": show, "media_type": f"image/{frame_format}"}
    if image is not None:
        members["image"] = spec.index + image
    return members | {"data": base64.b64encode(picture).decode("ascii")}


async def _from_the_store(
    services: Services, request: Request, view: JobView, sees: str | None, last_id: str
) -> AsyncIterator[bytes]:
    """A job that another replica holds, or nobody: what its holder sends, else its state as the store has it.

    Where the holder is gone, its events go on with the next one.
    """
    jobs, job_id, told, quiet_s = services.jobs, view.record.id, "", 0.0
    while view.record.outcome is None:
        address = None if came_from_a_replica(request) else await jobs.held_at(view)
        if address is not None:
            async for events, newest_id in services.elsewhere.events(address, request, job_id, last_id):
                last_id, told, quiet_s = newest_id, "", 0.0
                yield events
                if services.worker.draining:  # the client comes back, to another replica
                    return
            if last_id == LAST:
                return
        if view.state != told:
            told = view.state
            yield _event("waiting", _standing(None, None)) if told == "waiting" else KEEPALIVE_COMMENT
        await asyncio.sleep(POLL_S)
        if services.worker.draining or jobs.is_here(job_id):  # the client comes back, and sees its frames
            return
        if (quiet_s := quiet_s + POLL_S) >= QUIET_S:
            quiet_s = 0.0
            yield KEEPALIVE_COMMENT
        try:
            view = await jobs.find_durable(job_id, sees)
        except JobNotFound:  # it was deleted: so the client is told when it comes back
            return
        except StorageFailed:
            continue
    yield _end(view)


def _end(view: JobView) -> bytes:
    return _event(view.state, JobAnswer.of(view).model_dump(), LAST)


def _event(name: str, members: Mapping[str, Any], event_id: str | None = None) -> bytes:
    return format_sse_event(data_str=json.dumps(members), event=name, id=event_id)
