"""What httpx and websockets want to be told, and what their errors mean here. No I/O."""

from typing import Any

import httpx
from websockets.exceptions import ConnectionClosed, InvalidStatus

from service.client.effects import Answer, Request
from service.client.errors import Unreachable

CONNECT_S = 10.0
SWITCHING_PROTOCOLS = 101
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


def http_address(url: str) -> str:
    """The server's address. Raises ValueError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"url must be http:// or https:// and a host, got {url!r} ({error})") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"url must be http:// or https:// and a host, got {url!r}")
    return url.rstrip("/")


def ws_address(url: str) -> str:
    """The same for WebSockets."""
    return url.replace("http", "ws", 1)


def arguments_of(request: Request) -> dict[str, Any]:
    """The arguments of httpx.Client.build_request."""
    return {
        "method": request.method,
        "url": request.path,
        "params": dict(request.params),
        "json": request.json,
        "content": request.content,
        "headers": dict(request.headers),
        "timeout": httpx.Timeout(request.quiet_s, connect=CONNECT_S),
    }


def lost(error: Exception) -> Unreachable:
    """What a call is told of a connection that there is none, or that broke."""
    reached = not isinstance(error, (*NOT_SENT, OSError)) or isinstance(error, ConnectionResetError)
    return Unreachable(str(error) or type(error).__name__, reached=reached)


def closed(error: ConnectionClosed) -> Unreachable:
    """What a call is told of a WebSocket that is closed."""
    return Unreachable(f"the server closed before the job was done ({error})", reached=True)


def refused(error: InvalidStatus) -> Answer:
    """The answer to a handshake, where it is no."""
    response = error.response
    headers = {name.lower(): value for name, value in response.headers.raw_items()}
    return Answer(response.status_code, headers, bytes(response.body or b""))
