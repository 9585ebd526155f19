"""Half an hour at 0.9 of what the machine can do, with clients of every kind: does anything grow, slow down or fail?

    .venv/bin/python -m tests.trials.soak [--minutes 30] [--load 0.9]

First the peak, on the same mix: so many clients that every place is filled, each of whom asks again as soon as it is
done. Then as many clients a second as 0.9 of the peak, at random moments that a seed fixes. The moments and what is
asked repeat every sixth of the time, so that first and last part are the same load and their latencies can be
compared: the median of POST and GET /sample, from when a request was due to its last byte. Memory is the server's
resident set as /metrics tells it, every two seconds; its median in the second part, when all is warm, against that in
the last.
"""

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from bench import servers
from bench.figures import quantile
from tests.trials.claims import Claim, least, most, none, report

PARTS = 6
LOAD, SHORT = 0.9, 0.1
CLIENTS = 24  # that keep every place filled, though some of them read slowly
PEAK_S, WARM_UP_S = 60.0, 5.0
READ_S = 2.0  # between two looks at memory
PATIENCE_S = 120.0
FLAGS = ("--max-streams-per-address", "4096", "--result-cache-mb", "1", "--keep-jobs-s", "30")
MEDIA = ("image/png", "image/png", "application/zip", "application/json")
BAD: tuple[tuple[str, str, bytes], ...] = (
    ("POST", "/sample?steps=0", b""),
    ("POST", "/sample?n=100000", b""),
    ("POST", "/sample?colour=red", b""),
    ("POST", "/sample", b'{"n": 1,'),
    ("POST", "/sample", b'{"guidance": 1e999}'),
    ("POST", "/sample", b"[" * 5000),
    ("POST", "/jobs", b'{"image": "iVBORw0KGgo="}'),
    ("POST", "/noise?t=5", b"no picture"),
    ("POST", "/noise?t=100000", b""),
    ("GET", "/jobs/none", b""),
    ("DELETE", "/jobs/none", b""),
    ("GET", "/nowhere", b""),
    ("PUT", "/sample", b""),
)


@dataclass
class Seen:
    """What the clients got."""

    counts: Counter[str] = field(default_factory=Counter)  # by kind
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)  # of samples: when due, seconds to the last byte

    def status(self, kind: str, status: int, expected: Sequence[int], body: bytes = b"") -> None:
        """Note the status of an answer; one that is not expected is wrong."""
        self.statuses[status] += 1
        if status not in expected:
            self.wrong.append(f"{kind}: {status} {body[:200]!r}")


Client = Callable[["Mix", random.Random], Awaitable[None]]


