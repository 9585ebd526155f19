"""What viewers cost: the same jobs by POST and over WebSockets, in turns on one server; and what they see.

    python -m bench.streams [--checkpoint FOLDER] [--rounds 3] [--window 8]

Prints a table. Each window is of jobs that never end (1000 steps, begun anew), more than the server has places for.
"""

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from bench import servers
from bench.records import Ask

JOB = Ask(n=1, steps=1000)
WARM_UP_S = 2.0
IDLE_REQUESTS = 20
MANY, DEAF = 50, 10  # viewers, and how many of them read nothing


@dataclass
class Seen:
    """What one viewer saw."""

    gaps_s: list[float] = field(default_factory=list)  # between the frames of a job
    frames: int = 0


@dataclass
class Window:
    """The server in one window."""

    row_steps_per_s: float
    rss_bytes: float
    late_s: float = 0.0  # the longest that a frame was behind its beat
    frames_per_s: float = 0.0


def main() -> None:
    """Measure and print."""
    args = servers.options_of(__doc__, checkpoint=servers.CHECKPOINT, rounds=3, window=8.0)
    tminus = servers.contenders(1, ("--max-streams-per-address", "4096"))["tminus"]
    with servers.running(tminus, args.checkpoint, None) as server:
        asyncio.run(measure(server, args.rounds, args.window))


async def measure(server: servers.Running, rounds: int, window_s: float) -> None:
    """Measure everything, one after the other."""
    first_s = await first_frames(server)
    one, many = [], []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        one.append([await run(server, window_s, 16, viewers, 10, 0) for viewers in (0, 1)])
        many.append([await run(server, window_s, MANY, viewers, 5, DEAF if viewers else 0) for viewers in (0, MANY)])
    print("| what | | range |\n|---|---|---|")
    show("row-steps/s with 1 viewer at 10 fps / without", ratios(one))
    show(f"row-steps/s with {MANY} viewers at 5 fps, {DEAF} of which read nothing / without", ratios(many))
    show("frames/s received there", [pair[1].frames_per_s for pair in many])
    show("the latest frame there, behind its beat, s", [pair[1].late_s for pair in many])
    rss = [pair[1].rss_bytes for pair in many]
    print(f"| resident memory there, last round / first | **{rss[-1] / rss[0]:.3f}** | |")
    print(f"| from request to first frame, idle, every=1: median, worst of {len(first_s)} | "
          f"**{1000 * statistics.median(first_s):.0f}** ms, {1000 * max(first_s):.0f} ms | |")  # fmt: skip


def ratios(pairs: Sequence[Sequence[Window]]) -> list[float]:
    """Divide the rate with viewers by that without, round by round."""
    return [watched.row_steps_per_s / plain.row_steps_per_s for plain, watched in pairs]


def show(what: str, values: Sequence[float]) -> None:
    """One line of the table."""
    print(f"| {what} | **{statistics.median(values):.3f}** | {min(values):.3f} to {max(values):.3f} |")


async def first_frames(server: servers.Running) -> list[float]:
    """Seconds from sending a spec to having its first picture, on an idle server."""
    took = []
    async with open_stream(server) as ws:
        for seed in range(IDLE_REQUESTS):
            began_s = time.perf_counter()
            frames = pictures(ws, Ask(n=1, steps=20).to_body(seed) | {"every": 1, "keep_open": True})
            first_s, *_ = [at_s async for at_s in frames]
            took.append(first_s - began_s)
    return took


async def pictures(ws: ClientConnection, body: dict[str, Any]) -> AsyncIterator[float]:
    """Run a job; gives the time at which each of its frames came."""
    await ws.send(json.dumps(body))
    async for message in ws:
        if isinstance(message, bytes):
            yield time.perf_counter()
        elif json.loads(message)["type"] == "done":
            await ws.recv()
            return


async def run(server: servers.Running, window_s: float, jobs: int, viewers: int, fps: float, deaf: int) -> Window:
    """A window of so many jobs at once, so many of them with a viewer. All are given up at its end."""
    seen = [Seen() for _ in range(viewers - deaf)]
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=httpx.Limits(max_connections=None)) as http:
        tasks = [asyncio.ensure_future(ask_again(http, number)) for number in range(jobs - viewers)]
        tasks += [asyncio.ensure_future(watch(server, fps, each)) for each in seen]
        tasks += [asyncio.ensure_future(connect_and_sleep(server, fps)) for _ in range(deaf)]
        try:
            await asyncio.sleep(WARM_UP_S)
            for each in seen:
                each.gaps_s.clear()
                each.frames = 0
            counted, took_s = await server.count(http, window_s)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # The jobs are another process's.
        while (await http.get("/jobs")).json()["jobs"]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return Window(
        row_steps_per_s=counted.row_steps / took_s,
        rss_bytes=counted.rss_bytes or 0.0,
        late_s=max((gap for each in seen for gap in each.gaps_s), default=0.0) - 1 / fps,
        frames_per_s=sum(each.frames for each in seen) / took_s,
    )


async def ask_again(http: httpx.AsyncClient, number: int, job: Ask = JOB) -> None:
    """A client that only waits, for one job after the other."""
    for seed in itertools.count():
        (await http.post("/sample", json=job.to_body(1000 * number + seed))).raise_for_status()


async def watch(server: servers.Running, fps: float, seen: Seen) -> None:
    """A viewer of one job after the other."""
    async with open_stream(server) as ws:
        for seed in itertools.count():
            last_s = None
            async for now_s in pictures(ws, body_of(fps, seed)):
                seen.frames += 1
                if last_s is not None:
                    seen.gaps_s.append(now_s - last_s)
                last_s = now_s


async def connect_and_sleep(server: servers.Running, fps: float) -> None:
    """A viewer that reads nothing after its job was accepted."""
    async with open_stream(server, max_queue=1) as ws:
        await ws.send(json.dumps(body_of(fps, 0)))
        await asyncio.sleep(1_000_000)


def body_of(fps: float, seed: int) -> dict[str, Any]:
    """A job that is watched."""
    return JOB.to_body(seed) | {"fps": fps, "show": ["x_t", "x_0"], "keep_open": True}


@asynccontextmanager
async def open_stream(server: servers.Running, **options: Any) -> AsyncIterator[ClientConnection]:
    """A WebSocket; one that is cut off in mid-job is left without a word."""
    url = f"{server.url.replace('http', 'ws')}/sample/stream"
    ws = await connect(url, ping_interval=None, proxy=None, compression=None, **options)
    try:
        yield ws
    finally:
        with suppress(Exception):
            ws.transport.abort()


if __name__ == "__main__":
    main()
