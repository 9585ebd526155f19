"""How uvicorn holds a WebSocket here: little is on its way to a reader, what comes in is bounded over all connections
together, and a connection that is closed is gone.
"""

import socket
import sys
from asyncio import BaseTransport
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from service.api.middleware import SMALL_BYTES
from service.byte_budget import MAX_HELD_BYTES

UNSENT_BYTES = (
    16_384  # here and in the kernel, each: it would take megabytes, of frames that are old when they are read
)
TCP_NOTSENT_LOWAT = 25  # linux/tcp.h; socket has no name for it
LINGER_S = 10.0  # for what was left to be read, and the close to be answered
TRY_AGAIN = 1013


@dataclass(slots=True)
class Held:
    """How much has come in over all connections and was not taken yet. In the event loop's thread."""

    bytes: int = 0


class StreamProtocol(WebSocketsSansIOProtocol):
    """Else the same. A subclass with a Held of its own is what a server is given, see `stream_protocol`."""

    held: Held
    max_held_bytes: int
    _received = 0  # since the last message was taken

    def connection_made(self, transport: BaseTransport) -> None:
        """Keep the buffers short, so that a slow reader is seen to be one, and gets the newest frame."""
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=UNSENT_BYTES)
        if sys.platform == "linux" and (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def data_received(self, data: bytes) -> None:
        """Take what came, unless too much is held; what makes a small message is taken all the same."""
        self._received += len(data)
        self.held.bytes += len(data)
        if self._received > SMALL_BYTES and self.held.bytes > self.max_held_bytes:
            self.conn.fail(TRY_AGAIN, "too much is being sent at once")
            self.queue.put_nowait({"type": "websocket.disconnect", "code": TRY_AGAIN})
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()
            return
        super().data_received(data)

    async def receive(self) -> Any:
        """Give the app a message; it is the app's from then on."""
        message = await super().receive()
        self._let_go()
        return message

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is held of who is gone."""
        self._let_go()
        super().connection_lost(exc)

    def _let_go(self) -> None:
        self.held.bytes -= self._received
        self._received = 0

    async def run_asgi(self) -> None:
        """Run the app. Closing a transport waits for its reader, for ever if need be."""
        await super().run_asgi()
        self.loop.call_later(LINGER_S, self.transport.abort)

    def keepalive_timeout(self) -> None:
        """No answer to a ping: it reads nothing, so it is not told why either."""
        super().keepalive_timeout()
        self.transport.abort()


def stream_protocol(max_held_bytes: int = MAX_HELD_BYTES) -> type[StreamProtocol]:
    """Make the protocol of one server: its connections share a bound."""
    return type("BoundedStreamProtocol", (StreamProtocol,), {"held": Held(), "max_held_bytes": max_held_bytes})
