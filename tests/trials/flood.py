"""One key floods, another asks for little: how much longer does the other wait?

    .venv/bin/python -m tests.trials.flood [--seconds 30] [--rounds 4]

A real server with two keys. One asks at random moments for a share of the machine that is well below its own half; the
other, every second round, for 20 times its half. Both ask anew at each moment, whatever was answered. To reach: the
first key's p99 beside the flood is at most 1.5 times its p99 alone, nothing of it is refused, the flood by 429 only.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench import servers
from bench.figures import quantile
from tests.service.keys import key_line
from tests.trials import clients
from tests.trials.claims import Claim, least, most, none
from tests.trials.clients import ROW_STEPS, ask, metrics, saturated

KEYS = {name: f"tm_of_the_{name}_key" for name in ("quiet", "flood")}
FLAGS = ("--result-cache-mb", "0", "--max-backlog-s", "10")
FLOOD_SPEC = {"n": 8, "steps": 20, "sampler": "ddim"}
QUIET_SPECS = ({"n": 8, "steps": 20, "sampler": "ddim"}, {"n": 1, "steps": 50, "sampler": "ddim"})
LOAD = 0.2  # of the machine, that the quiet key asks for
TIMES_ITS_SHARE = 20
REACH = 1.5
PEAK_S, WARM_UP_S = 10.0, 2.5
FILLING_S = 2.0  # until the flood has what it can get


@dataclass
class Answers:
    """What was answered to one key."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)

    @property
    def p99_s(self) -> float:
        return quantile(self.latencies_s, 0.99)


def as_key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


async def ask_as(url: str, name: str, spec: dict[str, Any], seen: Answers) -> None:
    """Ask once, and note what comes of it."""
    body, began_s = json.dumps(spec | {"seed": random.getrandbits(32)}).encode(), time.perf_counter()
    answer = await ask(url, "POST", "/sample", body, Content_Type="application/json", **as_key(name))
    seen.statuses[answer.status] += 1
    seen.latencies_s.append(time.perf_counter() - began_s)


async def at_random(per_s: float, seconds: float, rng: random.Random, act: Callable[[], Awaitable[None]]) -> None:
    """Do something at random moments, whether or not the last is done; waits for all of it."""
    due_s, end_s = time.perf_counter(), time.perf_counter() + seconds
    async with asyncio.TaskGroup() as group:
        while (due_s := due_s + rng.expovariate(per_s)) < end_s:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            group.create_task(act())  # type: ignore[arg-type]


async def measure(url: str, seconds: float, rounds: int, spec: dict[str, Any]) -> list[Claim]:
    """Rounds alone and beside the flood in turns, so that both see the machine alike."""
    rng, alone, beside, flood, goodput = random.Random(1), Answers(), Answers(), Answers(), list[float]()

    async def flooding() -> None:
        await ask_as(url, "flood", FLOOD_SPEC, flood)

    peak = await saturated(url, [flooding] * 8, PEAK_S, WARM_UP_S, **as_key("quiet"))
    flood.statuses.clear()
    per_s = LOAD * peak / (spec["n"] * spec["steps"])
    flood_per_s = TIMES_ITS_SHARE * peak / 2 / (8 * 20)
    for _ in range(rounds):
        await at_random(per_s, seconds, rng, lambda: ask_as(url, "quiet", spec, alone))
        task = asyncio.create_task(at_random(flood_per_s, seconds + FILLING_S, rng, flooding))
        await asyncio.sleep(FILLING_S)
        began_s, before = time.perf_counter(), await metrics(url, **as_key("quiet"))
        await at_random(per_s, seconds, rng, lambda: ask_as(url, "quiet", spec, beside))
        done = (await metrics(url, **as_key("quiet")))[ROW_STEPS] - before[ROW_STEPS]
        goodput.append(done / (time.perf_counter() - began_s))
        await task
    what = f"{spec['n']} images of {spec['steps']} steps"
    for name, each in (("alone", alone), ("beside the flood", beside)):
        print(f"{what}, {name}: p50 {1e3 * median(each.latencies_s):.0f} ms, p99 {1e3 * each.p99_s:.0f} ms")
    print(f"{what}: {len(beside.latencies_s)} requests beside the flood of {dict(flood.statuses)}; "
          f"goodput / peak {sum(goodput) / len(goodput) / peak:.2f} of {peak:.0f} row-steps/s")  # fmt: skip
    quiet = alone.statuses + beside.statuses
    others = sum(count for status, count in flood.statuses.items() if status not in (200, 429))
    return [
        most(f"{what}: p99 beside the flood / alone", beside.p99_s / alone.p99_s, REACH),
        none(f"{what}: answers to the quiet key that are not 200", quiet.total() - quiet[200], quiet.total()),
        none(f"{what}: answers to the flood that are neither 200 nor 429", others, flood.statuses.total()),
        least(f"{what}: refusals of the flood", flood.statuses[429], 1, form=",d"),
    ]


async def trial(url: str, seconds: float, rounds: int) -> list[Claim]:
    """Both kinds of the quiet key's requests, one after the other on one server."""
    return [claim for spec in QUIET_SPECS for claim in await measure(url, seconds, rounds, spec)]


if __name__ == "__main__":
    lines = "\n".join(key_line(name, secret) for name, secret in KEYS.items())
    options = servers.options_of(__doc__, checkpoint=servers.CHECKPOINT, seconds=30.0, rounds=4)
    clients.run_on_server(trial, FLAGS, options, env={"TMINUS_KEYS": lines})
