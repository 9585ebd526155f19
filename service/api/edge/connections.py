"""How uvicorn treats a WebSocket, and what its connections of both kinds share. Used in the event loop's thread.

A WebSocket has short send buffers, bounds on what it receives, and an end that does not wait for ever. uvicorn has no
setting for these, and its class is not public: pyproject.toml bounds its version, and a test names what has changed.
"""

import asyncio
import socket
import sys
from asyncio import BaseTransport, BufferedProtocol, Protocol
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address, ip_network
from typing import Any, ClassVar, cast

from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware, _TrustedHosts
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame
from websockets.protocol import State

from tminus.service.byte_budget import MAX_HELD_BYTES, SMALL_BYTES, ByteBudget, Hold
from tminus.service.errors import TooManyBytes, TooManyStreams

TCP_NOTSENT_LOWAT = 25  # linux/tcp.h; the socket module has no name for it
TURN_BYTES = 2048  # some 300 of the smallest chunks or frames, which take a millisecond
# The pieces that a body or a message may have, and the bytes for which it may have one more.
FREE_PIECES, BYTES_PER_PIECE = 1024, 64
# In asyncio's buffer and in the kernel's, each. By default they hold megabytes: frames that are old when they are read.
UNSENT_BYTES = 16_384
LINGER_S = 10.0  # after the close, for the client to read the rest and to answer it
LAST_LINGER_S = 1.0  # after a close for what the client did; what it still sends is discarded
CONTROL_FRAMES = 64  # a second: pings and pongs


def too_fine(pieces: int, size_bytes: int) -> bool:
    """Whether bytes came in more pieces than any client needs. Parsing a small piece takes as long as a large one."""
    return pieces > FREE_PIECES + size_bytes // BYTES_PER_PIECE


def limit_unsent(transport: BaseTransport, size_bytes: int) -> None:
    """Have the kernel take no more than this of what is not sent; it would hold megabytes."""
    if sys.platform == "linux" and (sock := transport.get_extra_info("socket")) is not None:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, size_bytes)


