"""Middleware around every request: id, span, duration, the answer to an unexpected error, bounds on bytes in memory."""

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

LEAST_RATE = 8192  # bytes of a body a second
WINDOW_S = 10.0
WELL_FORMED = re.compile(r"[A-Za-z0-9._:-]{1,64}")
WEBHOOK = "webhook"  # the name of the parameter
TARGET_CHARACTERS = 200  # of a path and query in the log
READ_CHARACTERS = 2000  # characters of them that are read: decoding a target of 16 KiB takes 2 ms
# Pieces of a long answer: uvicorn holds two at most before it waits.
PIECE_BYTES = 64 * 1024
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"})
SWITCHED = 101  # the status of a WebSocket that was accepted
GONE = "client_gone"  # the client disconnected before the answer


def new_request_id(scope: Scope) -> str:
    """Set REQUEST_ID to a well-formed X-Request-ID of the client that has no key in it, or to a new id. Returns it."""
    asked = Headers(scope=scope).get("x-request-id", "")
    request_id = asked if WELL_FORMED.fullmatch(asked) and masked(asked) == asked else uuid.uuid4().hex
    REQUEST_ID.set(request_id)
    return request_id


def sender_of(scope: Scope) -> str:
    """Return the client's address, and the name of its key where it has one, for the log."""
    address, key = _address(scope) or "-", _key(scope)
    return address if key is None else f"{address} ({key})"


def _address(scope: Scope) -> str | None:
    return str(scope["client"][0]) if scope.get("client") else None


def _key(scope: Scope) -> str | None:
    caller: Caller | None = scope.get("state", {}).get("caller")
    return caller.name or None if caller is not None else None


def target_of(scope: Scope, *, with_query: bool = True) -> str:
    """Return the path and query in printable ASCII, cut to TARGET_CHARACTERS, for logs and traces.

    API keys and webhook URLs are masked: they should not be in a query, but clients may put them there.
    """
    target: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    if with_query and scope.get("query_string"):
        target += b"?" + scope["query_string"]
    text = masked(_without_webhook(target[:READ_CHARACTERS].decode("ascii", "backslashreplace")))
    return text if len(text) <= TARGET_CHARACTERS else f"{text[:TARGET_CHARACTERS]}…"


def _without_webhook(target: str) -> str:
    """Cut the query at a webhook parameter: an & in a URL that is not encoded belongs to the URL."""
    path, _, query = target.partition("?")
    shown: list[str] = []
    for each in query.split("&"):
        if unquote_plus(each.partition("=")[0]).strip() == WEBHOOK:
            return f"{path}?{'&'.join([*shown, f'{WEBHOOK}=…'])}"
        shown.append(each)
    return target


def route_of(scope: Scope) -> str:
    """Return the pattern of the path, with the prefix /models/{model} if the request has it."""
    route = str(getattr(scope.get("route"), "path", "unmatched"))
    below = "model" in scope.get("path_params", {}) and "{model}" not in route
    return f"/models/{{model}}{route}" if below else route


def pieces_of(message: Message) -> Iterator[Message]:
    """Yield the messages to send in place of a long one, each with at most PIECE_BYTES of its body.

    uvicorn takes all bytes of a message at once, and copies them for its client. Many slow readers of one cached
    answer would then take many times its memory. The last message is empty, because uvicorn takes it when at most 64
    KiB of the others are left.
    """
    body = message["body"]
    for at in range(0, len(body), PIECE_BYTES):
        yield {**message, "body": body[at : at + PIECE_BYTES], "more_body": True}
    yield {**message, "body": b""}


class RequestContext:
    """Gives each request an id (the client's X-Request-ID if that is well-formed) and times it by route and status.

    A long answer is sent in pieces.

    While the server drains, each answer closes its connection. Otherwise the client's next request could meet the
    server's end. A request that is not answered when the server ends is refused.
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
                # Browsers then do not take a client's text or pixels for a page.
                headers["X-Content-Type-Options"] = "nosniff"
                if self._draining():
                    headers["Connection"] = "close"
            elif not message.get("more_body", False):
                ended = time.perf_counter()  # the time that the client takes to read is not counted
            if len(message.get("body", b"")) <= PIECE_BYTES:
                await send(message)
                return
            for piece in pieces_of(message):
                await send(piece)
                await asyncio.sleep(0)  # gives other connections a turn, and finds out if this one is lost

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # uvicorn cancels requests when it stops waiting
            if status is not None:
                raise
            await render(Draining(), scope)(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s: unhandled error", request_id)
            if status is not None:  # part of the response is sent: the connection can only be closed
                raise
            answer = render(ServiceError(), scope)
            await answer(scope, receive, send_with_id)
        finally:
            route = route_of(scope)
            status = 499 if status is None else status  # nothing sent: the client disconnected
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
    """Return the hold on a request's body. Release it once a job has been made from the body."""
    held: Hold = scope["state"]["body"]
    return held


class MemoryLimit:
    """Bounds the bytes of clients in memory: received bodies, and answers that are being sent.

    All bodies together may take MAX_HELD_BYTES, and one caller's bodies its share. A body counts until a job is made
    from it, which keeps nothing of it (see `body_of`), or else until its answer begins, when its route has returned.

    All answers share one budget. A message counts while it is being sent: the body of an answer, an event, a message
    of a WebSocket. A cached body that several clients get counts once; a WebSocket copies each message. An answer with
    a Content-Length is refused before it begins. For any other, sending the message raises TooManyBytes.

    A body or message of at most SMALL_BYTES is always accepted, so that uploads cannot keep plain requests out.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        max_bytes_by_path: Mapping[str, int],
        answers: ByteBudget,
        refused: Callable[[str], None],
    ) -> None:
        """max_bytes_by_path: bounds of some paths, also below /models/NAME. refused: called with each
        refusal's code.
        """
        self._app, self._max_bytes, self._max_bytes_by_path = app, max_bytes, max_bytes_by_path
        largest_bytes = max(max_bytes, *max_bytes_by_path.values(), 0)
        # A caller's share has room for the largest body and the copies of its parts: 2 <= SHARE * 3.
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
        """Count an answer while it is sent, or send a refusal instead. The body of the request is released first."""
        waiting: list[Message] = []  # the beginning of an answer that may still be refused
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
    """The body of one request, as it arrives.

    A body over its limit is refused: at once by its Content-Length, or when too much has arrived. A body that brings
    less than LEAST_RATE in a window of WINDOW_S raises SlowBody. A complete body has no deadline.
    """

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, held: Hold) -> None:
        self._scope, self._receive, self._max_bytes, self._held = scope, receive, max_bytes, held
        self._loop = asyncio.get_running_loop()
        self._received = 0
        self._is_complete = False
        self._until_s = self._loop.time() + WINDOW_S  # the end of this window
        self._missing = LEAST_RATE * WINDOW_S  # bytes that must still arrive in this window

    async def receive(self) -> Message:
        """Return the next message. Raises BodyTooLarge, SlowBody and TooManyBytes."""
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
    """Puts a span around each request and WebSocket, except the probes, which come every few seconds.

    OpenTelemetry and FastAPI have such middleware. Both keep the query, which may contain a secret, and know neither
    our names of routes nor the id of a request.
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
                record_exception=False,  # an exception's text may quote a request
                set_status_on_exception=False,
            ) as span:
                try:
                    await self._app(scope, receive, send_and_look)
                except Exception as error:  # part of the answer was sent
                    fail(span, why(error)[0], by_server=True)
                    raise
                finally:
                    method, route = scope.get("method", "GET"), route_of(scope)  # a WebSocket's handshake is a GET
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
