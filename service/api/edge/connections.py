"""WebSocket connections under uvicorn, and code shared with HTTP connections.

Everything here runs in the event loop's thread. WebSockets get small send buffers, limits on received data, and a
deadline for closing. uvicorn has no settings for these, so its protocol class is subclassed. That class is not
public: pyproject.toml restricts uvicorn's version, and a test fails if the class changes.
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

TCP_NOTSENT_LOWAT = 25  # from linux/tcp.h; missing from Python's socket module
TURN_BYTES = 2048  # holds about 300 chunks or frames of the smallest size; parsing them takes 1 ms
# A body or message may have FREE_PIECES pieces, plus one for each BYTES_PER_PIECE bytes of its size.
FREE_PIECES, BYTES_PER_PIECE = 1024, 64
# Limit on each send buffer, asyncio's and the kernel's. By default they hold megabytes of frames, which are old by the
# time a slow reader receives them.
UNSENT_BYTES = 16_384
LINGER_S = 10.0  # seconds, after the app has ended, for the client to read the rest and answer the close frame
LAST_LINGER_S = 1.0  # seconds to discard received data after closing because of a client's error
CONTROL_FRAMES = 64  # maximum number of pings and pongs per second


def too_fine(pieces: int, size_bytes: int) -> bool:
    """Return True if a body or message arrived in more pieces than any client needs.

    Parsing a small piece costs as much as parsing a large one.
    """
    return pieces > FREE_PIECES + size_bytes // BYTES_PER_PIECE


def limit_unsent(transport: BaseTransport, size_bytes: int) -> None:
    """Limit the bytes that wait in the kernel's send buffer. Has an effect only on Linux."""
    if sys.platform == "linux" and (sock := transport.get_extra_info("socket")) is not None:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, size_bytes)


class ReadsInTurns(BufferedProtocol):
    """Mixin for a connection that reads at most `turn_bytes` bytes in one turn of the event loop.

    A larger read may contain hundreds of frames or chunks, and parsing them all would delay every other connection. The
    limit has no effect under uvloop, which always reads 64 KiB for uvicorn's classes. Ray Serve uses uvloop, but behind
    its own proxy.
    """

    _buffer = bytearray()

    def turn_bytes(self) -> int:
        return TURN_BYTES

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002  the transport's wish
        self._buffer = bytearray(self.turn_bytes())
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        data, self._buffer = memoryview(self._buffer)[:nbytes].tobytes(), bytearray()
        cast(Protocol, self).data_received(data)