class ReadsInTurns(BufferedProtocol):
    """A part of a connection: it takes no more from the transport in a turn of the event loop than `turn_bytes`.

    What comes may hold hundreds of frames or chunks, and all other connections wait while these are parsed. That holds
    with asyncio. uvloop, in which Ray runs us behind a proxy of its own, reads 64 KiB for uvicorn's classes.
    """

    _buffer = bytearray()

    def turn_bytes(self) -> int:
        """Return how many bytes to take in the next turn."""
        return TURN_BYTES

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002  the transport's wish
        """Return the buffer of the next turn, as asyncio asks for it."""
        self._buffer = bytearray(self.turn_bytes())
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what has come in this turn."""
        data, self._buffer = memoryview(self._buffer)[:nbytes].tobytes(), bytearray()
        cast(Protocol, self).data_received(data)


class StreamProtocol(WebSocketsSansIOProtocol, ReadsInTurns):
    """uvicorn's WebSocket connection, with these bounds. Runs in the event loop's thread."""

    budget: ClassVar[ByteBudget]  # shared by all connections of one server; set by `stream_protocol`
    handshake_answered: Callable[[], None] = staticmethod(lambda: None)  # called once it is, and at the end
    _received: Hold  # since the app last took a message
    _second, _control_frames = 0.0, 0  # when this second began, and the control frames in it

    def connection_made(self, transport: BaseTransport) -> None:
        """Shorten the send buffers, so that a slow reader is noticed early and then gets the newest frame."""
        self._received = self.budget.hold(exempt_bytes=SMALL_BYTES)
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=UNSENT_BYTES)
        limit_unsent(transport, UNSENT_BYTES)

    def data_received(self, data: bytes) -> None:
        """Accept data, or close with 1013 if too much is held; a small message is always accepted."""
        if self.conn.eof_sent:  # it ends here: what still comes is for nobody
            return
        try:
            self._received.add(len(data))
        except TooManyBytes:
            self._fail(CloseCode.TRY_AGAIN_LATER, "too much is being sent at once")
        else:
            super().data_received(data)
            if not self.frames and not self.conn.reader.buffer and self.queue.empty():  # they were pings and the like
                self._received.release()

    def handle_cont(self, event: Frame) -> None:
        """Accept a fragment, or close with 1009 where there are too many for what they hold."""
        pieces = len(self.frames) + 1
        if pieces % FREE_PIECES == 1 and too_fine(pieces, sum(map(len, self.frames))):
            self._fail(CloseCode.MESSAGE_TOO_BIG, "the message has too many fragments")
        else:
            super().handle_cont(event)

    def handle_ping(self) -> None:
        """Answer a ping."""
        if self._takes_control_frame():
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        """Take the answer to a ping of ours."""
        if self._takes_control_frame():
            super().handle_pong(event)

    def _end_handshake(self) -> None:
        """Read on, and leave the count of connections."""
        self.handshake_answered()
        self.transport.resume_reading()
        self.__dict__.pop("handshake_answered", None)  # it holds the connection's HTTP side

    def _takes_control_frame(self) -> bool:
        """Count a control frame, and close with 1008 where there are too many in a second."""
        now_s = self.loop.time()
        if now_s >= self._second + 1:
            self._second, self._control_frames = now_s, 0
        self._control_frames += 1
        if self._control_frames > CONTROL_FRAMES:
            self._fail(CloseCode.POLICY_VIOLATION, f"more than {CONTROL_FRAMES} control frames in a second")
        return self._control_frames <= CONTROL_FRAMES

    def _fail(self, code: CloseCode, reason: str) -> None:
        """Close for what the client did. Read on for a moment: TCP loses the close frame where data is left unread."""
        if self.conn.eof_sent:
            return
        self.conn.fail(code, reason)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent, self.frames = True, []
        self._received.release()
        if self.close_timer is None:
            self.close_timer = self.loop.call_later(LAST_LINGER_S, self.transport.close)
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()

    def send_receive_event_to_app(self) -> None:
        """Pass a message on; one that is not UTF-8 closes the connection with 1007, and no traceback.

        What comes after the server has closed is dropped: nobody is there to read it.
        """
        if self.conn.state is not State.OPEN:
            self.frames = []
            return
        if self.curr_msg_data_type == "text" and not all(map(bytes.isascii, self.frames)):
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                self.conn.send_close(1007)
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    async def receive(self) -> Any:
        """Give the next message to the app, and count it here no more.

        One message in each turn of the event loop, so that other connections have their turns too.
        """
        await asyncio.sleep(0)
        message = await super().receive()
        self._received.release()
        return message

    def connection_lost(self, exc: Exception | None) -> None:
        """Release what the connection held."""
        self._end_handshake()
        self._received.release()
        super().connection_lost(exc)

    async def send(self, message: Any) -> None:
        """Send what the app says. Raises ClientDisconnected, which ends the app quietly, where nobody is to be let in.

        After an answer in place of a handshake nothing is missing, though uvicorn would log an error.
        """
        if message["type"] == "websocket.accept" and self.transport.is_closing():
            raise ClientDisconnected
        await super().send(message)
        if message["type"] == "websocket.accept":
            self._end_handshake()
        if message["type"] == "websocket.send":  # uvicorn waits only before the next one; this one would not be counted
            await self.writable.wait()
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True

    async def run_asgi(self) -> None:
        """Run the app, then see that the connection ends: a closed transport waits for its reader without limit."""
        await super().run_asgi()
        self.loop.call_later(LINGER_S, self.transport.abort)

    def keepalive_timeout(self) -> None:
        """Drop a client that did not answer a ping: it reads nothing, so no close message would reach it."""
        super().keepalive_timeout()
        self.transport.abort()


def stream_protocol(max_held_bytes: int = MAX_HELD_BYTES) -> type[StreamProtocol]:
    """Make the protocol class of one server: all its connections share one budget."""
    return type("BoundedStreamProtocol", (StreamProtocol,), {"budget": ByteBudget(max_held_bytes)})


class Streams:
    """Counts open streams by address and in total, and streams with a job, which shutdown waits for."""

    def __init__(self, max_streams: int, max_per_address: int) -> None:
        self._max_streams, self._max_per_address = max_streams, max_per_address
        self._open: Counter[str] = Counter()
        self._busy = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    @property
    def open(self) -> int:
        """How many there are."""
        return self._open.total()

    @contextmanager
    def opened(self, host: str) -> Iterator[None]:
        """Count a stream while it is open. Raises TooManyStreams."""
        address = counted_address(host)
        if self._open.total() >= self._max_streams:
            raise TooManyStreams(f"at most {self._max_streams} streams", self._max_streams)
        if self._open[address] >= self._max_per_address:
            raise TooManyStreams(f"at most {self._max_per_address} streams from one address", self._max_per_address)
        self._open[address] += 1
        try:
            yield
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count a stream as having a job, until the last byte of its image is sent."""
        self._busy += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._quiet.set()

    async def quiet(self, patience_s: float) -> None:
        """Wait until no stream has a job, but no longer than `patience_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._quiet.wait()


class ForwardedAddresses(ProxyHeadersMiddleware):
    """uvicorn's reading of X-Forwarded-For and X-Forwarded-Proto from `trusted_hosts`, which would take any text.

    Where no address is named, the client stays the proxy: what is counted and logged is always an address.
    """

    def __init__(self, app: ASGIApp, trusted_hosts: list[str] | str) -> None:
        super().__init__(app, trusted_hosts)  # type: ignore[arg-type]  # uvicorn has its own types of ASGI
        self.trusted_hosts = _Addresses(trusted_hosts)


class _Addresses(_TrustedHosts):
    def get_trusted_client_address(self, x_forwarded_for: str) -> tuple[str, int]:
        """Return the client's address and port; an empty address, which is refused, if it is not valid."""
        host, port = super().get_trusted_client_address(x_forwarded_for)
        try:
            ip_address(host)
        except ValueError:
            return "", 0
        return ("", 0) if "%" in host else (host, port)  # after it IPv6 allows any text: the zone of some machine


def counted_address(host: str) -> str:
    """Return the unit that is limited: an IPv4 address, or an IPv6 /64 network, which one customer has.

    A socket of both kinds tells an IPv4 address as ::ffff:a.b.c.d.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ip_network((host, 64), strict=False))
