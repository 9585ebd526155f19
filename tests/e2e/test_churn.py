"""Clients that go away at random moments leave nothing behind. tests/trials/churn.py does it with a thousand."""

import asyncio
import random

import httpx
import pytest

from tests.e2e.conftest import RunningServer
from tests.trials.churn import churn, settled


@pytest.mark.long
def test_connections_dropped_at_random_points_leave_no_row_task_or_file(server: RunningServer) -> None:
    async def run() -> tuple[dict[str, float], dict[str, float]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            await churn(server.url, 20, 10, random.Random(1))  # what is made once, is made
            before = await settled(http)
            await churn(server.url, 40, 20, random.Random(2))
            return before, await settled(http)

    before, after = asyncio.run(run())
    for what in ("rows", "tasks", "open files"):
        assert after[what] <= before[what], what
    assert after["resident memory, bytes"] < before["resident memory, bytes"] + 30e6
