"""Five times the load that the machine can do, for two minutes: is each refusal right, and how soon is it over?

    .venv/bin/python -m tests.trials.overload [--seconds 120] [--load 5]

Twice: by clients who ask once and never return, and by clients who come back when Retry-After says, for as long as
the flood lasts. A probe reads the backlog and the steps done ten times a second. Then a herd asks at one moment and
does as Retry-After says, and a crowd leaves before one client comes when the backlog allows it.

When there was room for a client that was refused: when the server had done, by its own count of steps, what the
backlog was over the limit with this job, and the jobs of all who had been told a time before and whose time was still
to come. Room is not kept for them, but a time that did not count them would be the same for all, and they would come
as a herd. A time is told in whole seconds, and none is told beyond five minutes.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import httpx

from bench import servers
from tests.trials.claims import Claim, least, most, none, report

SPEC = {"n": 8, "steps": 20, "sampler": "ddim"}
PLACES = SPEC["n"] * SPEC["steps"]  # type: ignore[operator]
BACKLOG_S = 5.0
FLAGS = ("--max-backlog-s", str(BACKLOG_S), "--result-cache-mb", "0")
WARM_UP_S = 3.0
CLIENTS = 16  # that keep every place filled
LOAD = 5.0
HERD, CROWD = 300, 100
PROBE_S = 0.1
READ = ("tminus_backlog_seconds", "tminus_row_steps_total")
NEAR_S = 0.3  # what the probe read so shortly before or after a refusal counts for it
SLACK = 0.95  # of the limit: between a refusal and the probe's look at it, some work is done
FACTOR = 1.5
UNIT_S = 1.0  # of Retry-After
LONGEST_S = 300.0  # that is told
RECOVERY_S = 5.0
NEWCOMERS_S = 0.2  # between one newcomer and the next, once the flood is over


class Answer(NamedTuple):
    """What one request got."""

    status: int
    wait_s: int  # the Retry-After of a refusal; 0 where there is none
    body: bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """A 429, by the client's clock."""

    sent_s: float
    at_s: float  # when it came
    wait_s: int
    value_s: float  # what the backlog would have been with the job, as the refusal says


@dataclass(frozen=True, slots=True)
class Look:
    """What the probe read, by the same clock."""

    at_s: float
    backlog_s: float
    row_steps: float


@dataclass
class Flood:
    """What came of one flood."""

    refusals: list[Refusal] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    accepted: int = 0
    other: list[str] = field(default_factory=list)  # answers that are neither
    row_steps_per_s: float = 0.0
    let_in_s: float = 0.0  # from the end of the flood to the first newcomer who is not refused
    idle_s: float = 0.0  # until nothing is left to do


# --- judging, which is pure ---


def right_waits(refusals: Sequence[Refusal], looks: Sequence[Look], job_s: float) -> list[float]:
    """For each refusal, in order of time, when there was room in the sense of this module, as seconds from then.

    job_s: how long one such job takes the server. After the last look the pace is that between first and last.
    """
    first, last = looks[0], looks[-1]
    per_s = (last.row_steps - first.row_steps) / (last.at_s - first.at_s)
    due_s: list[float] = []  # of those who were told a time
    found = []
    for refusal in refusals:
        ahead = sum(due > refusal.at_s for due in due_s)
        needed = (max(0.0, refusal.value_s - BACKLOG_S) + job_s * ahead) * per_s
        done_s = at_work(looks, work_at(looks, refusal.at_s) + needed, per_s)
        found.append(done_s - refusal.at_s)
        due_s.append(refusal.at_s + refusal.wait_s)
    return found


def work_at(looks: Sequence[Look], at_s: float) -> float:
    """The row-steps that were done by a time between two looks."""
    after = min(max(1, bisect_left(looks, at_s, key=lambda look: look.at_s)), len(looks) - 1)
    one, two = looks[after - 1], looks[after]
    share = (at_s - one.at_s) / (two.at_s - one.at_s)
    return one.row_steps + min(1.0, max(0.0, share)) * (two.row_steps - one.row_steps)


def at_work(looks: Sequence[Look], row_steps: float, per_s: float) -> float:
    """The first time when so many row-steps were done, or will have been at this pace."""
    after = bisect_left(looks, row_steps, key=lambda look: look.row_steps)
    if after == len(looks):
        return looks[-1].at_s + (row_steps - looks[-1].row_steps) / per_s
    if after == 0:
        return looks[0].at_s
    one, two = looks[after - 1], looks[after]
    return one.at_s + (row_steps - one.row_steps) / (two.row_steps - one.row_steps) * (two.at_s - one.at_s)


