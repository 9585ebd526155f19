"""The span of each request and of each WebSocket, and the tracer for whatever works on it.

OpenTelemetry has such a middleware of its own, and so has FastAPI. Both keep the query, in which a secret may be, and
know neither our names of routes nor the id of a request.
"""

from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tminus.service.access.access import Caller
from tminus.service.api.edge.middleware import path_of, route_of
from tminus.service.api.edge.origin import PROBES
from tminus.service.request_id import REQUEST_ID
from tminus.service.tracing import TRACER, Tracer, why

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"})
SWITCHED = 101  # the status of a WebSocket that was accepted
GONE = "client_gone"  # before it was answered


class RequestSpans:
    """Puts a span around each request but the probes', which come every few seconds."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app, self._tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
            elif message["type"] == "websocket.accept":
                status = SWITCHED
            await send(message)

        token = TRACER.set(self._tracer)
        try:
            with self._tracer.request(Headers(scope=scope)) as span:
                try:
                    await self._app(scope, receive, send_and_look)
                except Exception as error:  # when part of the answer was sent
                    span.fail(why(error)[0], by_server=True)
                    raise
                finally:
                    method = scope.get("method", "GET")  # of a WebSocket's handshake
                    known = method if method in METHODS else "_OTHER"
                    span.rename(f"{known if known == method else 'HTTP'} {route_of(scope)}")
                    span.set({"http.request.method": known, **_attributes(scope)})
                    if status is not None:
                        span.set({"http.response.status_code": status})
                    if status is None or status >= 500:
                        span.fail(GONE if status is None else str(status), by_server=status is not None)
        finally:
            TRACER.reset(token)


def _attributes(scope: Scope) -> dict[str, Any]:
    caller: Caller | None = scope.get("state", {}).get("caller")
    return {
        "http.route": route_of(scope),
        "url.scheme": scope.get("scheme", "http"),
        "url.path": path_of(scope),
        "tminus.request.id": REQUEST_ID.get(),
        **({"tminus.key": caller.name} if caller is not None and caller.name else {}),
    }