class Mix:
    """The clients of one server, by kind. A client comes, does what its kind does, and goes."""

    def __init__(self, url: str, seen: Seen) -> None:
        self.url, self.seen = url, seen
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)

    async def exchange(self, method: str, target: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """One request on a connection of its own: status and body. httpx would take more of the server's cores."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            lines = [
                f"{method} {target} HTTP/1.1",
                "Host: localhost",
                "Connection: close",
                f"Content-Length: {len(body)}",
            ]
            lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode() + body)
            async with asyncio.timeout(PATIENCE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                return int(head.split()[1]), await reader.read()
        finally:
            writer.close()

    async def sample(self, draw: random.Random) -> None:
        spec = spec_of(draw)
        status, body = await self.exchange("POST", "/sample", json.dumps(spec).encode(), Accept=draw.choice(MEDIA))
        self.seen.status("sample", status, (200,), body)

    async def get(self, draw: random.Random) -> None:
        target = f"/sample?n=1&steps={draw.choice((5, 20))}&seed={draw.getrandbits(32)}"
        status, body = await self.exchange("GET", target)
        self.seen.status("get", status, (200,), body)

    async def hang_up(self, draw: random.Random) -> None:
        """Ask for much, and leave before it is there, in the middle of the request or after it."""
        body = json.dumps(spec_of(draw) | {"n": 4, "steps": 200}).encode()
        data = b"POST /sample HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        _, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(data[: draw.choice((len(data), len(data), draw.randrange(len(data))))])
            await asyncio.sleep(draw.uniform(0, 0.4))
        finally:
            writer.transport.abort()

    async def _stream(self, draw: random.Random, every: int, pause_s: float, cancel: bool) -> str:
        spec = spec_of(draw) | {
            "n": 2,
            "steps": draw.choice((20, 50)),
            "every": every,
            "show": draw.choice(("x_t", "x_0")),
        }
        last = "nothing"
        async with asyncio.timeout(PATIENCE_S), connect(f"{self.url.replace('http', 'ws')}/sample/stream") as ws:
            await ws.send(json.dumps(spec))
            if cancel:
                await asyncio.sleep(draw.uniform(0, 0.2))
                with suppress(ConnectionClosed):  # it was done before
                    await ws.send('{"type": "cancel"}')
            with suppress(ConnectionClosed):
                async for message in ws:
                    last = json.loads(message)["type"] if isinstance(message, str) else last
                    await asyncio.sleep(pause_s)
            if ws.close_code == 1011:
                self.seen.statuses[500] += 1
        return last

    async def stream(self, draw: random.Random) -> None:
        if (last := await self._stream(draw, every=5, pause_s=0, cancel=False)) != "done":
            self.seen.wrong.append(f"stream: {last}")

    async def slow_reader(self, draw: random.Random) -> None:
        if (last := await self._stream(draw, every=1, pause_s=draw.uniform(0.05, 0.3), cancel=False)) != "done":
            self.seen.wrong.append(f"slow reader: {last}")

    async def cancel(self, draw: random.Random) -> None:
        if (last := await self._stream(draw, every=5, pause_s=0, cancel=True)) not in ("cancelled", "done", "error"):
            self.seen.wrong.append(f"cancel: {last}")

    async def durable(self, draw: random.Random) -> None:
        """A job, its events to the end, its image; half of them are deleted."""
        key, body = draw.randbytes(16).hex(), json.dumps(spec_of(draw)).encode()
        status, answer = await self.exchange("POST", "/jobs", body, Idempotency_Key=key)
        self.seen.status("durable", status, (202,), answer)
        if status != 202:
            return
        path = f"/jobs/{json.loads(answer)['id']}"
        status, events = await self.exchange("GET", f"{path}/events?every=5")
        self.seen.status("events", status, (200, 204), events)
        status, answer = await self.exchange("GET", f"{path}/image")
        self.seen.status("image", status, (200,), answer)
        if draw.random() < 0.5:
            status, answer = await self.exchange("DELETE", path)
            self.seen.status("delete", status, (204,), answer)

    async def deleted(self, draw: random.Random) -> None:
        """A long job that is cancelled on its way."""
        status, answer = await self.exchange("POST", "/jobs", json.dumps(spec_of(draw) | {"steps": 1000}).encode())
        self.seen.status("deleted", status, (202,), answer)
        if status != 202:
            return
        path = f"/jobs/{json.loads(answer)['id']}"
        await asyncio.sleep(draw.uniform(0, 0.5))
        status, answer = await self.exchange("POST", f"{path}/cancel")
        self.seen.status("cancel of a job", status, (200,), answer)
        status, answer = await self.exchange("DELETE", path)
        self.seen.status("delete", status, (204,), answer)

    async def bad(self, draw: random.Random) -> None:
        method, target, body = draw.choice(BAD)
        status, answer = await self.exchange(method, target, body)
        self.seen.status("bad", status, range(400, 500), answer)

    async def come(self, kind: str, draw: random.Random) -> None:
        """One client; what it raises is wrong, and noted."""
        self.seen.counts[kind] += 1
        try:
            await KINDS[kind][1](self, draw)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, WebSocketException, ValueError) as error:
            self.seen.wrong.append(f"{kind}: {error!r}")


KINDS: dict[str, tuple[float, Client]] = {  # the share of the clients
    "sample": (0.50, Mix.sample),
    "get": (0.10, Mix.get),
    "hang_up": (0.08, Mix.hang_up),
    "stream": (0.08, Mix.stream),
    "slow_reader": (0.04, Mix.slow_reader),
    "cancel": (0.04, Mix.cancel),
    "durable": (0.06, Mix.durable),
    "deleted": (0.02, Mix.deleted),
    "bad": (0.08, Mix.bad),
}


def spec_of(draw: random.Random) -> dict[str, Any]:
    spec = {"n": draw.choice((1, 1, 2, 4)), "steps": draw.choice((5, 10, 20, 50)), "seed": draw.getrandbits(32)}
    return spec | {"sampler": draw.choice(("ddim", "ddpm", "dpmpp_2m"))}


def kind_of(draw: random.Random) -> str:
    return draw.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]


# --- the trial ---


async def read(http: httpx.AsyncClient) -> dict[str, float]:
    return servers.sum_metrics((await http.get("/metrics", headers={"Accept": "*/*"})).text)


async def peak(http: httpx.AsyncClient, url: str, seconds: float, seed: int) -> tuple[float, float, Seen]:
    """Clients and row-steps a second, with every place filled."""
    mix = Mix(url, Seen())

    async def keep_coming(number: int) -> None:
        draw = random.Random(f"{seed} peak {number}")
        while True:
            await mix.come(kind_of(draw), draw)

    tasks = [asyncio.create_task(keep_coming(number)) for number in range(CLIENTS)]
    await asyncio.sleep(WARM_UP_S)
    before, count, began_s = await read(http), mix.seen.counts.total(), time.perf_counter()
    await asyncio.sleep(seconds)
    after, took_s = await read(http), time.perf_counter() - began_s
    count = mix.seen.counts.total() - count
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    row_steps = after["tminus_row_steps_total"] - before["tminus_row_steps_total"]
    return count / took_s, row_steps / took_s, mix.seen


def part_of(per_s: float, seconds: float, seed: int) -> list[tuple[float, str, int]]:
    """The clients of one part: when each comes, its kind, and the seed of what it asks. A fixed number in all."""
    draw = random.Random(f"{seed} arrivals")
    times = sorted(draw.uniform(0, seconds) for _ in range(round(per_s * seconds)))
    return [(at_s, kind_of(draw), draw.getrandbits(32)) for at_s in times]


async def drive(mix: Mix, part: Sequence[tuple[float, str, int]], seconds: float) -> None:
    """All parts, one after the other: each client at its time, whatever has become of the others."""
    clock, tasks = time.perf_counter, set[asyncio.Task[None]]()

    async def client(due_s: float, kind: str, seed: int) -> None:
        await mix.come(kind, random.Random(seed))
        if kind in ("sample", "get"):
            mix.seen.waits.append((due_s - began_s, clock() - due_s))

    began_s = clock()
    for number in range(PARTS):
        for at_s, kind, seed in part:
            due_s = began_s + number * seconds + at_s
            await asyncio.sleep(max(0.0, due_s - clock()))
            # The seeds are other ones in each part, so that nothing is answered from memory.
            task = asyncio.create_task(client(due_s, kind, seed + number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def trial(url: str, minutes: float, load: float, seed: int, peak_s: float = PEAK_S) -> list[Claim]:
    """Run it; what was found."""
    part_s = 60 * minutes / PARTS
    memory: list[tuple[float, float]] = []
    limits = httpx.Limits(max_connections=4)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as http:
        clients_per_s, row_steps_per_s, at_peak = await peak(http, url, peak_s, seed)
        print(f"peak of this mix: {clients_per_s:.1f} clients/s, {row_steps_per_s:,.0f} row-steps/s", flush=True)
        while (await read(http))["tminus_backlog_seconds"] > 0:  # noqa: ASYNC110  it is another process's
            await asyncio.sleep(0.1)
        mix = Mix(url, Seen())
        began_s, before = time.perf_counter(), await read(http)

        async def watch() -> None:
            while True:
                memory.append((time.perf_counter() - began_s, (await read(http))["process_resident_memory_bytes"]))
                await asyncio.sleep(min(READ_S, part_s / 5))

        watching = asyncio.create_task(watch())
        await drive(mix, part_of(load * clients_per_s, part_s, seed), part_s)
        took_s, after = time.perf_counter() - began_s, await read(http)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    seen = mix.seen
    reached_load = (after["tminus_row_steps_total"] - before["tminus_row_steps_total"]) / took_s / row_steps_per_s
    print(", ".join(f"{count:,} {kind}" for kind, count in seen.counts.most_common()))
    print(*(at_peak.wrong + seen.wrong)[:20], sep="\n")

    def in_part(number: int, values: Sequence[tuple[float, float]]) -> list[float]:
        """NaN where there is none, as in a short trial on a slow machine."""
        return [value for at_s, value in values if number * part_s <= at_s < (number + 1) * part_s] or [math.nan]

    first, last = in_part(0, seen.waits), in_part(PARTS - 1, seen.waits)
    for name, q in (("median", 0.5), ("95th percentile", 0.95)):
        print(
            f"latency, {name}: "
            + ", ".join(f"{quantile(in_part(number, seen.waits), q):.3f} s" for number in range(PARTS))
        )
    print(
        "memory, median: "
        + ", ".join(f"{statistics.median(in_part(number, memory)) / 2**20:.1f} MiB" for number in range(PARTS))
    )
    growth = statistics.median(in_part(PARTS - 1, memory)) / statistics.median(in_part(1, memory)) - 1
    statuses = seen.statuses + at_peak.statuses
    return [
        none("answers of 5xx", sum(count for status, count in statuses.items() if status >= 500), statuses.total()),
        none("clients that got what they should not", len(seen.wrong + at_peak.wrong), seen.counts.total()),
        least("row-steps/s / those at the peak of this mix", reached_load, load - SHORT),
        most("resident memory, last part / second part, growth", 100 * growth, 2.0, " %"),
        most(
            "latency, last part / first part, median",
            statistics.median(last) / statistics.median(first),
            1.1,
            form=".3f",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=servers.ROOT / "checkpoints" / "fashion-mnist-32")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--load", type=float, default=LOAD, help="of the peak")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with servers.running(servers.contenders(servers.cores(), FLAGS)["tminus"], asked.checkpoint, None) as server:
        os.nice(10)  # the clients are not the server's cost, and share its cores here only
        peak_s = min(PEAK_S, 60 * asked.minutes / 6)
        sys.exit(report(asyncio.run(trial(server.url, asked.minutes, asked.load, asked.seed, peak_s))))


if __name__ == "__main__":
    main()
