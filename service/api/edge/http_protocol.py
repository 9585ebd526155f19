"""HTTP connections under uvicorn, with deadlines, limits on request heads, and a limit on connections per address.

Closing a connection does not lose its response.

A connection counts toward the limits until it ends or its WebSocket handshake is answered.

Sending has a deadline too, because asyncio's transports wait for a slow reader forever, even after they are closed.

uvicorn has no settings for most of these limits, so its protocol class is subclassed. That class is not public:
pyproject.toml restricts uvicorn's version, and a test fails if the class changes.
"""

import logging
import re
from asyncio import BaseTransport, TimerHandle, Transport
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from websockets.exceptions import SecurityError

from tminus.service.api.answers.problems import render
from tminus.service.api.edge.connections import (
    BYTES_PER_PIECE,
    FREE_PIECES,
    TURN_BYTES,
    ReadsInTurns,
    StreamProtocol,
    counted_address,
    limit_unsent,
    too_fine,
)
from tminus.service.errors import MalformedRequest, ServiceError, SlowHead, TooManyHeaders, short

log = logging.getLogger(__name__)

# Seconds to receive a request's head. The time starts when the connection opens, or with the first byte of a later
# request. After its head, a WebSocket handshake must be answered within another HEAD_S seconds.
HEAD_S = 10.0
MAX_HEAD_BYTES = 16_384  # h11's limit on an incomplete head and on a chunked body's trailers
BULK_BYTES = 65_536  # bytes to read in one turn of the event loop if they need no parsing
# Idle timeout in seconds, longer than that of most clients. If the server closed first, a client that had just sent a
# request would get an error.
KEPT_S = 75
LINGER_S, LINGER_BYTES = 5.0, 2**24  # limits on receiving the rest of a request after its response
LAST_LINGER_S = 0.5  # in seconds; used for refused connections and during shutdown
# Minimum speed of sending a response, in bytes per second, averaged over SENT_S seconds. Slower connections are
# aborted.
SENT_RATE, SENT_S = 8192, 40.0
# Limit on unsent bytes in the kernel. By default the kernel holds megabytes, so sending to a slow reader would seem to
# make no progress for minutes.
UNSENT_BYTES = 131_072
# A request target that includes scheme and host, as sent to proxies. RFC 9112 (section 3.2.2) requires servers to
# accept it too.
ABSOLUTE = re.compile(rb"https?://([^/?#@]+)(/[^?#]*)?(\?[^#]*)?", re.IGNORECASE)
TOO_FINE = f"a body has at most {FREE_PIECES} chunks, plus one for each {BYTES_PER_PIECE} bytes"
# Refused connections stay open briefly and are counted in `open_by_address` under the key TURNED_AWAY. Beyond
# MAX_TURNED_AWAY of them, a refused connection is closed at once.
TURNED_AWAY, MAX_TURNED_AWAY = "turned away", 64
# The listen backlog, which is also the number of connections that asyncio accepts in one turn of the event loop. Even a
# connection that is then refused needs a file descriptor.
ACCEPTED = 64


