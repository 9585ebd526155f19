"""What surrounds every HTTP request: its id, its time, the answer to what nobody foresaw, the bound on its body."""

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge, ServiceError
from service.problems import render

log = logging.getLogger(__name__)

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
    """Refuses a body over the limit, by its Content-Length at once, else as soon as it has sent too much."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = 0

        def check(size: int) -> None:
            if size > self._max_bytes:
                raise BodyTooLarge(size, self._max_bytes)

        async def bounded_receive() -> Message:
            nonlocal received
            if received == 0:
                declared = Headers(scope=scope).get("content-length", "")
                check(int(declared) if declared.isdecimal() else 0)
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                check(received)
            return message

        await self._app(scope, bounded_receive, send)
