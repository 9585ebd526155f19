"""How uvicorn treats a connection: bounded heads, deadlines, a share for each address, an end that loses no answer.

A connection is counted and timed until it ends, or until its WebSocket handshake is answered.

What leaves has a deadline too: asyncio's transports wait for their readers without limit, also after they are closed.

uvicorn has no setting for most of this, and the class that is extended here is not part of its public interface. So
pyproject.toml bounds its version, and a test names what is missing if the class changes.
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

# From the connection, or the first byte of a further request, to the end of the head; and from there to the answer to a
# WebSocket handshake.
HEAD_S = 10.0
MAX_HEAD_BYTES = 16_384  # what h11 takes of a head that is not complete, and of a chunked body's trailers
BULK_BYTES = 65_536  # a turn of what is not parsed
# For the next request. Longer than most clients keep one: a connection that is closed as a request comes is an error.
KEPT_S = 75
LINGER_S, LINGER_BYTES = 5.0, 2**24  # for how long, and how much of, a request is taken after its answer
LAST_LINGER_S = 0.5  # once the server ends
SENT_RATE, SENT_S = 8192, 40.0  # what leaves of an answer, in bytes a second over so long, or it is given up
UNSENT_BYTES = 131_072  # in the kernel, which would hold megabytes, and take no more for minutes of a slow reader
# A target with scheme and host, as proxies are sent one, which a server must take too (RFC 9112, section 3.2.2).
ABSOLUTE = re.compile(rb"https?://([^/?#@]+)(/[^?#]*)?(\?[^#]*)?", re.IGNORECASE)
TOO_FINE = f"a body has at most {FREE_PIECES} chunks, plus one for each {BYTES_PER_PIECE} bytes"
# Refused connections that linger are counted under this name. Beyond this number they are closed at once.
TURNED_AWAY, MAX_TURNED_AWAY = "turned away", 64
ACCEPTED = 64  # connections in one turn of the event loop: each has a file before it can be turned away


class _Outlet:
    """What requests are answered on: the connection, which must take what is written in time.

    It closes by `HttpProtocol.close`.
    """

    _timer: TimerHandle | None = None  # while bytes of an answer are left
    _written = 0  # bytes of answers, in all
    _sent = 0  # how many of these had left when the timer began

    def __init__(self, protocol: "HttpProtocol") -> None:
        self._protocol, self._transport = protocol, protocol.transport

    def write(self, data: bytes) -> None:
        """Write a part of an answer, and see that it leaves."""
        was_left = self._transport.get_write_buffer_size()
        self._transport.write(data)
        self._written += len(data)
        if not was_left:  # all before this had left
            self._expect_sent()

    def close(self) -> None:
        self._protocol.close()

    def is_closing(self) -> bool:
        return self._protocol.lingers or self._transport.is_closing()

    def stop_waiting(self) -> None:
        """Let what is left leave whenever it does."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expect_sent(self) -> None:
        """Begin the next window, if bytes are left to send."""
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
    """h11's parser, which refuses a body of very many chunks with little in them, and takes absolute targets."""

    refused_as_too_fine = False  # the body of this request
    _chunks, _body_bytes = 0, 0  # of this body, so far

    def next_event(self) -> Any:
        """Return the next event. Raises RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Request) and (absolute := ABSOLUTE.fullmatch(event.target)):
            host, path, query = absolute.groups(b"")
            headers = [(name, value) for name, value in event.headers if name != b"host"]  # what it says does not count
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
        """Begin with the next request."""
        super().start_next_cycle()
        self._chunks, self._body_bytes = 0, 0


class HttpProtocol(H11Protocol, ReadsInTurns):
    """uvicorn's HTTP connection, with these bounds. Runs in the event loop's thread."""

    open_by_address: ClassVar[Counter[str]]  # shared by all connections of one server; set by `http_protocol`
    max_per_address: ClassVar[int]
    max_connections: ClassVar[int]
    idle: ClassVar[dict["HttpProtocol", None]]  # connections that wait for a next request, the longest idle first
    conn: _Parser
    _address: str | None = None  # while it is counted
    _head_timer: TimerHandle | None = None
    _linger_timer: TimerHandle | None = None  # while the connection closes as soon as its client has
    _outlet: _Outlet
    _to_discard = LINGER_BYTES
    _ends = False  # whether it ends with the server
    _next = b""  # came while an answer was being sent
    _has_chunks = False  # the body of this request

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn, self.timeout_keep_alive = _Parser(h11.SERVER, MAX_HEAD_BYTES), KEPT_S

    def connection_made(self, transport: BaseTransport) -> None:
        """Count the connection, or turn it away; wait for a head."""
        transport = cast(Transport, transport)  # that of uvloop, in which Ray runs us, has no such base
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
        """Close the matching connection that has been idle for longest; False if none matches."""
        for each in self.idle:
            if fits(each):
                each._unset_keepalive_if_required()
                each.timeout_keep_alive_handler()
                return True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no longer."""
        self._leave()
        self._unset_keepalive_if_required()
        self._outlet.stop_waiting()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        super().connection_lost(exc)
        if self.cycle is not None:
            self.cycle.transport = self.transport
        del self._outlet  # it knows this protocol, which would not be freed at once

    def data_received(self, data: bytes) -> None:
        """Take data, unless the connection is closing or has a request that is not answered yet.

        To read on is the only way to notice that the client goes away. So a further request that comes before the
        answer is dropped, and the connection closes after the answer, which tells the client to ask again. Once the
        answer has begun, the client may have all of it before we know that it is complete: after its head, where HEAD
        was asked for. So a further request waits then.
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
            size = self.turn_bytes()  # uvloop gives more at a time
            self._take(data[:size])
            data = data[size:]

    def turn_bytes(self) -> int:
        """Return how much to take in the next turn.

        h11 bounds a head that is not complete, and would take one of any size that comes in one piece. So it is given
        no more of a head than the bound. A body of a declared length is not parsed.
        """
        if self.conn.their_state is h11.IDLE:
            return min(TURN_BYTES, max(1, MAX_HEAD_BYTES + 1 - len(self.conn.trailing_data[0])))
        return TURN_BYTES if self._has_chunks else BULK_BYTES

    def on_response_complete(self) -> None:
        """Give a client that has its answer before it has sent its body as long for the rest as for a head.

        The time of an idle connection is longer, and over with the next byte.
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
        """Keep the connection for a next request no more: one has come, or it ends."""
        self.idle.pop(self, None)
        super()._unset_keepalive_if_required()

    def close(self) -> None:
        """Close the connection; if its client is still sending, once it has got the answer.

        TCP resets a connection that closes with data unread, and then the answer may be lost: nginx would tell of a bad
        gateway in its place. So only the sending side closes here, and what comes is discarded until the client closes
        too, within bounds (RFC 9112, section 9.6).
        """
        if self.transport.is_closing() or self.lingers:
            return
        if self.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            self.transport.close()
            return
        self._linger(LAST_LINGER_S if self._ends else LINGER_S)

    @property
    def lingers(self) -> bool:
        """Whether it has its answer, and its client is still to close."""
        return self._linger_timer is not None

    def shutdown(self) -> None:
        """End with the server, as uvicorn asks for; who lingers has its answer."""
        self._ends = True
        if self.lingers:
            self.transport.close()
        else:
            super().shutdown()

    def _turn_away(self, why: bytes) -> None:
        """Answer 503 before anything is read: a connection that is not counted may not stay."""
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
        """Send no more, and close when the client has closed, or after this time."""
        try:
            self.transport.write_eof()
        except OSError:  # the client has closed already
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
        if self.transport.get_protocol() is not self:  # it is a WebSocket's now
            return
        if self.cycle is not asked:
            self.cycle.transport = cast(Transport, self._outlet)
            names = {name for name, _ in self.headers}
            self._has_chunks = b"transfer-encoding" in names
            if self._has_chunks and b"content-length" in names:  # RFC 9112, section 6.1: somebody may be smuggling
                self.cycle.keep_alive = False
        if self._is_answering() and self.conn.trailing_data[0]:
            self.cycle.keep_alive = False
            self.flow.resume_reading()
        if self._answered_early():
            return  # its time runs on, or byte after byte of a body that nobody reads would hold the connection
        if was_early or self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        if self.conn.their_state is h11.IDLE and self._head_timer is None and not self.transport.is_closing():
            self._expect_head()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over; where the library does not understand the handshake, take it back and refuse it."""
        if self.transport.get_write_buffer_size():  # who is to write from now on knows nothing of what is left
            self._refuse(MalformedRequest("a WebSocket handshake must wait until the answer before it has been read"))
            return
        self._outlet.stop_waiting()  # what is not sent from now on is the WebSocket's
        super().handle_websocket_upgrade(event)
        stream = cast(StreamProtocol, self.transport.get_protocol())
        if stream.handshake_initiated:
            stream.handshake_answered = self._leave
            del self._outlet  # it would keep this protocol from being freed
            self.transport.pause_reading()  # a client waits for the answer: uvicorn cannot refuse a frame before it
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
        """Answer what is not HTTP, if it still can be answered; uvicorn has logged it."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # what it is answering has no end
            self.cycle.message_event.set()
        not_http = "the request is not HTTP/1.1 as this server reads it, or its head is over 16 KiB"
        self._refuse(MalformedRequest(TOO_FINE if self.conn.refused_as_too_fine else not_http))

    def _is_answering(self) -> bool:
        """Whether a request is complete and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _answered_early(self) -> bool:
        """Whether the answer is complete and the request is not."""
        return self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.get_protocol() is not self:
            self.transport.abort()  # nobody has answered the handshake
        elif self.conn.trailing_data[0]:
            self._refuse(SlowHead(HEAD_S))
        else:
            self.close()  # it has said nothing, or has its answer: there is nothing to answer

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
        """Answer with a problem, if nothing of an answer has been sent, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = render(error)
            headers = [*answer.raw_headers, (b"connection", b"close")]
            body = h11.Data(data=bytes(answer.body))
            for event in (h11.Response(status_code=error.status, headers=headers), body, h11.EndOfMessage()):
                self._outlet.write(self.conn.send(event) or b"")
        self.close()


def http_protocol(max_connections: int, max_per_address: int) -> type[HttpProtocol]:
    """Make the protocol class of one server."""
    bounds = {"max_connections": max_connections, "max_per_address": max_per_address}
    return type("BoundedHttpProtocol", (HttpProtocol,), {"open_by_address": Counter(), "idle": {}, **bounds})
