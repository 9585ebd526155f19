"""One delivery attempt: a POST request to a checked address, limited in time and size.

Each address is checked when the connection is made. Redirects are not followed, proxies from the environment are not
used, and connections are not reused. Only the status of a response is read, so that clients cannot read data from
internal services through this server.

Bodies are signed as in Standard Webhooks (standardwebhooks.com, version 1, symmetric): HMAC-SHA256 with a timestamp.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpcore

from tminus.service.jobs.webhooks.webhook import AllowedReceivers, Receiver, permitted

log = logging.getLogger(__name__)

ATTEMPT_S = 10.0  # seconds for the whole attempt: name lookup, connection, TLS, request and response
CONNECT_S = 4.0  # seconds to connect to one address
MOST_ADDRESSES = 4  # maximum number of addresses tried for one name
# The text is the same for both cases, because clients must not learn which names the server can resolve.
NOWHERE = "its name is not known, or leads to no public address; others are for --webhook-allow to list"
GONE = 410  # response status of a receiver that wants no more events (Standard Webhooks)
WHSEC = "whsec_"  # prefix of each secret
LEAST_SECRET_BYTES, MOST_SECRET_BYTES = 24, 64
MOST_SECRETS = 8
MOST_SECRETS_FILE_BYTES = 4096
MOST_LOOKUPS = 128  # maximum number of threads for name lookups
LookUp = Callable[[str, str], Awaitable[list[str]]]  # (name, sharer) -> addresses
SECRET_FORM = f"{WHSEC} and base64 of {LEAST_SECRET_BYTES} to {MOST_SECRET_BYTES} bytes"


def read_secrets(text: str) -> tuple[bytes, ...]:
    """Parse secrets, one per line, newest first. Each body is signed with all of them.

    Raises ValueError, whose message shows no secret.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if not 1 <= len(lines) <= MOST_SECRETS:
        raise ValueError(f"there must be 1 to {MOST_SECRETS} secrets, one a line; there are {len(lines)}")
    return tuple(map(_secret, lines))


def read_secrets_of(file: Path) -> tuple[bytes, ...]:
    """Read secrets from a file in the format of `read_secrets`. Raises ValueError."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_SECRETS_FILE_BYTES + 1)
        if len(data) > MOST_SECRETS_FILE_BYTES:
            raise ValueError(f"{file} has more than {MOST_SECRETS_FILE_BYTES} bytes")
        return read_secrets(data.decode("ascii"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} has other characters than those of a secret, {SECRET_FORM}") from None


def _secret(line: str) -> bytes:
    try:
        secret = base64.b64decode(line.removeprefix(WHSEC), validate=True)
    except ValueError:
        secret = b""
    if not line.startswith(WHSEC) or not LEAST_SECRET_BYTES <= len(secret) <= MOST_SECRET_BYTES:
        raise ValueError(f"a secret must be {SECRET_FORM}, as `echo {WHSEC}$(openssl rand -base64 32)` makes one")
    return secret


def signed_headers(secrets: Iterable[bytes], delivery_id: str, unix_s: int, body: bytes) -> dict[str, str]:
    """Return the headers that prove to a receiver who sent a body and when."""
    content = f"{delivery_id}.{unix_s}.".encode() + body
    signatures = (base64.b64encode(hmac.digest(secret, content, hashlib.sha256)).decode() for secret in secrets)
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(unix_s),
        "webhook-signature": " ".join(f"v1,{each}" for each in signatures),
    }


class NotDelivered(Exception):
    """Raised if an attempt fails. Clients see the reason, so it contains no address and no text from the response."""

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        """is_final: the receiver wants no further attempts."""
        super().__init__(reason)
        self.reason, self.is_final = reason, is_final


class Sender:
    """Sends deliveries, with a new connection for each attempt. Used only in the event loop's thread."""

    def __init__(
        self, secrets: tuple[bytes, ...], allowed: AllowedReceivers, tls: ssl.SSLContext, look_up: LookUp | None = None
    ) -> None:
        """tls: contains the trusted certificates. look_up: replaces the system's name lookup."""
        self._secrets, self._allowed, self._tls = secrets, allowed, tls
        self._look_up = look_up or Names().look_up

    async def send(self, url: str, delivery_id: str, body: bytes, sharer: str = "") -> None:
        """Send a body. The status of the response decides whether it counts as delivered.

        sharer: key that name lookups count against. Raises NotDelivered. Raises InvalidField if the URL is no longer
        allowed, and NamesBusy if too many lookups are running. In these two cases, nothing was sent.
        """
        receiver = Receiver.parse(url, self._allowed)
        headers = {
            "host": receiver.host_header,
            "content-type": "application/json",
            "user-agent": "tminus",
            "accept-encoding": "identity",
        } | signed_headers(self._secrets, delivery_id, int(time.time()), body)
        backend = _CheckedBackend(receiver, self._allowed, lambda name: self._look_up(name, sharer))
        target = httpcore.URL(
            scheme=receiver.scheme.encode(),
            host=receiver.host.encode(),
            port=receiver.port,
            target=receiver.target.encode(),
        )
        status: int | None = None
        try:
            async with (
                asyncio.timeout(ATTEMPT_S),
                httpcore.AsyncConnectionPool(self._tls, max_connections=1, network_backend=backend) as pool,
                pool.stream("POST", target, headers=list(headers.items()), content=body) as answer,
            ):
                status = answer.status
        except TimeoutError:
            if status is None:
                raise NotDelivered(f"no answer within {ATTEMPT_S:g} s") from None
        except httpcore.ConnectError as error:
            raise NotDelivered(_why(error)) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            if status is None:
                raise NotDelivered(
                    f"the connection broke, or the answer is not HTTP ({type(error).__name__})"
                ) from None
        except (OSError, ValueError) as error:  # a library rejected its arguments
            if status is None:
                raise NotDelivered(f"no request could be made ({type(error).__name__})") from None
        assert status is not None
        _check(status)


