"""Middleware around every request: ids, tracing, timing, responses to unexpected errors, and memory limits."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import quote, unquote_plus

from opentelemetry.trace import SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tminus.service.access.access import Caller
from tminus.service.api.answers.operations import API_VERSION
from tminus.service.api.answers.problems import error_form, render
from tminus.service.api.edge.origin import OF_A_MODEL, PROBES
from tminus.service.byte_budget import MAX_HELD_BYTES, SMALL_BYTES, ByteBudget, Hold
from tminus.service.errors import BodyTooLarge, Draining, ServiceError, SlowBody, TooManyBytes, masked
from tminus.service.tracing import REQUEST_ID, TRACER, fail, why

log = logging.getLogger(__name__)

LEAST_RATE = 8192  # minimum speed of receiving a body, in bytes per second
WINDOW_S = 10.0
WELL_FORMED = re.compile(r"[A-Za-z0-9._:-]{1,64}")
WEBHOOK = "webhook"
TARGET_CHARACTERS = 200  # maximum length of a path and query in the log
READ_CHARACTERS = 2000  # longer targets are cut before decoding, because 16 KiB would take 2 ms
# Long responses are sent in pieces of this size. uvicorn buffers at most two pieces.
PIECE_BYTES = 64 * 1024
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"})
SWITCHED = 101  # HTTP status of an accepted WebSocket
GONE = "client_gone"  # error in a trace if the client disconnected before the response


def new_request_id(scope: Scope) -> str:
    """Set REQUEST_ID to the client's X-Request-ID, or to a new id if there is none, and return it.

    An X-Request-ID that is malformed or contains an API key is ignored.
    """
    asked = Headers(scope=scope).get("x-request-id", "")
    request_id = asked if WELL_FORMED.fullmatch(asked) and masked(asked) == asked else uuid.uuid4().hex
    REQUEST_ID.set(request_id)
    return request_id


def sender_of(scope: Scope) -> str:
    """Return the client's address for the log, followed by the name of the client's API key, if any."""
    address, key = _address(scope) or "-", _key(scope)
    return address if key is None else f"{address} ({key})"


def _address(scope: Scope) -> str | None:
    return str(scope["client"][0]) if scope.get("client") else None


def _key(scope: Scope) -> str | None:
    caller: Caller | None = scope.get("state", {}).get("caller")
    return caller.name or None if caller is not None else None


def target_of(scope: Scope, *, with_query: bool = True) -> str:
    """Return a request's path and query for logs and traces: printable ASCII, cut to TARGET_CHARACTERS.

    API keys and webhook URLs are masked. They should not be in a query, but clients may put them there.
    """
    target: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    if with_query and scope.get("query_string"):
        target += b"?" + scope["query_string"]
    text = masked(_without_webhook(target[:READ_CHARACTERS].decode("ascii", "backslashreplace")))
    return text if len(text) <= TARGET_CHARACTERS else f"{text[:TARGET_CHARACTERS]}…"


def _without_webhook(target: str) -> str:
    """Cut the query at the first `webhook` parameter: what follows may be part of an unencoded webhook URL."""
    path, _, query = target.partition("?")
    shown: list[str] = []
    for each in query.split("&"):
        if unquote_plus(each.partition("=")[0]).strip() == WEBHOOK:
            return f"{path}?{'&'.join([*shown, f'{WEBHOOK}=…'])}"
        shown.append(each)
    return target


def route_of(scope: Scope) -> str:
    """Return the path pattern of the request's route, with the prefix /models/{model} if the path has one."""
    route = str(getattr(scope.get("route"), "path", "unmatched"))
    below = "model" in scope.get("path_params", {}) and "{model}" not in route
    return f"/models/{{model}}{route}" if below else route


def pieces_of(message: Message) -> Iterator[Message]:
    """Split a long response message into messages with at most PIECE_BYTES of body each.

    uvicorn buffers a copy of each message. Without the split, every slow reader of one cached response would cost a
    whole copy. The last message is empty: uvicorn accepts it only once at most 64 KiB are still unsent.
    """
    body = message["body"]
    for at in range(0, len(body), PIECE_BYTES):
        yield {**message, "body": body[at : at + PIECE_BYTES], "more_body": True}
    yield {**message, "body": b""}