def is_wrong(refusal: Refusal, right_s: float) -> bool:
    """Whether a time to come back is off by more than FACTOR, whole seconds being the unit."""
    if right_s > LONGEST_S / FACTOR:  # near the end of the line, beyond which all are spread over its time
        return refusal.wait_s > FACTOR * LONGEST_S
    return refusal.wait_s > FACTOR * right_s + UNIT_S or right_s > FACTOR * refusal.wait_s


def under_the_limit(refusals: Sequence[Refusal], looks: Sequence[Look], job_s: float) -> list[Refusal]:
    """The refusals at whose time there was room, by what they say themselves or by what the probe read."""
    found = []
    for refusal in refusals:
        near = [look.backlog_s for look in looks if refusal.sent_s - NEAR_S <= look.at_s <= refusal.at_s + NEAR_S]
        if refusal.value_s < BACKLOG_S - 0.05 or (near and max(near) + job_s < SLACK * BACKLOG_S):  # told to 0.1 s
            found.append(refusal)
    return found


# --- clients ---


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


async def metric(http: httpx.AsyncClient, name: str) -> float:
    """The sum over labels of one metric."""
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)


async def rate(http: httpx.AsyncClient, seconds: float) -> float:
    """Row-steps a second from now on, after a warm-up."""
    await asyncio.sleep(WARM_UP_S)
    before, began = await metric(http, "tminus_row_steps_total"), time.perf_counter()
    await asyncio.sleep(seconds - WARM_UP_S)
    return (await metric(http, "tminus_row_steps_total") - before) / (time.perf_counter() - began)


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


# --- the flood ---


async def flood(http: httpx.AsyncClient, per_s: float, seconds: float, *, returning: bool, seed: int) -> Flood:
    """New clients at random moments, each of whom asks once, or comes back as told while the flood lasts."""
    found, draw, clock = Flood(), random.Random(seed), time.perf_counter
    ends_s = clock() + seconds

    async def client() -> None:
        while True:
            sent_s = clock()
            try:
                answer = await ask(http)
            except (OSError, asyncio.IncompleteReadError) as error:
                found.other.append(repr(error))
                return
            if answer.status == 200:
                found.accepted += 1
                return
            if answer.status != 429 or answer.wait_s < 1:
                found.other.append(f"{answer.status}, Retry-After {answer.wait_s}: {answer.body[:200]!r}")
                return
            problem = json.loads(answer.body)
            if problem["field"] != "backlog_s":
                found.other.append(f"refused for {problem['field']}")
                return
            refusal = Refusal(sent_s, clock(), answer.wait_s, float(problem["value"]))
            found.refusals.append(refusal)
            if not returning or refusal.at_s + refusal.wait_s >= ends_s:
                return
            await asyncio.sleep(refusal.wait_s)

    async def arrive() -> list[asyncio.Task[None]]:
        tasks, due_s = list[asyncio.Task[None]](), clock()
        while (due_s := due_s + draw.expovariate(per_s)) < ends_s:
            await asyncio.sleep(max(0.0, due_s - clock()))
            tasks.append(asyncio.create_task(client()))
        await asyncio.sleep(max(0.0, ends_s - clock()))
        return tasks

    probing = asyncio.create_task(probe(http, found.looks))
    tasks = await arrive()
    found.looks.append(await look(http))
    first, last = found.looks[len(found.looks) // 10], found.looks[-1]  # the first jobs need a moment to fill the ticks
    found.row_steps_per_s = (last.row_steps - first.row_steps) / (last.at_s - first.at_s)
    while True:
        came_s = clock()
        if (await ask(http)).status == 200:  # a refusal comes at once, so that this one was let in when it came
            break
        await asyncio.sleep(NEWCOMERS_S)
    found.let_in_s = came_s - ends_s
    await asyncio.gather(*tasks)
    while (await look(http)).backlog_s > 0:  # noqa: ASYNC110  it is another process's
        await asyncio.sleep(PROBE_S)
    found.idle_s = clock() - ends_s
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    return found


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


async def newcomer(http: httpx.AsyncClient) -> int:
    """The status of a client who comes when the backlog has room, after a crowd that does not come back."""
    crowd = [asyncio.create_task(ask(http)) for _ in range(CROWD)]
    await asyncio.sleep(1.0)
    await backlog_below(http, 0.9 * BACKLOG_S)
    answer = await ask(http)
    await asyncio.gather(*crowd)
    return answer.status


async def backlog_below(http: httpx.AsyncClient, seconds: float) -> None:
    """Wait until no more than so much is left to do."""
    while await metric(http, "tminus_backlog_seconds") > seconds:  # noqa: ASYNC110  it is another process's
        await asyncio.sleep(0.05)


async def look(http: httpx.AsyncClient) -> Look:
    asked_s = time.perf_counter()
    lines = (await http.get("/metrics")).text.splitlines()
    at_s = (asked_s + time.perf_counter()) / 2
    values = {name: sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)) for name in READ}
    return Look(at_s, *values.values())


