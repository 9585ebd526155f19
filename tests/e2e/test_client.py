"""Our client against the real server: a restart under it, a refusal that passes, a loop that is left."""

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import START_TIMEOUT_S, RunningServer, SlowDown
from tminus.service.client import Accepted, AsyncClient, Cancelled, Done, Ended, Frame, Problem, Progress, Unreachable

Start = Callable[..., RunningServer]
SPEC: dict[str, Any] = {"n": 2, "steps": 20, "sampler": "ddim", "seed": 5, "class_label": "sneaker"}
LONG: dict[str, Any] = {"n": 2, "steps": 1000, "seed": 3}


def image(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as opened:
        return np.asarray(opened).astype(float)


def test_it_samples_watches_and_submits_the_same_bytes(bundled_server: RunningServer, slow_down: SlowDown) -> None:
    expected = bundled_server.post(json=SPEC)
    slow_down(bundled_server, between_ticks_s=0.03)  # or frames are dropped
    with bundled_server.api() as tminus:
        sampled = tminus.sample(**SPEC)
        accepted, *frames, done = tminus.watch(every=5, show=["x_t", "x_0"], **SPEC)
        job = tminus.submit(**SPEC)
        state = job.wait(60)
        kept = job.image()
    assert isinstance(accepted, Accepted)
    assert isinstance(done, Done)
    assert sampled.data == done.images[0] == kept.data == expected.content
    assert sampled.fingerprint == accepted.fingerprint == kept.fingerprint == state.fingerprint
    assert sampled.timings_s["denoise"] > sampled.timings_s["encode"] > 0
    shown = [(frame.step, frame.show) for frame in frames if isinstance(frame, Frame)]
    assert shown == [(step, show) for step in (5, 10, 15) for show in ("x_t", "x_0")]
    distances = [np.abs(image(frame.data) - image(sampled.data)).mean() for frame in frames if frame.show == "x_0"]
    assert distances == sorted(distances, reverse=True), "the guess becomes better"


def test_async_does_the_same(server: RunningServer) -> None:
    async def ask() -> None:
        async with AsyncClient(server.url) as tminus:
            sampled, other = await asyncio.gather(tminus.sample(**SPEC), tminus.sample(**SPEC | {"seed": 6}))
            assert sampled.data == server_made
            assert other.data != server_made
            messages = [message async for message in tminus.watch(every=5, layout="images", **SPEC)]
            assert isinstance(messages[-1], Done)
            assert {frame.image for frame in messages if isinstance(frame, Frame)} == {0, 1}
            job = await tminus.submit(**SPEC)
            events = [event async for event in job.events(every=5)]
            assert isinstance(events[-1], Ended)
            assert (await job.image()).data == server_made
            assert job.id in [state.id async for state in tminus.jobs(state="done")]
            noised = await tminus.noise(server_made, t=500, seed=7)
            assert image(noised.data).shape == (32, 32)
            with pytest.raises(Problem, match="steps must be"):
                await tminus.sample(steps=0)
            await job.delete()

    server_made = server.post(json=SPEC).content
    asyncio.run(ask())


def test_who_leaves_the_loop_gives_the_rows_back(server: RunningServer, slow_down: SlowDown) -> None:
    async def leave() -> None:
        async with AsyncClient(server.url) as tminus:
            async for message in tminus.watch(every=1, **LONG):
                if isinstance(message, Frame):
                    break

    slow_down(server)
    with server.api() as tminus:
        for message in tminus.watch(every=1, **LONG):
            if isinstance(message, Frame):
                break
        server.wait_until(lambda: server.metric("tminus_rows_active") == 0)
    asyncio.run(leave())
    server.wait_until(lambda: server.metric("tminus_rows_active") == 0)


def test_a_watched_job_is_cancelled_from_another_thread(server: RunningServer, slow_down: SlowDown) -> None:
    slow_down(server)
    with server.api() as tminus, tminus.watch(every=1, **LONG) as watching:
        messages = []
        for message in watching:
            messages.append(message)
            if len(messages) == 2:
                threading.Thread(target=watching.cancel).start()
    assert isinstance(messages[-1], Cancelled)
    assert len(messages) < LONG["steps"]


# --- a restart ---


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

    @asynccontextmanager
    async def killed() -> AsyncIterator[None]:
        again = asyncio.create_task(asyncio.to_thread(restart, server, own_server, tmp_path))
        yield
        await again

    async def ask() -> None:
        async with AsyncClient(server.url, patience_s=START_TIMEOUT_S) as tminus:
            job, other = await tminus.submit(**LONG), await tminus.submit(**LONG | {"seed": 4})
            async with killed():
                state, events = await asyncio.gather(job.wait(), _all(other.events(every=100)))
            assert state.state == "done"
            assert isinstance(events[-1], Ended)
            assert events[-1].job.state == "done"

    asyncio.run(ask())


async def _all(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


def test_a_server_that_is_gone_is_told(own_server: Start) -> None:
    server = own_server()
    server.slow_down()
    with server.api() as tminus:
        messages = iter(tminus.watch(every=1, **LONG))
        next(messages)
        server.process.kill()
        server.process.wait(30)
        with pytest.raises(Unreachable, match="the server closed before the job was done"):
            list(messages)
        with pytest.raises(Unreachable, match="refused"):
            tminus.model()


# --- patience ---


def test_who_has_patience_gets_in(own_server: Start) -> None:
    server = own_server("--max-backlog-s", "0.5")
    short: dict[str, Any] = {"n": 8, "steps": 75}
    server.fill(**short)
    with ThreadPoolExecutor(2) as pool, server.api() as hasty, server.api(patience_s=120) as patient:
        with pytest.raises(Problem) as caught:
            hasty.sample(**short)
        assert (caught.value.status, caught.value.code) == (429, "overloaded")
        assert caught.value.retry_after_s is not None
        waiting = [pool.submit(patient.sample, **short, seed=k) for k in range(2)]
        # Those of `fill`, of the hasty one, and of these.
        server.wait_until(lambda: server.metric("tminus_rejected_total") >= 4)
        server.speed_up()
        watched = list(patient.watch(**short))
        assert isinstance(watched[-1], Done)
        assert [each.result(120).seed for each in waiting] == [0, 1]
