"""How uvicorn holds a WebSocket here: little is on its way to a reader, and a connection that is closed is gone."""

import socket
import sys
from asyncio import BaseTransport

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

UNSENT_BYTES = (
    16_384  # here and in the kernel, each: it would take megabytes, of frames that are old when they are read
)
TCP_NOTSENT_LOWAT = 25  # linux/tcp.h; socket has no name for it
LINGER_S = 10.0  # for what was left to be read, and the close to be answered


class StreamProtocol(WebSocketsSansIOProtocol):
    """Else the same."""

    def connection_made(self, transport: BaseTransport) -> None:
        """Keep the buffers short, so that a slow reader is seen to be one, and gets the newest frame."""
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=UNSENT_BYTES)
        if sys.platform == "linux" and (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    async def run_asgi(self) -> None:
        """Run the app. Closing a transport waits for its reader, for ever if need be."""
        await super().run_asgi()
        self.loop.call_later(LINGER_S, self.transport.abort)

    def keepalive_timeout(self) -> None:
        """No answer to a ping: it reads nothing, so it is not told why either."""
        super().keepalive_timeout()
        self.transport.abort()
