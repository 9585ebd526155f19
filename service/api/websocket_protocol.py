"""How uvicorn treats a WebSocket here: short send buffers, one bound for all connections, no lingering close.

uvicorn has no setting for any of these. Its `Config(ws=...)` takes a protocol class, but the class that is extended
here is not part of its public interface. Therefore pyproject.toml bounds uvicorn's version, and a test names what is
missing if the class changes.
"""

import socket
import sys
from asyncio import BaseTransport
from typing import Any, ClassVar

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

from tminus.service.byte_budget import MAX_HELD_BYTES, SMALL_BYTES, ByteBudget, Hold
from tminus.service.errors import TooManyBytes

# In asyncio's buffer and in the kernel's, each. By default they hold megabytes: frames that are old when they are read.
UNSENT_BYTES = 16_384
TCP_NOTSENT_LOWAT = 25  # linux/tcp.h; the socket module has no name for it
LINGER_S = 10.0  # after the close, for the client to read the rest and to answer it
TRY_AGAIN = 1013


class StreamProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket connection, with these bounds. Runs in the event loop's thread."""

    budget: ClassVar[ByteBudget]  # shared by all connections of one server; set by `stream_protocol`
    _received: Hold  # since the app last took a message

    def connection_made(self, transport: BaseTransport) -> None:
        """Shorten the send buffers, so that a slow reader is noticed early and then gets the newest frame."""
        self._received = self.budget.hold(exempt_bytes=SMALL_BYTES)
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=UNSENT_BYTES)
        if sys.platform == "linux" and (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def data_received(self, data: bytes) -> None:
        """Accept data, or close with 1013 if too much is held; a small message is always accepted."""
        try:
            self._received.add(len(data))
        except TooManyBytes:
            self.conn.fail(TRY_AGAIN, "too much is being sent at once")
            self.queue.put_nowait({"type": "websocket.disconnect", "code": TRY_AGAIN})
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()
        else:
            super().data_received(data)

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
        """Give the app its next message, which is not counted here any more."""
        message = await super().receive()
        self._received.release()
        return message

    def connection_lost(self, exc: Exception | None) -> None:
        """Release what the connection held."""
        self._received.release()
        super().connection_lost(exc)

    async def send(self, message: Any) -> None:
        """Send what the app says. Raises ClientDisconnected, which ends the app quietly, where nobody is to be let in.

        After an answer in place of a handshake nothing is missing, though uvicorn would log an error.
        """
        if message["type"] == "websocket.accept" and self.transport.is_closing():
            raise ClientDisconnected
        await super().send(message)
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

    class BoundedStreamProtocol(StreamProtocol):
        budget = ByteBudget(max_held_bytes)

    return BoundedStreamProtocol