class RequestContext:
    """Gives each request an id, times requests by route and status, and sends long responses in pieces.

    The id is the client's X-Request-ID, if that is well-formed. While the server drains, each response also closes its
    connection, because the server may have ended by the client's next request. A request that has no response by the
    end of the server's shutdown timeout is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        observe: Callable[[str, int, float], None],
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app, self._observe, self._draining = app, observe, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status: int | None = None
        ended: float | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                if error_form(scope["method"], scope["path"]) is None:
                    headers["API-Version"] = API_VERSION
                # Without this header, a browser might show a client's text or pixels as a page.
                headers["X-Content-Type-Options"] = "nosniff"
                if self._draining():
                    headers["Connection"] = "close"
            elif not message.get("more_body", False):
                ended = time.perf_counter()  # leave out the time that the client takes to read
            if len(message.get("body", b"")) <= PIECE_BYTES:
                await send(message)
                return
            for piece in pieces_of(message):
                await send(piece)
                await asyncio.sleep(0)  # let other connections run, and notice if this one has ended

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # raised when uvicorn's shutdown timeout ends
            if status is not None:
                raise
            await render(Draining(), scope)(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s: unhandled error", request_id)
            if status is not None:  # the response has begun, so the connection can only be closed
                raise
            answer = render(ServiceError(), scope)
            await answer(scope, receive, send_with_id)
        finally:
            route = route_of(scope)
            status = 499 if status is None else status  # 499: the client disconnected before the response
            seconds = (time.perf_counter() if ended is None else ended) - started
            self._observe(route, status, seconds)
            client, key, target = _address(scope), _key(scope), target_of(scope)
            fields = {"client": client, "key": key, "method": scope["method"], "target": target, "status": status}
            log.log(
                logging.DEBUG if route in PROBES else logging.INFO,
                "request %s of %s: %s %s %d in %.3f s",
                request_id, sender_of(scope), scope["method"], target, status, seconds,
                extra=fields | {"seconds": round(seconds, 4)},
            )  # fmt: skip


def body_of(scope: Scope) -> Hold:
    """Return the hold that counts the bytes of a request's body. Release it once a job has been made from the body."""
    held: Hold = scope["state"]["body"]
    return held


class MemoryLimit:
    """Limits the memory for received bodies and for responses that are being sent.

    Bodies: all of them together may take MAX_HELD_BYTES, or three times the largest allowed body if that is more. Those
    of one caller may take only a share of what other callers leave free. A body counts until a job has been made from
    it, because the job keeps no part of the body (see `body_of`). A body that makes no job counts until its response
    begins.

    Responses: all of them share one budget. The body of a response, an event and a WebSocket message each count while
    they are being sent. A cached body counts once, even if several clients are reading it. Each WebSocket message is a
    copy and counts separately. Over the limit, a response with a Content-Length is refused before it begins; for any
    other response, sending a message raises TooManyBytes.

    A body or message of at most SMALL_BYTES is always accepted, so large uploads cannot block small requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        max_bytes_by_path: Mapping[str, int],
        answers: ByteBudget,
        refused: Callable[[str], None],
    ) -> None:
        """max_bytes_by_path: limits for paths, with or without /models/NAME. refused: called with an error's code."""
        self._app, self._max_bytes, self._max_bytes_by_path = app, max_bytes, max_bytes_by_path
        largest_bytes = max(max_bytes, *max_bytes_by_path.values(), 0)
        # 3 * largest_bytes, so that one caller's share fits the largest body and copies of its parts: 2 <= SHARE * 3.
        self._bodies, self._answers = ByteBudget(max(MAX_HELD_BYTES, 3 * largest_bytes)), answers
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._bodies.hold(SMALL_BYTES) as body, self._answers.hold(SMALL_BYTES) as answer:
            if scope["type"] == "http":
                scope.setdefault("state", {})["body"] = body
                receive = _Body(scope, receive, self._limit_of(scope), body).receive
            await self._app(scope, receive, self._counted(scope, receive, send, body, answer))

    def _limit_of(self, scope: Scope) -> int:
        return self._max_bytes_by_path.get(OF_A_MODEL.sub("", scope["path"]), self._max_bytes)

    def _counted(self, scope: Scope, receive: Receive, send: Send, body: Hold, answer: Hold) -> Send:
        """Return a `send` that counts the response while it is being sent, or sends a refusal instead.

        It also releases the request's body when the response begins.
        """
        waiting: list[Message] = []  # start of a response that may still be refused
        is_refused = False

        async def counted(message: Message) -> None:
            nonlocal is_refused
            if is_refused:
                return
            try:
                if content := message.get("body"):
                    answer.add_shared(content)
                elif of_socket := message.get("bytes") or message.get("text"):
                    answer.add(len(of_socket))
            except TooManyBytes as error:
                answer.release()
                if not waiting:
                    raise
                is_refused = True
                self._refused(error.code)
                await render(error, scope)(scope, receive, send)
                return
            begins = message["type"] == "http.response.start"
            if begins:
                body.release()
            declared = Headers(raw=message["headers"]).get("content-length", "0") if begins else "0"
            if int(declared) > SMALL_BYTES or (waiting and answer.is_small and message.get("more_body", False)):
                waiting.append(message)
                return
            messages = [*waiting, message]
            waiting.clear()
            for each in messages:
                await send(each)
            answer.release()

        return counted


