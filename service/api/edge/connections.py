"""What connections of both kinds have in common: small turns, short buffers in the kernel, and how they are counted.

Used in the event loop's thread.
"""

import asyncio
import socket
import sys
from asyncio import BaseTransport, BufferedProtocol, Protocol
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address, ip_network
from typing import cast

from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware, _TrustedHosts

from tminus.service.errors import TooManyStreams

TCP_NOTSENT_LOWAT = 25  # linux/tcp.h; the socket module has no name for it
TURN_BYTES = 2048  # some 300 of the smallest chunks or frames, which take a millisecond
# The pieces that a body or a message may have, and the bytes for which it may have one more.
FREE_PIECES, BYTES_PER_PIECE = 1024, 64


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
