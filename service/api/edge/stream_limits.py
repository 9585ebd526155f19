"""How many streams are open, by address. Used in the event loop's thread; the server waits for it before it stops."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address, ip_network

from tminus.service.errors import TooManyStreams


class Streams:
    """Counts open streams by address and in total, and those that have a job."""

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


def counted_address(host: str) -> str:
    """The unit that is limited: an IPv4 address, or an IPv6 /64 network, which one customer has.

    A socket of both kinds tells an IPv4 address as ::ffff:a.b.c.d.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ip_network((host, 64), strict=False))
