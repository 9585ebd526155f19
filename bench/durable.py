"""What durability costs: jobs of 1000 steps by POST /sample and by POST /jobs, in turns on one server.

    python -m bench.durable [--checkpoint FOLDER] [--rounds 5] [--window 10]

Durable jobs are snapshotted while they run; row-steps per second with that, over without, in one run.
"""

import asyncio
from typing import Any

import httpx

from bench import servers
from bench.records import Ask
from bench.streams import WARM_UP_S, ask_again, show

JOBS, ROWS = 20, 8


def main() -> None:
    """Measure and print."""
    args = servers.options_of(__doc__, checkpoint=servers.CHECKPOINT, rounds=5, window=10.0)
    tminus = servers.contenders(1)["tminus"]
    with servers.running(tminus, args.checkpoint, None) as server:
        asyncio.run(measure(server, args.rounds, args.window))


async def measure(server: servers.Running, rounds: int, window_s: float) -> None:
    """Windows in turns: plain, durable, plain, durable, …"""
    plain, durable, kept = [], [], []
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=httpx.Limits(max_connections=None)) as http:
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", flush=True)
            plain.append((await window(server, http, window_s, is_durable=False))[0])
            rate, snapshots = await window(server, http, window_s, is_durable=True)
            durable.append(rate)
            kept.append(snapshots / window_s)
    print("| what | | range |\n|---|---|---|")
    show("row-steps/s, durable / plain", [with_ / without for with_, without in zip(durable, plain, strict=True)])
    show("row-steps/s, durable", durable)
    show(f"snapshots/s, of one job of {ROWS} images each", kept)


async def window(
    server: servers.Running, http: httpx.AsyncClient, window_s: float, *, is_durable: bool
) -> tuple[float, float]:
    """Row-steps and snapshots per second, with JOBS jobs running all the time."""
    tasks: list[asyncio.Future[Any]] = []
    if is_durable:
        body = Ask(n=ROWS, steps=1000).to_body(0)
        answers = await asyncio.gather(*(http.post("/jobs", json=body | {"seed": k}) for k in range(JOBS)))
        ids = [answer.raise_for_status().json()["id"] for answer in answers]
    else:
        ids = []
        tasks = [asyncio.ensure_future(ask_again(http, k, Ask(n=ROWS, steps=1000))) for k in range(JOBS)]
    try:
        await asyncio.sleep(WARM_UP_S)
        before = await snapshots_of(http)
        counted, took_s = await server.count(http, window_s)
        snapshots = await snapshots_of(http) - before
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job_id in 2 * ids:  # cancelled, and forgotten
            await http.delete(f"/jobs/{job_id}")
    while (await http.get("/jobs?state=waiting,running")).json()["jobs"]:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    return counted.row_steps / took_s, snapshots


async def snapshots_of(http: httpx.AsyncClient) -> float:
    """How many the server has made."""
    return servers.sum_metrics((await http.get("/metrics")).text)["tminus_snapshots_total"]


if __name__ == "__main__":
    main()
