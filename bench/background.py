"""What background jobs cost others, and what they lose themselves: short requests without and with them, on one server.

    python -m bench.background [--checkpoint FOLDER] [--rounds 3] [--window 60] [--per_s 3]

Short requests of one image and 20 steps come at random, at the same moments without and with background jobs. Then the
row-steps per second of jobs of 1000 steps: background jobs that nobody else came beside for a minute, and others.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from bench import arrivals, servers
from bench.client import drive
from bench.figures import quantile
from bench.loads import SHORT
from bench.records import Ask
from bench.streams import WARM_UP_S, show
from tminus.service.scheduling.scheduler import QUIET_S

JOBS, LONG = 4, Ask(n=8, steps=1000)
DRAIN_S = 120.0


def main() -> None:
    """Measure and print."""
    args = servers.options_of(__doc__, checkpoint=servers.CHECKPOINT, rounds=3, window=60.0, per_s=3.0)
    tminus = servers.contenders(1)["tminus"]
    with servers.running(tminus, args.checkpoint, None) as server:
        asyncio.run(measure(server, args.rounds, args.window, args.per_s))


async def measure(server: servers.Running, rounds: int, window_s: float, per_s: float) -> None:
    """Run the four loads in turns."""
    waits: dict[bool, list[list[float]]] = {False: [], True: []}  # by round, without background jobs and with them
    rates: dict[bool, list[float]] = {False: [], True: []}  # of other jobs, and of background jobs
    beside: list[float] = []
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=httpx.Limits(max_connections=None)) as http:
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", flush=True)
            await asyncio.sleep(QUIET_S if number else 0.0)
            for background in (True, False):
                async with long_jobs(http, background=background):
                    await asyncio.sleep(WARM_UP_S)
                    counted, took_s = await server.count(http, window_s / 4)
                rates[background].append(counted.row_steps / took_s)
            comers = arrivals.poisson([SHORT] * round(per_s * window_s), window_s, seed=number)
            for background in (False, True):
                async with long_jobs(http, background=True, jobs=JOBS if background else 0):
                    await asyncio.sleep(WARM_UP_S)
                    before, before_s = await server.read_at(http)
                    answers = await drive(http, comers, drain_s=DRAIN_S)
                    after, after_s = await server.read_at(http)
                assert all(answer.outcome == "ok" for answer in answers)
                waits[background].append([answer.waited_s for answer in answers])
                if background:
                    own = sum(answer.row_steps for answer in answers)
                    beside.append((after.since(before).row_steps - own) / (after_s - before_s))
    print("| what | | range |\n|---|---|---|")
    for name, share in (("median", 0.5), ("99th percentile", 0.99)):
        without, with_ = ([quantile(each, share) for each in waits[background]] for background in (False, True))
        show(f"a short request, {name}, with background jobs / without", _ratios(with_, without))
        show(f"a short request, {name}, with background jobs, s", with_)
        show(f"a short request, {name}, without, s", without)
    show("row-steps/s, background jobs alone / other jobs alone", _ratios(rates[True], rates[False]))
    show("row-steps/s, background jobs alone", rates[True])
    show("row-steps/s, background jobs beside the short requests", beside)


def _ratios(some: list[float], others: list[float]) -> list[float]:
    return [one / other for one, other in zip(some, others, strict=True)]


@asynccontextmanager
async def long_jobs(http: httpx.AsyncClient, *, background: bool, jobs: int = JOBS) -> AsyncIterator[None]:
    """Have some durable jobs of many steps run meanwhile."""
    body = LONG.to_body(0) | {"background": background}
    answers = await asyncio.gather(*(http.post("/jobs", json=body | {"seed": k}) for k in range(jobs)))
    ids = [answer.raise_for_status().json()["id"] for answer in answers]
    try:
        yield
    finally:
        for job_id in 2 * ids:  # cancelled, and forgotten
            await http.delete(f"/jobs/{job_id}")
        while (await http.get("/jobs?state=waiting,running")).json()["jobs"]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    main()