class _Outlet:
    """The transport to which responses are written. Aborts the connection if the client reads too slowly.

    `close` calls `HttpProtocol.close`.
    """

    _timer: TimerHandle | None = None  # set while some bytes of a response are unsent
    _written = 0  # total bytes of all responses
    _sent = 0  # bytes that had been sent when the timer started

    def __init__(self, protocol: "HttpProtocol") -> None:
        self._protocol, self._transport = protocol, protocol.transport

    def write(self, data: bytes) -> None:
        was_left = self._transport.get_write_buffer_size()
        self._transport.write(data)
        self._written += len(data)
        if not was_left:  # nothing was unsent before this write
            self._expect_sent()

    def close(self) -> None:
        self._protocol.close()

    def is_closing(self) -> bool:
        return self._protocol.lingers or self._transport.is_closing()

    def stop_waiting(self) -> None:
        """Stop the timer, so that unsent bytes no longer have a deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expect_sent(self) -> None:
        self.stop_waiting()
        if left := self._transport.get_write_buffer_size():
            self._sent = self._written - left
            self._timer = self._protocol.loop.call_later(SENT_S, self._look_at_sent)

    def _look_at_sent(self) -> None:
        left = self._transport.get_write_buffer_size()
        if left and self._written - left - self._sent < SENT_RATE * SENT_S:
            address = self._protocol.client and self._protocol.client[0]
            log.info("a client at %s reads its answer too slowly, and is disconnected", address)
            self._transport.abort()
        else:
            self._expect_sent()


class _Parser(h11.Connection):
    """h11's parser, changed to refuse bodies with too many tiny chunks and to accept absolute request targets."""

    refused_as_too_fine = False
    _chunks, _body_bytes = 0, 0  # received so far of the current body

    def next_event(self) -> Any:
        """Return the next event. Raises RemoteProtocolError if the request is invalid or has too many tiny chunks."""
        event = super().next_event()
        if isinstance(event, h11.Request) and (absolute := ABSOLUTE.fullmatch(event.target)):
            host, path, query = absolute.groups(b"")
            # The host in an absolute target overrides the Host header.
            headers = [(name, value) for name, value in event.headers if name != b"host"]
            return h11.Request(
                method=event.method, headers=[(b"host", host), *headers], target=(path or b"/") + query,
                http_version=event.http_version,
            )  # fmt: skip
        if isinstance(event, h11.Data):
            self._body_bytes += len(event.data)
            self._chunks += event.chunk_start
            self.refused_as_too_fine = too_fine(self._chunks, self._body_bytes)
            if self.refused_as_too_fine:
                raise h11.RemoteProtocolError(TOO_FINE)
        return event

    def start_next_cycle(self) -> None:
        super().start_next_cycle()
        self._chunks, self._body_bytes = 0, 0


