"""Half an hour at 0.9 of what the machine can do, with clients of every kind: does anything grow, slow down or fail?

    .venv/bin/python -m tests.trials.soak [--minutes 30] [--load 0.9]

First the peak, on the same mix: so many clients that every place is filled, each of whom asks again as soon as it is
done. Then as many clients a second as 0.9 of the peak, at random moments that a seed fixes. The moments and what is
asked repeat every sixth of the time, so that first and last part are the same load and their latencies can be
compared: the median of POST and GET /sample, from when a request was due to its last byte. Memory is the server's
resident set as /metrics tells it, every two seconds; its median in the second part, when all is warm, against that in
the last.
"""

import asyncio
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from bench import servers
from bench.figures import quantile
from tests.trials import clients
from tests.trials.claims import Claim, least, most, none
from tests.trials.clients import ROW_STEPS, ask, backlog_below, connection, metrics, saturated

PARTS = 6
LOAD, SHORT = 0.9, 0.1
CLIENTS = 24  # that keep every place filled, though some of them read slowly
PEAK_S, WARM_UP_S = 60.0, 5.0
READ_S = 2.0  # between two looks at memory
PATIENCE_S = 120.0  # of a stream
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


Client = Callable[["Mix", random.Random], Awaitable[None]]


class Mix:
    """The clients of one server, by kind. A client comes, does what its kind does, and goes."""

    def __init__(self, url: str, seen: Seen) -> None:
        self.url, self.seen = url, seen

    async def exchange(
        self, kind: str, method: str, target: str, expected: Sequence[int], body: bytes = b"", **headers: str
    ) -> bytes:
        """One request; an answer of another status than expected is noted as wrong. Returns the answer's body."""
        answer = await ask(self.url, method, target, body, **headers)
        self.seen.statuses[answer.status] += 1
        if answer.status not in expected:
            self.seen.wrong.append(f"{kind}: {answer.status} {answer.body[:200]!r}")
        return answer.body

    async def sample(self, draw: random.Random) -> None:
        body = json.dumps(spec_of(draw)).encode()
        await self.exchange("sample", "POST", "/sample", (200,), body, Accept=draw.choice(MEDIA))

    async def get(self, draw: random.Random) -> None:
        target = f"/sample?n=1&steps={draw.choice((5, 20))}&seed={draw.getrandbits(32)}"
        await self.exchange("get", "GET", target, (200,))

    async def hang_up(self, draw: random.Random) -> None:
        """Ask for much, and leave before it is there, in the middle of the request or after it."""
        body = json.dumps(spec_of(draw) | {"n": 4, "steps": 200}).encode()
        data = b"POST /sample HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        _, writer = await connection(self.url)
        try:
            writer.write(data[: draw.choice((len(data), len(data), draw.randrange(len(data))))])
            await asyncio.sleep(draw.uniform(0, 0.4))
        finally:
            writer.transport.abort()

    async def _stream(self, draw: random.Random, every: int, pause_s: float = 0.0, *, cancel: bool = False) -> str:
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

    async def _stream_until(self, kind: str, draw: random.Random, ends: Sequence[str], **how: Any) -> None:
        if (last := await self._stream(draw, **how)) not in ends:
            self.seen.wrong.append(f"{kind}: {last}")

    async def stream(self, draw: random.Random) -> None:
        await self._stream_until("stream", draw, ("done",), every=5)

    async def slow_reader(self, draw: random.Random) -> None:
        await self._stream_until("slow reader", draw, ("done",), every=1, pause_s=draw.uniform(0.05, 0.3))

    async def cancel(self, draw: random.Random) -> None:
        await self._stream_until("cancel", draw, ("cancelled", "done", "error"), every=5, cancel=True)

    async def durable(self, draw: random.Random) -> None:
        """A job, its events to the end, its image; half of them are deleted."""
        key, body = draw.randbytes(16).hex(), json.dumps(spec_of(draw)).encode()
        path = await self._submitted("durable", body, Idempotency_Key=key)
        await self.exchange("events", "GET", f"{path}/events?every=5", (200, 204))
        await self.exchange("image", "GET", f"{path}/image", (200,))
        if draw.random() < 0.5:
            await self.exchange("delete", "DELETE", path, (204,))

    async def deleted(self, draw: random.Random) -> None:
        """A long job that is cancelled on its way."""
        path = await self._submitted("deleted", json.dumps(spec_of(draw) | {"steps": 1000}).encode())
        await asyncio.sleep(draw.uniform(0, 0.5))
        await self.exchange("cancel of a job", "POST", f"{path}/cancel", (200,))
        await self.exchange("delete", "DELETE", path, (204,))

    async def _submitted(self, kind: str, body: bytes, **headers: str) -> str:
        """The path of a durable job that was accepted."""
        job = json.loads(await self.exchange(kind, "POST", "/jobs", (202,), body, **headers))
        return f"/jobs/{job['id']}"

    async def bad(self, draw: random.Random) -> None:
        method, target, body = draw.choice(BAD)
        await self.exchange("bad", method, target, range(400, 500), body)

    async def come(self, kind: str, draw: random.Random) -> None:
        """One client; what it raises is wrong, and noted."""
        self.seen.counts[kind] += 1
        try:
            await KINDS[kind][1](self, draw)
        except (OSError, asyncio.IncompleteReadError, WebSocketException, ValueError, KeyError) as error:
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


async def peak(url: str, seconds: float, seed: int) -> tuple[float, float, Seen]:
    """Clients and row-steps a second, with every place filled."""
    mix, came, began_s = Mix(url, Seen()), list[float](), time.perf_counter()

    async def client(draw: random.Random) -> None:
        came.append(time.perf_counter() - began_s)
        await mix.come(kind_of(draw), draw)

    comers = [partial(client, random.Random(f"{seed} peak {number}")) for number in range(CLIENTS)]
    row_steps_per_s = await saturated(url, comers, seconds, WARM_UP_S)
    counted = sum(WARM_UP_S <= at_s < WARM_UP_S + seconds for at_s in came)
    return counted / seconds, row_steps_per_s, mix.seen


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


async def trial(url: str, minutes: float, load: float, seed: int, peak_s: float | None = None) -> list[Claim]:
    """Run it; what was found. peak_s: how long the peak is measured for, a sixth of the time unless it is given."""
    part_s = 60 * minutes / PARTS
    memory: list[tuple[float, float]] = []
    clients_per_s, row_steps_per_s, at_peak = await peak(url, peak_s or min(PEAK_S, part_s), seed)
    print(f"peak of this mix: {clients_per_s:.1f} clients/s, {row_steps_per_s:,.0f} row-steps/s", flush=True)
    await backlog_below(url, 0.0)
    mix = Mix(url, Seen())
    began_s, before = time.perf_counter(), await metrics(url)

    async def watch() -> None:
        while True:
            memory.append((time.perf_counter() - began_s, (await metrics(url))["process_resident_memory_bytes"]))
            await asyncio.sleep(min(READ_S, part_s / 5))

    watching = asyncio.create_task(watch())
    await drive(mix, part_of(load * clients_per_s, part_s, seed), part_s)
    took_s, after = time.perf_counter() - began_s, await metrics(url)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    seen = mix.seen
    reached_load = (after[ROW_STEPS] - before[ROW_STEPS]) / took_s / row_steps_per_s
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


if __name__ == "__main__":
    clients.run_on_server(
        trial, FLAGS, servers.options_of(__doc__, checkpoint=servers.CHECKPOINT, minutes=30.0, load=LOAD, seed=0)
    )
