"""Our client against real servers that are killed under it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.e2e.conftest import START_TIMEOUT_S, RunningServer
from tminus.service.client import AsyncClient, Ended, Progress

Start = Callable[..., RunningServer]
LONG: dict[str, Any] = {"n": 2, "steps": 1000, "seed": 3}


def restart(server: RunningServer, start: Start, state: Path) -> RunningServer:
    """Kill a server, and start another in its place."""
    server.process.kill()
    server.process.wait(30)
    return start("--state-dir", str(state), "--port", server.url.rpartition(":")[2])


def test_events_go_on_over_a_killed_server(own_server: Start, tmp_path: Path) -> None:
    server = own_server("--state-dir", str(tmp_path))
    server.slow_down(0.02)
    steps = []
    with ThreadPoolExecutor(1) as pool, server.api(patience_s=START_TIMEOUT_S) as tminus:
        job = tminus.submit(idempotency_key="mine", **LONG)
        restarted = None
        for event in job.events(every=20):
            if isinstance(event, Progress):
                steps.append(event.step)
            if len(steps) == 3 and restarted is None:
                restarted = pool.submit(restart, server, own_server, tmp_path)
        assert isinstance(event, Ended)
        assert event.job.state == "done"
        assert restarted is not None
        assert f"job {job.id} goes on from step" in restarted.result(120).log
        back = next((k for k in range(1, len(steps)) if steps[k] <= steps[k - 1]), len(steps))
        for part in (steps[:back], steps[back:]):  # what was done again after the crash is told again
            assert part == sorted(set(part))
        assert tminus.submit(idempotency_key="mine", **LONG).id == job.id
        assert job.image().data == tminus.sample(**LONG).data


def test_a_wait_outlasts_a_killed_server_and_async_events_too(own_server: Start, tmp_path: Path) -> None:
    server = own_server("--state-dir", str(tmp_path))
    server.slow_down()

    async def all_of(events: AsyncIterator[Any]) -> list[Any]:
        return [event async for event in events]

    async def ask() -> None:
        async with AsyncClient(server.url, patience_s=START_TIMEOUT_S) as tminus:
            job, other = await tminus.submit(**LONG), await tminus.submit(**LONG | {"seed": 4})
            again = asyncio.to_thread(restart, server, own_server, tmp_path)
            state, events, _ = await asyncio.gather(job.wait(), all_of(other.events(every=100)), again)
            assert state.state == "done"
            assert isinstance(events[-1], Ended)
            assert events[-1].job.state == "done"

    asyncio.run(ask())