class HttpProtocol(H11Protocol, ReadsInTurns):
    """uvicorn's HTTP connection, with the limits of this module. Use only in the event loop's thread."""

    open_by_address: ClassVar[Counter[str]]  # shared by all connections of one server; set by `http_protocol`
    max_per_address: ClassVar[int]
    max_connections: ClassVar[int]
    idle: ClassVar[dict["HttpProtocol", None]]  # connections between two requests, the longest idle first
    conn: _Parser
    _address: str | None = None  # key in open_by_address, or None while the connection is not counted
    _head_timer: TimerHandle | None = None
    _linger_timer: TimerHandle | None = None  # set while waiting for the client to close
    _outlet: _Outlet
    _to_discard = LINGER_BYTES
    _ends = False  # True once the server shuts down
    _next = b""  # data received while a response was being sent
    _has_chunks = False  # True if the current request's body is chunked

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn, self.timeout_keep_alive = _Parser(h11.SERVER, MAX_HEAD_BYTES), KEPT_S

    def connection_made(self, transport: BaseTransport) -> None:
        transport = cast(Transport, transport)  # uvloop's transports have another base class
        super().connection_made(transport)
        self._outlet = _Outlet(self)
        address = counted_address(self.client[0]) if self.client else ""
        served = len(self.connections) - self.open_by_address[TURNED_AWAY]
        if self.open_by_address[address] >= self.max_per_address:
            has_room = self._close_an_idle_one(lambda idle: idle._address == address)
        else:
            has_room = served <= self.max_connections or self._close_an_idle_one(lambda _idle: True)
        if not has_room:
            self._turn_away(b"Too many connections are open")
            return
        self._count(address)
        limit_unsent(transport, UNSENT_BYTES)
        self._expect_head()

    def _close_an_idle_one(self, fits: Callable[["HttpProtocol"], bool]) -> bool:
        """Close the longest-idle connection that fits. Return False if none fits."""
        for each in self.idle:
            if fits(each):
                each._unset_keepalive_if_required()
                each.timeout_keep_alive_handler()
                return True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self._unset_keepalive_if_required()
        self._outlet.stop_waiting()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        super().connection_lost(exc)
        if self.cycle is not None:
            self.cycle.transport = self.transport
        del self._outlet  # breaks a reference cycle, so that both objects are freed at once

    def data_received(self, data: bytes) -> None:
        """Process received data, unless the connection is closing or a response is pending.

        While a response is pending, reading continues, because only a read reveals that the client has disconnected.
        Data that arrives before the response begins is dropped. The connection then closes after the response, so the
        client repeats the dropped request on a new connection. Data that arrives after the response has begun is kept
        until the response ends, because the client may already have the whole response. A response to HEAD, for
        example, ends with its head.
        """
        while data and not self.transport.is_closing() and self.transport.get_protocol() is self:
            if self.lingers:
                self._to_discard -= len(data)
                if self._to_discard < 0:
                    self.transport.close()
                return
            if self._is_answering():
                self._wait_for_answer(data)
                return
            size = self.turn_bytes()  # uvloop may deliver more at once
            self._take(data[:size])
            data = data[size:]

    def turn_bytes(self) -> int:
        """Return the maximum number of bytes to read in the next turn of the event loop.

        h11 limits the size of an incomplete head, but accepts a head of any size that arrives in one piece. Reading at
        most one byte past that limit makes h11 refuse every longer head. A body with a Content-Length needs no parsing.
        """
        if self.conn.their_state is h11.IDLE:
            return min(TURN_BYTES, max(1, MAX_HEAD_BYTES + 1 - len(self.conn.trailing_data[0])))
        return TURN_BYTES if self._has_chunks else BULK_BYTES

    def on_response_complete(self) -> None:
        """If the request's body is still incomplete after the response, set a deadline of HEAD_S seconds for the rest.

        uvicorn's idle timeout would be longer, and the next byte would cancel it.
        """
        super().on_response_complete()
        is_read = not self.transport.get_write_buffer_size()
        if self.timeout_keep_alive_task is not None and is_read and not self.lingers:
            self.idle[self] = None
        if self._answered_early() and not self.transport.is_closing() and not self.lingers:
            self._unset_keepalive_if_required()
            self._expect_head()
        data, self._next = self._next, b""
        self.data_received(data)

    def _unset_keepalive_if_required(self) -> None:
        """Stop the idle timeout, because a request has begun or the connection is ending."""
        self.idle.pop(self, None)
        super()._unset_keepalive_if_required()

    def close(self) -> None:
        """Close the connection, but not before a client that is still sending has received the response.

        If a connection is closed with unread data, TCP resets it and may lose the response; nginx would then report a
        bad gateway. So close only the sending side at first. Then discard what arrives until the client closes too, or
        a limit is reached (RFC 9112, section 9.6).
        """
        if self.transport.is_closing() or self.lingers:
            return
        if self.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            self.transport.close()
            return
        self._linger(LAST_LINGER_S if self._ends else LINGER_S)

    @property
    def lingers(self) -> bool:
        """True if the response has been written but the client has not closed the connection yet."""
        return self._linger_timer is not None

    def shutdown(self) -> None:
        """Shut down with the server. A lingering connection closes at once, because its response is already written."""
        self._ends = True
        if self.lingers:
            self.transport.close()
        else:
            super().shutdown()

    def _turn_away(self, why: bytes) -> None:
        """Respond with 503 without reading the request."""
        head = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(why)
        self.transport.write(head + why)
        if self.open_by_address[TURNED_AWAY] >= MAX_TURNED_AWAY:
            self.transport.close()
            return
        self._count(TURNED_AWAY)
        self._linger(LAST_LINGER_S)

    def _count(self, address: str) -> None:
        self._address = address
        self.open_by_address[address] += 1

    def _linger(self, patience_s: float) -> None:
        """Close the sending side now, and the connection when the client closes or `patience_s` seconds have passed."""
        try:
            self.transport.write_eof()
        except OSError:  # the client has already closed
            self.transport.close()
            return
        self._linger_timer = self.loop.call_later(patience_s, self.transport.close)
        self.flow.resume_reading()

    def _wait_for_answer(self, data: bytes) -> None:
        if self.cycle.response_started and self.cycle.keep_alive and len(self._next) + len(data) <= MAX_HEAD_BYTES:
            self._next += data
        else:
            self._next, self.cycle.keep_alive = b"", False

    def _take(self, data: bytes) -> None:
        asked, was_early = self.cycle, self._answered_early()
        super().data_received(data)
        if self.transport.get_protocol() is not self:  # the connection is now a WebSocket
            return
        if self.cycle is not asked:
            self.cycle.transport = cast(Transport, self._outlet)
            names = {name for name, _ in self.headers}
            self._has_chunks = b"transfer-encoding" in names
            if self._has_chunks and b"content-length" in names:  # possible request smuggling (RFC 9112, section 6.1)
                self.cycle.keep_alive = False
        if self._is_answering() and self.conn.trailing_data[0]:
            self.cycle.keep_alive = False
            self.flow.resume_reading()
        if self._answered_early():
            return  # keep the timer running, so that a client cannot hold the connection by sending single bytes
        if was_early or self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        if self.conn.their_state is h11.IDLE and self._head_timer is None and not self.transport.is_closing():
            self._expect_head()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Switch to the WebSocket protocol, or refuse the request if the library rejects the handshake."""
        if self.transport.get_write_buffer_size():  # the WebSocket protocol would not count these bytes
            self._refuse(MalformedRequest("a WebSocket handshake must wait until the answer before it has been read"))
            return
        self._outlet.stop_waiting()  # later bytes belong to the WebSocket
        super().handle_websocket_upgrade(event)
        stream = cast(StreamProtocol, self.transport.get_protocol())
        if stream.handshake_initiated:
            stream.handshake_answered = self._leave
            del self._outlet  # the outlet would keep this protocol in memory
            # Stop reading until the handshake is answered. uvicorn cannot refuse frames that arrive earlier, and
            # clients send none.
            self.transport.pause_reading()
            self._stop_waiting()
            self._expect_head()
            return
        why = stream.conn.handshake_exc or ConnectionAbortedError()
        stream.connection_lost(why)
        self.transport.set_protocol(self)
        self.connections.add(self)
        kind = TooManyHeaders if isinstance(why, SecurityError) else MalformedRequest
        reason = short(str(why.__cause__ or why))
        self._refuse(kind(f"the WebSocket handshake cannot be read: {reason!a}"))

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Refuse a request that is not valid HTTP, unless a response has begun. uvicorn has logged the error."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # the rest of the current request will never arrive
            self.cycle.message_event.set()
        not_http = "the request is not HTTP/1.1 as this server reads it, or its head is over 16 KiB"
        self._refuse(MalformedRequest(TOO_FINE if self.conn.refused_as_too_fine else not_http))

    def _is_answering(self) -> bool:
        """Return True if the request is complete but its response is not."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _answered_early(self) -> bool:
        """Return True if the response is complete but the request is not."""
        return self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.get_protocol() is not self:
            self.transport.abort()  # the WebSocket handshake was not answered in time
        elif self.conn.trailing_data[0]:
            self._refuse(SlowHead(HEAD_S))
        else:
            self.close()  # the client has sent nothing, or already has its response

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _leave(self) -> None:
        self._stop_waiting()
        if self._address is not None:
            self.open_by_address[self._address] -= 1
            if not self.open_by_address[self._address]:
                del self.open_by_address[self._address]
            self._address = None

    def _refuse(self, error: ServiceError) -> None:
        """Respond with a problem document, unless a response has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = render(error)
            headers = [*answer.raw_headers, (b"connection", b"close")]
            body = h11.Data(data=bytes(answer.body))
            for event in (h11.Response(status_code=error.status, headers=headers), body, h11.EndOfMessage()):
                self._outlet.write(self.conn.send(event) or b"")
        self.close()


def http_protocol(max_connections: int, max_per_address: int) -> type[HttpProtocol]:
    """Return a protocol class for one server."""
    bounds = {"max_connections": max_connections, "max_per_address": max_per_address}
    return type("BoundedHttpProtocol", (HttpProtocol,), {"open_by_address": Counter(), "idle": {}, **bounds})