async def probe(http: httpx.AsyncClient, looks: list[Look]) -> None:
    while True:
        looks.append(await look(http))
        await asyncio.sleep(PROBE_S)


async def watched_peak(http: httpx.AsyncClient, seconds: float) -> float:
    """The peak beside the same probe as the floods, which is not a part of the load and takes from the same cores."""
    probing = asyncio.create_task(probe(http, []))
    try:
        return await saturate(http, seconds)
    finally:
        probing.cancel()
        await asyncio.gather(probing, return_exceptions=True)


def judge(found: Flood, peak: float, who: str) -> list[Claim]:
    """The claims of one flood; peak: row-steps a second before and after it."""
    refusals = sorted(found.refusals, key=lambda refusal: refusal.at_s)
    job_s = PLACES / found.row_steps_per_s
    right = right_waits(refusals, found.looks, job_s)
    wrong = [(refusal, right_s) for refusal, right_s in zip(refusals, right, strict=True) if is_wrong(refusal, right_s)]
    for refusal, right_s in wrong[:10]:
        print(f"{who}: told {refusal.wait_s} s, there was room after {right_s:.1f} s")
    print(*found.other[:10], sep="\n")
    total = len(refusals) + found.accepted + len(found.other)
    told = [
        refusal.wait_s / right_s
        for refusal, right_s in zip(refusals, right, strict=True)
        if UNIT_S < right_s < LONGEST_S / FACTOR
    ]
    middle = f"; told over right, median {sorted(told)[len(told) // 2]:.2f}" if told else ""
    print(f"{who}: {total:,} answers, {len(refusals):,} of them refusals{middle}")
    return [
        none(f"{who}: answers that are neither 200 nor 429 with a Retry-After", len(found.other), total),
        none(f"{who}: refusals under the limit", len(under_the_limit(refusals, found.looks, job_s)), len(refusals)),
        none(f"{who}: Retry-After not within {FACTOR} x of when there was room", len(wrong), len(refusals)),
        least(f"{who}: goodput / peak before and after", found.row_steps_per_s / peak, 0.95),
        most(f"{who}: from the end of the flood to a newcomer who is let in", found.let_in_s, RECOVERY_S, " s"),
        most(f"{who}: until all that was accepted is done", found.idle_s, 1.3 * BACKLOG_S, " s"),
    ]


async def trial(
    url: str, seconds: float, load: float, seed: int, peak_s: float = 20.0, herd: int = HERD
) -> list[Claim]:
    """Both floods, the herd and the newcomer; what was found."""
    claims: list[Claim] = []
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as http:
        peak = await watched_peak(http, peak_s)
        for returning, who in ((False, "none returns"), (True, "all return")):
            found = await flood(http, load * peak / PLACES, seconds, returning=returning, seed=seed)
            after = await watched_peak(http, peak_s)  # the machine may be faster or slower by now
            claims += judge(found, (peak + after) / 2, who)
            peak = after
        took_s, tries = await stampede(http, herd)
        claims += [
            most(f"a herd of {herd} that does as told: seconds / ideal", took_s * peak / (herd * PLACES), 1.3),
            most("its tries, median", statistics.median(tries), 3),
        ]
        claims.append(none("a client who comes when the backlog allows is refused", int(await newcomer(http) != 200)))
        assert await metric(http, "tminus_rows_active") == 0
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=servers.ROOT / "checkpoints" / "fashion-mnist-32")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each flood")
    parser.add_argument("--load", type=float, default=LOAD, help="times the peak")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    tminus = replace(servers.contenders(servers.cores(), FLAGS)["tminus"], env={})  # with the default of jobs
    with servers.running(tminus, asked.checkpoint, None) as server:
        os.nice(10)  # the clients are not the server's cost, and share its cores here only
        sys.exit(report(asyncio.run(trial(server.url, asked.seconds, asked.load, asked.seed))))


if __name__ == "__main__":
    main()
