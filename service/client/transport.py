"""URLs, keys and limits for requests, and the conversion of errors from httpx and websockets. No I/O."""

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import httpx

from . import checks
from .errors import SWITCHING_PROTOCOLS, ClientError, UnexpectedAnswer, Unreachable, error_of

if TYPE_CHECKING:  # needed only by `watch` at run time
    from websockets.exceptions import ConnectionClosed, InvalidStatus

HEADERS = {
    "API-Version": "1",  # a server that does not support this version refuses the call
    "Accept-Encoding": "identity",  # images are compressed already; the size of decompressed data is hard to limit
}
CONNECT_S = 10.0
CLOSE_S = 1.0  # timeout for closing a WebSocket; the client then reads no more messages
# Timeout for a WebSocket ping. The client does not read the pong while the caller is busy with earlier messages.
# The server has a shorter timeout, so it is the server that closes a dead connection.
PONG_S = 90.0
QUIET_S = 60.0
# httpx allows only 100 connections by default. Long requests would then delay other requests.
UNBOUNDED = httpx.Limits(max_connections=None, max_keepalive_connections=20)
KEY = re.compile(r"[!-~]([ -~]*[!-~])?")  # printable ASCII without a space at either end
OUR_COMPLAINTS = (1002, 1007, 1009)  # sent by the client: protocol error, invalid UTF-8, message too large
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


def http_address(url: str) -> str:
    """Check the URL of a server, and remove trailing slashes. Raises ValueError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"url must be http:// or https:// and a host, got {url!r} ({error})") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"url must be http:// or https:// and a host, got {url!r}")
    return url.rstrip("/")


def model_address(address: str, model: str | None) -> str:
    """Return the URL of a model. For None, the default model, it is the server's URL. Raises ValueError."""
    return address if model is None else f"{address}/models/{checks.model_name(model)}"


def authorization(key: str) -> dict[str, str]:
    """Return the header that sends a key. Raises ValueError if no header can hold the key.

    The error message does not contain the key.
    """
    if not KEY.fullmatch(key):
        raise ValueError("a key must be printable ASCII, without spaces or line ends around it")
    return {"Authorization": f"Bearer {key}"}


class KeyAuth(httpx.Auth):
    """Sends a key with one request, and replaces any other Authorization header.

    Raises ValueError for an invalid key.
    """

    def __init__(self, key: str) -> None:
        self._header = authorization(key)

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        request.headers.update(self._header)
        yield request


def with_key(url: str, headers: Mapping[str, str] | None, key: str | None) -> Mapping[str, str] | None:
    """Add a key to the headers, and remove any other Authorization header.

    Raises ValueError for an invalid key. Also raises it for a URL with credentials, which are sent in the same header.
    """
    if key is None:
        return headers
    if httpx.URL(http_address(url)).userinfo:
        raise ValueError("give a key, or a user in the url, but not both: they are sent in the same header")
    others = {name: value for name, value in (headers or {}).items() if name.lower() != "authorization"}
    return others | authorization(key)


def timeouts(quiet_s: float | None = QUIET_S) -> httpx.Timeout:
    """Return the timeouts of a request. quiet_s: how long the server may send no data; None: no limit."""
    return httpx.Timeout(quiet_s, connect=CONNECT_S if quiet_s is None else min(CONNECT_S, quiet_s))


def check_coding(response: httpx.Response) -> None:
    """Raise UnexpectedAnswer if a response is compressed. Call this before httpx decompresses it."""
    coding = response.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise UnexpectedAnswer(response.status_code, f"compressed ({coding!r:.40}), which was not asked for")


def too_large(status: int, max_bytes: int) -> UnexpectedAnswer:
    """Return the error for a response of more than max_bytes."""
    return UnexpectedAnswer(status, f"longer than an answer to this can be ({max_bytes} bytes)")


def warn_of_deprecation(method: str, response: httpx.Response) -> None:
    """Warn if the server marks a call as deprecated (RFC 9745, RFC 8594), but omit the query string."""
    if "deprecation" in response.headers:
        until = response.headers.get("sunset")
        what = f"{method} {response.url.path} is deprecated" + (f", and works until {until:.40}" if until else "")
        warnings.warn(f"{what}: see the changelog of tminus", FutureWarning, stacklevel=2)


def lost(error: Exception) -> Unreachable:
    """Return the error for a connection that could not be opened, or that broke."""
    reached = not isinstance(error, (*NOT_SENT, OSError)) or isinstance(error, ConnectionResetError)
    return Unreachable(str(error) or type(error).__name__, reached=reached)


def closed(error: "ConnectionClosed", max_bytes: int) -> ClientError:
    """Return the error for a WebSocket that closed too early. max_bytes: the maximum size of a message."""
    if error.sent is None or error.rcvd_then_sent:
        return Unreachable(f"the server closed before the job was done ({error})", reached=True)
    if error.sent.code == 1009:
        return too_large(SWITCHING_PROTOCOLS, max_bytes)
    if error.sent.code in OUR_COMPLAINTS:
        return UnexpectedAnswer(SWITCHING_PROTOCOLS)
    return Unreachable(f"the client closed before the job was done ({error})", reached=True)


def refused(error: "InvalidStatus") -> ClientError:
    """Return the error for a WebSocket that the server refused to open."""
    response = error.response
    headers = {name.lower(): value for name, value in response.headers.raw_items()}
    return error_of(response.status_code, headers, bytes(response.body or b""))
