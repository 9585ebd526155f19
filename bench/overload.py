"""More work than the machine can do: is it kept busy, and does everybody who comes back when told get in?

    python -m bench.overload [--seconds 20] [--herd 300]

First the peak: as many clients as keep every place filled. Then strangers who ask once and never return, at 1.5 and 5
times that rate; then a herd that asks at one moment and does as Retry-After says; then a crowd that leaves, and one who
comes when the backlog allows. Each figure beside what is to be reached.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import httpx

from bench import machine, servers

SPEC = {"n": 8, "steps": 20, "sampler": "ddim"}
PLACES = SPEC["n"] * SPEC["steps"]  # type: ignore[operator]
BACKLOG_S = 5.0
FLAGS = ("--max-backlog-s", str(BACKLOG_S), "--max-jobs", "1024", "--result-cache-mb", "0")
WARM_UP_S = 3.0
CLIENTS = 16  # that keep every place filled
LOADS = (1.5, 5.0)
CROWD = 100


def main() -> None:
    """Measure and print; exit with 1 where a figure is not reached."""
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=servers.ROOT / "checkpoints" / "fashion-mnist-32")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--herd", type=int, default=300)
    args = parser.parse_args()
    tminus = servers.contenders(machine.cores(), FLAGS)["tminus"]
    with servers.running(tminus, args.checkpoint, None) as server:
        os.nice(10)  # the clients are not the server's cost, and share its cores here only
        sys.exit(asyncio.run(measure(server.url, args.seconds, args.herd)))


async def measure(url: str, seconds: float, herd: int) -> int:
    """All four; the exit code."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        peak = await saturate(http, seconds)
        print(f"peak {peak:,.0f} row-steps/s; backlog limit {BACKLOG_S:g} s; each request {PLACES} row-steps\n")
        print("| what | reached | to reach |\n|---|---|---|")
        reached = []
        for load in LOADS:
            done, refused = await flood(http, load * peak / PLACES, seconds)
            after = await saturate(http, seconds)  # the machine may be faster or slower by now
            share, peak = 2 * done / (peak + after), after
            reached.append(share >= 0.95)
            what = f"goodput at {load:g} x, none returns ({refused:.0%} refused), / peak before and after"
            print(f"| {what} | **{share:.3f}** | 0.95 |")
        took_s, tries = await stampede(http, herd)
        ideal_s = herd * PLACES / peak
        reached += [took_s <= 1.3 * ideal_s, statistics.median(tries) <= 3]
        print(f"| a herd of {herd} that does as told, / ideal of {ideal_s:.1f} s | **{took_s / ideal_s:.3f}** | 1.3 |")
        print(f"| its tries: median, most | **{statistics.median(tries):g}**, {max(tries)} | 3 |")
        status, waited_s = await newcomer(http)
        reached.append(status == 200)
        print(
            f"| one who comes when the backlog allows, {waited_s:.1f} s after a crowd that left | **{status}** | 200 |"
        )
    return int(not all(reached))


class Answer(NamedTuple):
    """What one request got."""

    status: int
    wait_s: int  # the Retry-After of a refusal; 0 where there is none
    body: bytes


async def ask(http: httpx.AsyncClient) -> Answer:
    """One request on a connection of its own.

    Without httpx, whose own work would take from the server's cores what the figure is about.
    """
    reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    try:
        target = f"/sample?seed={random.getrandbits(32)}&" + "&".join(f"{name}={value}" for name, value in SPEC.items())
        writer.write(f"POST {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").lower()
        body = await reader.read()
    finally:
        writer.close()
    wait_s = int(head.partition("\nretry-after: ")[2].split()[0] if "\nretry-after: " in head else 0)
    return Answer(int(head.split()[1]), wait_s, body)


async def row_steps(http: httpx.AsyncClient) -> float:
    """All that were done so far."""
    return await metric(http, "tminus_row_steps_total")


async def metric(http: httpx.AsyncClient, name: str) -> float:
    """The sum over labels of one metric."""
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)


async def rate(http: httpx.AsyncClient, seconds: float) -> float:
    """Row-steps a second from now on, after a warm-up."""
    await asyncio.sleep(WARM_UP_S)
    before, began = await row_steps(http), time.perf_counter()
    await asyncio.sleep(seconds - WARM_UP_S)
    return (await row_steps(http) - before) / (time.perf_counter() - began)


async def saturate(http: httpx.AsyncClient, seconds: float) -> float:
    """The peak: each client asks again as soon as it has its answer."""

    async def keep_asking() -> None:
        while True:
            answer = await ask(http)
            assert answer.status == 200, answer

    clients = [asyncio.create_task(keep_asking()) for _ in range(CLIENTS)]
    peak = await rate(http, seconds)
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    await backlog_below(http, 0.0)
    return peak


async def flood(http: httpx.AsyncClient, per_s: float, seconds: float) -> tuple[float, float]:
    """Strangers at random moments, each of whom asks once; row-steps a second, and the share that was refused."""
    rng = random.Random(1)
    asked: list[asyncio.Task[Answer]] = []

    async def arrive() -> None:
        due_s = time.perf_counter()
        while True:
            due_s += rng.expovariate(per_s)
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            asked.append(asyncio.create_task(ask(http)))

    arriving = asyncio.create_task(arrive())
    reached = await rate(http, seconds)
    arriving.cancel()
    statuses = [answer.status for answer in await asyncio.gather(*asked)]
    assert set(statuses) <= {200, 429}, sorted(set(statuses))
    await backlog_below(http, 0.0)
    return reached, statuses.count(429) / len(statuses)


async def stampede(http: httpx.AsyncClient, herd: int) -> tuple[float, list[int]]:
    """All at one moment, each again when it was told to: seconds until the last has its answer, and tries of each."""

    async def persist() -> int:
        tries = 1
        while True:
            answer = await ask(http)
            if answer.status != 429:
                break
            await asyncio.sleep(answer.wait_s)
            tries += 1
        assert answer.status == 200, answer
        return tries

    began = time.perf_counter()
    tries = await asyncio.gather(*(persist() for _ in range(herd)))
    return time.perf_counter() - began, tries


async def newcomer(http: httpx.AsyncClient) -> tuple[int, float]:
    """After a crowd that does not come back, one who comes when the backlog has room: its status, and when that was."""
    crowd = [asyncio.create_task(ask(http)) for _ in range(CROWD)]
    await asyncio.sleep(1.0)
    began = time.perf_counter()
    await backlog_below(http, 0.9 * BACKLOG_S)
    waited_s = time.perf_counter() - began
    answer = await ask(http)
    await asyncio.gather(*crowd)
    return answer.status, waited_s


async def backlog_below(http: httpx.AsyncClient, seconds: float) -> None:
    """Wait until no more than so much is left to do."""
    while await metric(http, "tminus_backlog_seconds") > seconds:  # noqa: ASYNC110  it is another process's
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    main()
