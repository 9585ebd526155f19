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

import asyncio
import json
import random
import statistics
import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from bench import servers
from bench.client import meanwhile
from tests.trials import clients
from tests.trials.claims import Claim, least, most, none
from tests.trials.clients import BACKLOG, ROW_STEPS, Answer, backlog_below, metrics, saturated

SPEC = {"n": 8, "steps": 20, "sampler": "ddim"}
PLACES = SPEC["n"] * SPEC["steps"]  # type: ignore[operator]
BACKLOG_S = 5.0
FLAGS = ("--max-backlog-s", str(BACKLOG_S), "--result-cache-mb", "0")
WARM_UP_S = 3.0
CLIENTS = 16  # that keep every place filled
LOAD = 5.0
HERD, CROWD = 300, 100
PROBE_S = 0.1
NEAR_S = 0.3  # what the probe read so shortly before or after a refusal counts for it
SLACK = 0.95  # of the limit: between a refusal and the probe's look at it, some work is done
FACTOR = 1.5
UNIT_S = 1.0  # of Retry-After
LONGEST_S = 300.0  # that is told
RECOVERY_S = 5.0
NEWCOMERS_S = 0.2  # between one newcomer and the next, once the flood is over


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


async def ask(url: str) -> Answer:
    """Ask for one job of SPEC."""
    target = f"/sample?seed={random.getrandbits(32)}&" + "&".join(f"{name}={value}" for name, value in SPEC.items())
    return await clients.ask(url, "POST", target)


async def peak_beside_the_probe(url: str, seconds: float) -> float:
    """Row-steps a second at most, beside the probe of the floods, which takes from the same cores."""

    async def client() -> None:
        answer = await ask(url)
        assert answer.status in (200, 429), answer  # on a slow machine the clients of the peak are too many
        await asyncio.sleep(answer.wait_s)

    async with probing(url, []):
        peak = await saturated(url, [client] * CLIENTS, seconds - WARM_UP_S, WARM_UP_S)
    await backlog_below(url, 0.0)
    return peak


def probing(url: str, looks: list[Look]) -> AbstractAsyncContextManager[None]:
    """Look again and again, beside a block."""

    async def probe() -> None:
        while True:
            looks.append(await look(url))
            await asyncio.sleep(PROBE_S)

    return meanwhile(probe())


async def look(url: str) -> Look:
    asked_s = time.perf_counter()
    counted = await metrics(url)
    return Look((asked_s + time.perf_counter()) / 2, counted[BACKLOG], counted[ROW_STEPS])


# --- the flood ---


async def flood(url: str, per_s: float, seconds: float, *, returning: bool, seed: int) -> Flood:
    """New clients at random moments, each of whom asks once, or comes back as told while the flood lasts."""
    found, draw, clock = Flood(), random.Random(seed), time.perf_counter
    ends_s = clock() + seconds

    async def client() -> None:
        while True:
            sent_s = clock()
            try:
                answer = await ask(url)
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

    async with probing(url, found.looks), asyncio.TaskGroup() as group:
        due_s = clock()
        while (due_s := due_s + draw.expovariate(per_s)) < ends_s:
            await asyncio.sleep(max(0.0, due_s - clock()))
            group.create_task(client())
        await asyncio.sleep(max(0.0, ends_s - clock()))
        found.looks.append(await look(url))
        # The first jobs need a moment to fill the ticks.
        first, last = found.looks[len(found.looks) // 10], found.looks[-1]
        found.row_steps_per_s = (last.row_steps - first.row_steps) / (last.at_s - first.at_s)
        while True:
            came_s = clock()
            if (await ask(url)).status == 200:  # a refusal comes at once, so that this one was let in when it came
                break
            await asyncio.sleep(NEWCOMERS_S)
        found.let_in_s = came_s - ends_s
        await backlog_below(url, 0.0)
        found.idle_s = clock() - ends_s
    return found


async def stampede(url: str, herd: int) -> tuple[float, list[int]]:
    """All at one moment, each again when it was told to: seconds until the last has its answer, and tries of each."""

    async def persist() -> int:
        tries = 1
        while True:
            answer = await ask(url)
            if answer.status != 429:
                break
            await asyncio.sleep(answer.wait_s)
            tries += 1
        assert answer.status == 200, answer
        return tries

    began = time.perf_counter()
    tries = await asyncio.gather(*(persist() for _ in range(herd)))
    return time.perf_counter() - began, tries


async def newcomer(url: str) -> int:
    """The status of a client who comes when the backlog has room, after a crowd that does not come back."""
    crowd = [asyncio.create_task(ask(url)) for _ in range(CROWD)]
    await asyncio.sleep(1.0)
    await backlog_below(url, 0.9 * BACKLOG_S)
    answer = await ask(url)
    await asyncio.gather(*crowd)
    return answer.status


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
    peak = await peak_beside_the_probe(url, peak_s)
    for returning, who in ((False, "none returns"), (True, "all return")):
        found = await flood(url, load * peak / PLACES, seconds, returning=returning, seed=seed)
        after = await peak_beside_the_probe(url, peak_s)  # the machine may be faster or slower by now
        claims += judge(found, (peak + after) / 2, who)
        peak = after
    took_s, tries = await stampede(url, herd)
    claims += [
        most(f"a herd of {herd} that does as told: seconds / ideal", took_s * peak / (herd * PLACES), 1.3),
        most("its tries, median", statistics.median(tries), 3),
        none("a client who comes when the backlog allows is refused", int(await newcomer(url) != 200)),
    ]
    assert (await metrics(url))["tminus_rows_active"] == 0
    return claims


if __name__ == "__main__":
    # Without variables of the bench: with the default of jobs.
    clients.run_on_server(
        trial,
        FLAGS,
        servers.options_of(__doc__, checkpoint=servers.CHECKPOINT, seconds=120.0, load=LOAD, seed=1),
        env={},
    )
