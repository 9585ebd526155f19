"""One key floods, another asks for little: how much longer does the other wait?

    .venv/bin/python -m tests.trials.flood [--seconds 30] [--rounds 4]

A real server with two keys. One asks at random moments for a share of the machine that is well below its own half; the
other, every second round, for 20 times its half. Both ask anew at each moment, whatever was answered. To reach: the
first key's p99 beside the flood is at most 1.5 times its p99 alone, nothing of it is refused, the flood by 429
only.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.e2e.conftest import start_server, stop_server
from tests.service.keys import bearer, key_line

ROOT = Path(__file__).resolve().parents[2]
QUIET, FLOOD = "tm_of_the_quiet_key", "tm_of_the_flood"
FLOOD_SPEC = {"n": 8, "steps": 20, "sampler": "ddim"}
LOAD = 0.2  # of the machine, that the quiet key asks for
TIMES_ITS_SHARE = 20
REACH = 1.5
PEAK_S = 10.0


@dataclass
class Round:
    """What was answered in one round, to each key."""

    latencies_s: list[float] = field(default_factory=list)  # of the quiet key, from when the request was due
    quiet: Counter[int] = field(default_factory=Counter)  # statuses
    flood: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Trial:
    """What came of it."""

    alone: Round
    beside: Round
    peak: float  # row-steps a second
    goodput: float  # beside the flood

    @property
    def ratio(self) -> float:
        return p99(self.beside.latencies_s) / p99(self.alone.latencies_s)

    @property
    def wrong(self) -> list[str]:
        wrong = [f"p99 is {self.ratio:.2f} times what it is alone"] if self.ratio > REACH else []
        refused = (self.alone.quiet + self.beside.quiet).keys() - {200}
        wrong += [f"the quiet key got {sorted(refused)}"] if refused else []
        wrong += [f"the flood got {sorted(self.beside.flood)}"] if not {*self.beside.flood} <= {200, 429} else []
        return wrong + ([] if self.beside.flood[429] else ["the flood was no flood"])


def p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[-1]


async def ask(url: str, secret: str, spec: dict[str, Any]) -> int:
    """One request on a connection of its own. Without a library, whose work would take from the server's cores."""
    parts = urlsplit(url)
    body = json.dumps(spec | {"seed": random.getrandbits(32)})
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        head = f"POST /sample HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {secret}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        answer = await reader.read()
    finally:
        writer.close()
    return int(answer.split(b" ", 2)[1])


async def at_random(
    per_s: float, seconds: float, rng: random.Random, act: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Do something at random moments, whether or not the last is done; waits for all of it."""
    due_s, end_s = time.perf_counter(), time.perf_counter() + seconds
    async with asyncio.TaskGroup() as group:
        while (due_s := due_s + rng.expovariate(per_s)) < end_s:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            group.create_task(act())


async def row_steps(url: str) -> float:
    async with httpx.AsyncClient() as http:
        lines = (await http.get(f"{url}/metrics", headers=bearer(QUIET))).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("tminus_row_steps_total{"))


async def peak_of(url: str, seconds: float) -> float:
    """Row-steps a second when every place is filled."""
    end_s = time.perf_counter() + seconds

    async def keep_asking() -> None:
        while time.perf_counter() < end_s:
            await ask(url, FLOOD, FLOOD_SPEC)

    began_s, before = time.perf_counter(), await row_steps(url)
    await asyncio.gather(*(keep_asking() for _ in range(8)))
    return (await row_steps(url) - before) / (time.perf_counter() - began_s)


async def measure(url: str, seconds: float, rounds: int, spec: dict[str, Any]) -> Trial:
    """Rounds alone and beside the flood in turns, so that both see the machine alike."""
    rng, alone, beside = random.Random(1), Round(), Round()
    await peak_of(url, PEAK_S / 4)  # a warm-up
    peak = await peak_of(url, PEAK_S)
    goodput = []

    def quiet_asks(kept: Round) -> Callable[[], Coroutine[Any, Any, None]]:
        async def act() -> None:
            began_s = time.perf_counter()
            kept.quiet[await ask(url, QUIET, spec)] += 1
            kept.latencies_s.append(time.perf_counter() - began_s)

        return act

    async def flood() -> None:
        beside.flood[await ask(url, FLOOD, FLOOD_SPEC)] += 1

    per_s = LOAD * peak / (spec["n"] * spec["steps"])
    flood_per_s = TIMES_ITS_SHARE * peak / 2 / (FLOOD_SPEC["n"] * FLOOD_SPEC["steps"])  # type: ignore[operator]
    for number in count():
        if number == 2 * rounds:
            break
        if number % 2 == 0:
            await at_random(per_s, seconds, rng, quiet_asks(alone))
            continue
        flooding = asyncio.create_task(at_random(flood_per_s, seconds + 2, rng, flood))
        await asyncio.sleep(2)  # until it has what it can get
        began_s, before = time.perf_counter(), await row_steps(url)
        await at_random(per_s, seconds, rng, quiet_asks(beside))
        goodput.append((await row_steps(url) - before) / (time.perf_counter() - began_s))
        await flooding
    return Trial(alone, beside, peak, sum(goodput) / len(goodput))


def trial(checkpoint: Path, seconds: float, rounds: int, spec: dict[str, Any], *flags: str) -> Trial:
    lines = "\n".join((key_line("quiet", QUIET), key_line("flood", FLOOD)))
    server = start_server(checkpoint, "--result-cache-mb", "0", "--max-backlog-s", "10", *flags, TMINUS_KEYS=lines)
    try:
        return asyncio.run(measure(server.url, seconds, rounds, spec))
    finally:
        stop_server(server)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "fashion-mnist-32")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=4, help="alone, and as many beside the flood")
    asked = parser.parse_args()
    print("| the quiet key asks for | p50, p99 alone | p50, p99 beside the flood | p99 ratio | goodput / peak |")
    print("|---|---|---|---|---|")
    failed = False
    for n, steps in ((8, 20), (1, 50)):
        found = trial(asked.checkpoint, asked.seconds, asked.rounds, {"n": n, "steps": steps, "sampler": "ddim"})
        cells = [
            f"{1e3 * median(each.latencies_s):.0f}, {1e3 * p99(each.latencies_s):.0f} ms"
            for each in (found.alone, found.beside)
        ]
        goodput = f"{found.goodput / found.peak:.2f}"
        print(f"| {n} images of {steps} steps | {' | '.join(cells)} | **{found.ratio:.2f}** | {goodput} |")
        requests, flood = len(found.beside.latencies_s), dict(found.beside.flood)
        print(f"  {found.peak:.0f} row-steps/s at the peak; {requests} requests beside the flood of {flood}")
        print(*found.wrong, sep="\n", end="\n" if found.wrong else "")
        failed |= bool(found.wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