class _Body:
    """Receives the body of one request within its limits.

    Raises BodyTooLarge at once if the Content-Length is too large, or otherwise when too much has arrived. Raises
    SlowBody if fewer than LEAST_RATE bytes per second arrive for WINDOW_S seconds.
    """

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, held: Hold) -> None:
        self._scope, self._receive, self._max_bytes, self._held = scope, receive, max_bytes, held
        self._loop = asyncio.get_running_loop()
        self._received = 0
        self._is_complete = False
        self._until_s = self._loop.time() + WINDOW_S  # end of the current window, on the event loop's clock
        self._missing = LEAST_RATE * WINDOW_S  # bytes that must arrive before the window ends

    async def receive(self) -> Message:
        """Return the next message. Raises BodyTooLarge, SlowBody or TooManyBytes."""
        if self._is_complete:
            return await self._receive()
        if not self._received:
            declared = Headers(scope=self._scope).get("content-length", "")
            self._check(int(declared) if declared.isdecimal() else 0)
        try:
            async with asyncio.timeout_at(self._until_s):
                message = await self._receive()
        except TimeoutError:
            raise SlowBody(LEAST_RATE, WINDOW_S) from None
        size_bytes = len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        self._received += size_bytes
        self._missing -= size_bytes
        if self._missing <= 0:
            self._until_s, self._missing = self._loop.time() + WINDOW_S, LEAST_RATE * WINDOW_S
        if size_bytes:
            self._check(self._received)
            self._held.add(size_bytes)
        return message

    def _check(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise BodyTooLarge(size_bytes, self._max_bytes)


class RequestSpans:
    """Records a trace span for every request and WebSocket, except for the frequent probes.

    The middlewares of OpenTelemetry and FastAPI would record the query, which may contain a secret, and would not know
    our route names and request ids.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app, self._tracer, self._client_trace = app, tracer, TraceContextTextMapPropagator()

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
            with self._tracer.start_as_current_span(
                "HTTP",
                self._client_trace.extract(Headers(scope=scope)),
                SpanKind.SERVER,
                record_exception=False,  # the text of an exception may quote the request
                set_status_on_exception=False,
            ) as span:
                try:
                    await self._app(scope, receive, send_and_look)
                except Exception as error:  # raised after the response had begun
                    fail(span, why(error)[0], by_server=True)
                    raise
                finally:
                    method, route = scope.get("method", "GET"), route_of(scope)  # WebSocket handshakes are GET requests
                    known = method if method in METHODS else "_OTHER"
                    span.update_name(f"{known if known == method else 'HTTP'} {route}")
                    attributes = {
                        "http.request.method": known,
                        "http.route": route,
                        "url.scheme": scope.get("scheme", "http"),
                        "url.path": target_of(scope, with_query=False),
                        "tminus.request.id": REQUEST_ID.get(),
                        "tminus.key": _key(scope),
                    }
                    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
                    if status is not None:
                        span.set_attribute("http.response.status_code", status)
                    if status is None or status >= 500:
                        fail(span, GONE if status is None else str(status), by_server=status is not None)
        finally:
            TRACER.reset(token)
