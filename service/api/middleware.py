"""What surrounds every HTTP request: its id, its time, the answer to what nobody foresaw, the bound on its body."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import render
from service.byte_budget import MAX_HELD_BYTES
from service.errors import BodyTooLarge, ServiceError, TooManyBytes

log = logging.getLogger(__name__)

SMALL_BYTES = 64 * 1024
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class RequestContext:
    """Gives each request an id (the client's own X-Request-ID where it is sane) and times it by route and status."""

    def __init__(self, app: ASGIApp, observe: Callable[[str, int, float], None]) -> None:
        self._app, self._observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s: unhandled error", request_id)
            if status is not None:  # half a response is out: all that is left is to hang up
                raise
            answer = render(ServiceError("something went wrong on the server; its log has the details"))
            await answer(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            # Nothing sent: the client went away.
            self._observe(route, 499 if status is None else status, time.perf_counter() - started)


class BodyLimit:
    """Refuses a body over the limit, by its Content-Length at once, else as soon as it has sent too much.

    The limit is the path's own where it has one. All bodies together are held to MAX_HELD_BYTES: what a client has sent
    counts until it has its answer, or its route lets it go. A small body is taken all the same, so that nobody's images
    keep requests out.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_bytes_by_path: Mapping[str, int]) -> None:
        self._app, self._max_bytes, self._max_bytes_by_path = app, max_bytes, max_bytes_by_path
        self._held_bytes = 0
        self._max_held_bytes = max(MAX_HELD_BYTES, max_bytes, *max_bytes_by_path.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = counted = 0
        max_bytes = self._max_bytes_by_path.get(scope["path"], self._max_bytes)

        def check(size: int) -> None:
            if size > max_bytes:
                raise BodyTooLarge(size, max_bytes)

        async def bounded_receive() -> Message:
            nonlocal received, counted
            if received == 0:
                declared = Headers(scope=scope).get("content-length", "")
                check(int(declared) if declared.isdecimal() else 0)
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                received += size
                counted += size
                self._held_bytes += size
                check(received)
                if received > SMALL_BYTES and self._held_bytes > self._max_held_bytes:
                    raise TooManyBytes(self._held_bytes, self._max_held_bytes)
            return message

        def let_go() -> None:
            nonlocal counted
            self._held_bytes -= counted
            counted = 0

        scope.setdefault("state", {})["release_body"] = let_go  # for who keeps nothing of it while the answer is made
        try:
            await self._app(scope, bounded_receive, send)
        finally:
            let_go()