def _check(status: int) -> None:
    """Raise NotDelivered unless the status is 2xx."""
    if 300 <= status < 400:
        raise NotDelivered(f"the receiver answered {status}, a redirect, and none is followed")
    if not 200 <= status < 300:
        raise NotDelivered(f"the receiver answered {status}", is_final=status == GONE)


def _why(error: BaseException) -> str:
    """Return the reason for a failed connection. TLS errors are shown, because the client can fix a certificate."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the receiver's certificate is not valid: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {cause.reason or 'it was cut off'}"
        cause = cause.__cause__ or cause.__context__
    return str(error) or "no connection could be made"


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to permitted addresses. Each address is checked right before the connection is made."""

    def __init__(
        self, receiver: Receiver, allowed: AllowedReceivers, look_up: Callable[[str], Awaitable[list[str]]]
    ) -> None:
        self._receiver, self._allowed, self._look_up = receiver, allowed, look_up
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109, ARG002  httpcore's own signature; ATTEMPT_S bounds all
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve the name and connect to one of its permitted addresses. Raises ConnectError."""
        try:
            addresses = await self._look_up(host)
        except OSError as error:
            log.info("the receiver %s cannot be resolved: %s", host, error.strerror or error)
            raise httpcore.ConnectError(NOWHERE) from None
        if not (chosen := permitted(self._receiver, addresses, self._allowed)):
            log.info(
                "the receiver %s leads to %s, which may not be connected to", host, ", ".join(addresses) or "nothing"
            )
            raise httpcore.ConnectError(NOWHERE)
        for address in chosen[:MOST_ADDRESSES]:
            try:
                return await self._backend.connect_tcp(address, port, CONNECT_S, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        raise httpcore.ConnectError("no connection could be made")


class NamesBusy(Exception):
    """Raised if the sharer has too many lookups running. The next lookup must wait."""


class Names:
    """Looks up names in its own threads. Used only in the event loop's thread.

    The event loop's getaddrinfo shares threads with other work of the server, and the process waits for them at exit.
    With separate threads, a name server that does not answer delays only the callers that wait for that name.
    """

    def __init__(self) -> None:
        self._asked: dict[str, asyncio.Future[list[str]]] = {}  # lookups in progress, keyed by name
        self._sharers: dict[str, str | None] = {}  # sharer of each lookup, keyed by name; None if given up

    async def look_up(self, name: str, sharer: str = "") -> list[str]:
        """Return the addresses of a name, as the system resolves it. Raises OSError and NamesBusy.

        A sharer may use as many threads as are free (see Slots). A lookup that was given up continues, but no longer
        counts for its sharer, who may then have half of the remaining threads.
        """
        if name not in self._asked:
            if [*self._sharers.values()].count(sharer) >= MOST_LOOKUPS - len(self._asked):
                raise NamesBusy
            self._begin(name, sharer)
        try:
            return await asyncio.shield(self._asked[name])
        except asyncio.CancelledError:
            if name in self._asked:
                self._sharers[name] = None
            raise

    def _begin(self, name: str, sharer: str) -> None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[str]] = loop.create_future()
        self._asked[name] = answer
        self._sharers[name] = sharer

        def end(found: list[str] | OSError) -> None:
            del self._asked[name], self._sharers[name]
            if isinstance(found, OSError):
                answer.set_exception(found)
                answer.exception()  # retrieve the exception, so asyncio does not log it when no caller waits
            else:
                answer.set_result(found)

        def run() -> None:
            found: list[str] | OSError
            try:
                addresses = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                found = list(dict.fromkeys(str(address[0]) for *_, address in addresses))
            except OSError as error:
                found = error
            except UnicodeError:  # raised by the codec for internationalized names
                found = OSError("it is no name")
            with suppress(RuntimeError):  # the event loop has been closed
                loop.call_soon_threadsafe(end, found)

        try:
            threading.Thread(target=run, name="tminus-webhook-name", daemon=True).start()
        except RuntimeError:  # the system cannot start another thread
            end(OSError("no thread can be started"))
            raise NamesBusy from None
