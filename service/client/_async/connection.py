"""The connections to one server: HTTP requests, streamed responses and WebSockets."""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx

from ..errors import ClientError
from ..patience import Patience
from ..reading import DOCUMENT_BYTES
from ..transport import (
    CLOSE_S,
    CONNECT_S,
    PONG_S,
    UNBOUNDED,
    UNCOMPRESSED,
    VERSION,
    check,
    check_coding,
    closed,
    http_address,
    lost,
    model_address,
    refused,
    timeouts,
    too_large,
    warn_of_deprecation,
    ws_address,
)

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection


MESSAGES_AHEAD = 2  # messages of a WebSocket that are buffered; each may be as large as is allowed
# A request without a time limit finds by these, after a minute and a half, that the server is silently gone. Systems
# differ: macOS calls the first TCP_KEEPALIVE, and only Linux has the last, for a request that is not confirmed.
KEEP_ALIVE = {
    "TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 90_000
}  # fmt: skip


async def _keep_alive(event: str, info: Mapping[str, Any]) -> None:
    """Turn on TCP's keep-alive for each new connection, through httpx's `trace`.

    httpx's transports take socket options too, but a client with its own transport ignores the environment's proxies.
    """
    opened = info["return_value"].get_extra_info("socket") if event.endswith(".connect_tcp.complete") else None
    if opened is None:
        return
    with suppress(OSError):  # a system may refuse one
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


TRACED = {"trace": _keep_alive}


class AsyncConnection:
    """Connects to one server, and turns the errors of httpx and websockets into ClientErrors.

    Paths are relative to the address of `model`, or of the server if it is None. patience_s: of the client. Raises
    ValueError for an invalid url or model.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        patience_s: float,
        headers: Mapping[str, str] | None,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self.server, self.patience_s = http_address(url), patience_s
        address = model_address(self.server, model)
        self._ws_address, self._headers = ws_address(address), dict(headers or {})
        self._http = httpx.AsyncClient(
            base_url=address,
            headers=VERSION | UNCOMPRESSED | self._headers,
            timeout=timeouts(),
            limits=UNBOUNDED,
            transport=transport,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def request(
        self,
        method: str,
        path: str,
        patience: Patience | None = None,
        max_bytes: int = DOCUMENT_BYTES,
        **options: Any,
    ) -> httpx.Response:
        """Send a request until the response is 2xx; `options` are those of httpx. Raises ClientError.

        path: or a whole URL. max_bytes: of the content; a longer answer is not read.
        """
        patience = patience or Patience(self.patience_s)
        while True:
            try:
                return await self._send(method, path, max_bytes, options)
            except ClientError as error:
                await asyncio.sleep(patience.pause_s(error))

    async def _send(self, method: str, path: str, max_bytes: int, options: Mapping[str, Any]) -> httpx.Response:
        try:
            async with self._http.stream(method, path, extensions=TRACED, **options) as response:
                warn_of_deprecation(method, response)
                return await _whole(response, max_bytes)
        except httpx.HTTPError as error:
            raise lost(error) from None

    @asynccontextmanager
    async def stream(
        self, path: str, params: Mapping[str, Any], headers: Mapping[str, str], quiet_s: float
    ) -> AsyncIterator[httpx.Response]:
        """Open a 2xx response that is read while it arrives. Raises ClientError, also if it breaks off later."""
        options: dict[str, Any] = {"params": dict(params), "headers": headers, "timeout": timeouts(quiet_s)}
        try:
            async with self._http.stream("GET", path, extensions=TRACED, **options) as response:
                if not response.is_success:
                    await _whole(response, DOCUMENT_BYTES)
                check_coding(response)
                yield response
        except httpx.HTTPError as error:
            raise lost(error) from None

    @asynccontextmanager
    async def websocket(self, path: str, max_bytes: int) -> AsyncIterator["ClientConnection"]:
        """Open a WebSocket, with messages of at most max_bytes.

        Raises ClientError, also if the server closes it while it is in use; ImportError without websockets.
        """
        try:
            from websockets.asyncio.client import connect
            from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
        except ModuleNotFoundError as error:
            needed = f"watch needs {error.name}: pip install './client[watch]' in a checkout of tminus"
            raise ImportError(needed, name=error.name) from None
        options: dict[str, Any] = {
            "additional_headers": self._headers,
            "open_timeout": CONNECT_S,
            "close_timeout": CLOSE_S,
            "ping_timeout": PONG_S,
            "compression": None,
            "max_size": max_bytes,
            "max_queue": MESSAGES_AHEAD,
        }
        try:
            async with connect(self._ws_address + path, **options) as ws:
                try:
                    yield ws
                finally:
                    await ws.close()  # with 1000; after an exception `with` would send 1011
        except ConnectionClosed as error:
            raise closed(error, max_bytes) from None
        except InvalidStatus as error:
            raise refused(error) from None
        except (OSError, WebSocketException) as error:
            raise lost(error) from None


async def _whole(response: httpx.Response, max_bytes: int) -> httpx.Response:
    """Read a response to its end. Raises ClientError if it is not 2xx or too long, and httpx.HTTPError."""
    check_coding(response)
    limit = max_bytes if response.is_success else DOCUMENT_BYTES
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > limit:
            raise too_large(response.status_code, limit)
    whole = httpx.Response(response.status_code, headers=response.headers, content=bytes(content))
    check(whole)
    return whole