class StreamProtocol(WebSocketsSansIOProtocol, ReadsInTurns):
    """uvicorn's WebSocket connection, with the limits of this module."""

    budget: ClassVar[ByteBudget]  # shared by all connections of one server; set by `stream_protocol`
    # Called once the handshake has been answered or the connection has ended.
    handshake_answered: Callable[[], None] = staticmethod(lambda: None)
    _received: Hold  # bytes received since the app last took a message from the queue
    _second, _control_frames = 0.0, 0  # when the current second began, and its number of control frames

    def connection_made(self, transport: BaseTransport) -> None:
        """Shrink the send buffers, so that a slow reader is noticed early and is sent the newest frame next."""
        self._received = self.budget.hold(exempt_bytes=SMALL_BYTES)
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=UNSENT_BYTES)
        limit_unsent(transport, UNSENT_BYTES)

    def data_received(self, data: bytes) -> None:
        """Accept data, or close with code 1013 if the server holds too much. Small messages are always accepted."""
        if self.conn.eof_sent:  # already closing
            return
        try:
            self._received.add(len(data))
        except TooManyBytes:
            self._fail(CloseCode.TRY_AGAIN_LATER, "too much is being sent at once")
        else:
            super().data_received(data)
            if not self.frames and not self.conn.reader.buffer and self.queue.empty():  # these were only control frames
                self._received.release()

    def handle_cont(self, event: Frame) -> None:
        """Accept a fragment, or close with code 1009 if the message has too many fragments for its size."""
        pieces = len(self.frames) + 1
        if pieces % FREE_PIECES == 1 and too_fine(pieces, sum(map(len, self.frames))):
            self._fail(CloseCode.MESSAGE_TOO_BIG, "the message has too many fragments")
        else:
            super().handle_cont(event)

    def handle_ping(self) -> None:
        if self._takes_control_frame():
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        if self._takes_control_frame():
            super().handle_pong(event)

    def _end_handshake(self) -> None:
        """Start reading, and stop counting the connection as an HTTP connection."""
        self.handshake_answered()
        self.transport.resume_reading()
        self.__dict__.pop("handshake_answered", None)  # the callback would keep the HTTP protocol object in memory

    def _takes_control_frame(self) -> bool:
        """Count a control frame. If this second already has too many, close with code 1008 and return False."""
        now_s = self.loop.time()
        if now_s >= self._second + 1:
            self._second, self._control_frames = now_s, 0
        self._control_frames += 1
        if self._control_frames > CONTROL_FRAMES:
            self._fail(CloseCode.POLICY_VIOLATION, f"more than {CONTROL_FRAMES} control frames in a second")
        return self._control_frames <= CONTROL_FRAMES

    def _fail(self, code: CloseCode, reason: str) -> None:
        """Close the connection because of a client's error.

        Reading goes on for LAST_LINGER_S, because the close frame may be lost if received data is left unread.
        """
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
        """Pass a message to the app. If its text is not UTF-8, close with code 1007 without logging a traceback.

        A message that arrives after the server has closed the WebSocket is dropped, because the app no longer reads.
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
        """Return the next message to the app, and stop counting its bytes.

        Other connections run first, so that a busy connection cannot delay them.
        """
        await asyncio.sleep(0)
        message = await super().receive()
        self._received.release()
        return message

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_handshake()
        self._received.release()
        super().connection_lost(exc)

    async def send(self, message: Any) -> None:
        """Send a message from the app.

        If the client has disconnected before the app accepts its handshake, raise ClientDisconnected, which ends the
        app. If the app answers the handshake with an HTTP response, mark the handshake as complete; otherwise uvicorn
        would log an error.
        """
        if message["type"] == "websocket.accept" and self.transport.is_closing():
            raise ClientDisconnected
        await super().send(message)
        if message["type"] == "websocket.accept":
            self._end_handshake()
        # uvicorn waits for the client only before the next message. Wait now, so that the message counts until it is
        # sent.
        if message["type"] == "websocket.send":
            await self.writable.wait()
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True

    async def run_asgi(self) -> None:
        """Run the app. LINGER_S seconds after the app ends, abort the connection.

        Without the abort, a closed transport may wait for its reader forever.
        """
        await super().run_asgi()
        self.loop.call_later(LINGER_S, self.transport.abort)

    def keepalive_timeout(self) -> None:
        """Abort the connection. A client that does not answer pings would not read a close frame either."""
        super().keepalive_timeout()
        self.transport.abort()


def stream_protocol(max_held_bytes: int = MAX_HELD_BYTES) -> type[StreamProtocol]:
    """Return a protocol class for one server. All its connections share one memory budget."""
    return type("BoundedStreamProtocol", (StreamProtocol,), {"budget": ByteBudget(max_held_bytes)})


class Streams:
    """Counts open streams, in total and by address, and busy streams. Shutdown waits for busy streams."""

    def __init__(self, max_streams: int, max_per_address: int) -> None:
        self._max_streams, self._max_per_address = max_streams, max_per_address
        self._open: Counter[str] = Counter()
        self._busy = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    @property
    def open(self) -> int:
        """The number of open streams."""
        return self._open.total()

    @contextmanager
    def opened(self, host: str) -> Iterator[None]:
        """Count a stream while the block runs. Raises TooManyStreams."""
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
        """Count a stream as busy while the block runs."""
        self._busy += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._quiet.set()

    async def quiet(self, patience_s: float) -> None:
        """Wait until no stream is busy, or until `patience_s` seconds have passed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._quiet.wait()


class ForwardedAddresses(ProxyHeadersMiddleware):
    """Accepts X-Forwarded-Proto from `trusted_hosts`, and X-Forwarded-For if it names a valid address.

    uvicorn's class accepts any text as an address. If the address is invalid, this class treats the proxy as the
    client, so limits and logs always have an address.
    """

    def __init__(self, app: ASGIApp, trusted_hosts: list[str] | str) -> None:
        super().__init__(app, trusted_hosts)  # type: ignore[arg-type]  # uvicorn has its own types of ASGI
        self.trusted_hosts = _Addresses(trusted_hosts)


class _Addresses(_TrustedHosts):
    def get_trusted_client_address(self, x_forwarded_for: str) -> tuple[str, int]:
        """Return the client's address and port. If the address is invalid, return "", which uvicorn ignores."""
        host, port = super().get_trusted_client_address(x_forwarded_for)
        try:
            ip_address(host)
        except ValueError:
            return "", 0
        # An IPv6 address may contain a zone after %. The zone can be any text and means something only on its own
        # machine.
        return ("", 0) if "%" in host else (host, port)


def counted_address(host: str) -> str:
    """Return the address that limits count by: an IPv4 address, or an IPv6 /64 network, which is usually one customer.

    A dual-stack socket reports IPv4 addresses as ::ffff:a.b.c.d. They count as IPv4.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ip_network((host, 64), strict=False))
