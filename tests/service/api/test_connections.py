import asyncio
import time

import pytest

from tminus.service.api.edge.connections import Streams
from tminus.service.errors import TooManyStreams


def refused(streams: Streams, host: str) -> bool:
    try:
        with streams.opened(host):
            return False
    except TooManyStreams:
        return True


def test_streams_are_limited_by_address_and_in_total() -> None:
    streams = Streams(3, 2)
    with streams.opened("10.0.0.1"), streams.opened("10.0.0.1"):
        assert refused(streams, "10.0.0.1")
        with streams.opened("10.0.0.2"):
            assert refused(streams, "10.0.0.3")
        assert not refused(streams, "10.0.0.3")
    assert not refused(streams, "10.0.0.1")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("testclient", "testclient", True),
    ],
)
def test_an_ipv6_64_network_counts_as_one_address(one: str, other: str, same: bool) -> None:
    streams = Streams(10, 1)
    with streams.opened(one):
        assert refused(streams, other) == same


def test_quiet_waits_for_streams_that_have_a_job_but_not_for_ever() -> None:
    async def test() -> None:
        streams = Streams(1, 1)
        await streams.quiet(60)
        began = time.monotonic()
        with streams.busy(), streams.busy():
            await streams.quiet(0.05)
        assert 0.04 < time.monotonic() - began < 5
        with streams.busy():
            waiting = asyncio.ensure_future(streams.quiet(60))
            await asyncio.sleep(0)
            assert not waiting.done()
        await asyncio.wait_for(waiting, 5)

    asyncio.run(test())
