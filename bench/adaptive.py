"""Measure what `quality=adaptive` gains: the share of requests that are in time, and their distance, over the load.

    python -m bench.adaptive [--seconds 30] [--rounds 3] [--images 4]

Writes bench/results/adaptive.json. One server has the bundled network and its student. Requests of a few images come at
random times, with a deadline of 3 times the time of one alone. A load of 100 % is what the server can do at the
recommended setting. Each round runs every load without and with `quality=adaptive`.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx

from bench import result_file
from bench.result_file import ROOT
from bench.servers import Server, describe, options_of

CHECKPOINT, STUDENT = (ROOT / "checkpoints" / name for name in ("fashion-mnist-32", "fashion-mnist-32-student"))
LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)
FACTOR = 3.0  # the deadline, over the time of a request alone
CLIENTS, CLOSED_S, ALONE = 8, 10.0, 15  # clients and seconds of the measured rate; requests alone
MODES: dict[str, dict[str, str]] = {"recommended": {}, "adaptive": {"quality": "adaptive"}}
CODE = ("model", "service/engine", "service/scheduling", "service/worker", "service/api/submission.py")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request got."""

    status: int
    took_s: float
    rung: int | None  # from 1


def main() -> None:
    """Measure, and write the file."""
    options = options_of(__doc__, seconds=30.0, rounds=3, images=4, output="")
    begun = result_file.begin(code=CODE)
    with tempfile.TemporaryDirectory() as state:
        server = Server(CHECKPOINT, Path(state), ("--checkpoint", str(STUDENT)))
        server.start()
        try:
            figures = asyncio.run(measure(server.url, options.images, options.seconds, options.rounds))
        finally:
            server.terminate()
    made = begun.made(describe(), timed=True, quick=options.seconds < 20)
    result_file.write("adaptive", made, figures | {"images": options.images}, options.output or None)


async def measure(url: str, images: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Return the figures of all loads."""
    limits = httpx.Limits(max_connections=500, max_keepalive_connections=500)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60, trust_env=False) as http:
        ladder = (await http.get("/model")).json()["ladder"]
        alone_s = median([(await ask(http, images)).took_s for _ in range(ALONE)])
        per_s = await closed_loop(http, images)
        deadline_s = FACTOR * alone_s
        result_file.say(f"alone {alone_s:.3f} s, at most {per_s:.2f} requests a second")
        found: dict[str, dict[str, list[dict[str, float | None]]]] = {}
        for number in range(rounds):
            for load in LOADS:
                for mode, more in MODES.items():
                    arrivals = poisson(load * per_s, seconds, seed=number)
                    answers = await open_loop(http, images, arrivals, {"deadline_s": f"{deadline_s:.4f}", **more})
                    figures = figures_of(answers, deadline_s, ladder)
                    result_file.say(f"{load:.0%} {mode}: {figures}")
                    found.setdefault(f"{load:.0%}", {}).setdefault(mode, []).append(figures)
    loads = {
        load: {
            mode: {name: result_file.rounds(each[name] for each in rounds_) for name in rounds_[0]}
            for mode, rounds_ in modes.items()
        }
        for load, modes in found.items()
    }
    return {"alone_s": alone_s, "requests_per_s": per_s, "deadline_s": deadline_s, "rungs": len(ladder), "loads": loads}


def figures_of(
    answers: Sequence[Answer], deadline_s: float, ladder: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """Return shares of the requests, and means over those that were answered."""
    done = [each for each in answers if each.status == 200]
    admitted = [each for each in answers if each.status in (200, 504)]
    rungs = [ladder[each.rung - 1] for each in done if each.rung is not None]
    in_time = sum(each.took_s <= deadline_s for each in done)
    figures: dict[str, float | None] = {
        "in_time": in_time / len(answers),
        "missed_though_admitted": 1 - in_time / max(1, len(admitted)),
        "refused": 1 - len(admitted) / len(answers),
    }
    for name in ("passes", "distance", "pixel_distance"):
        figures[name] = mean(rung[name] for rung in rungs) if rungs else None
    return figures


def poisson(per_s: float, seconds: float, seed: int) -> list[float]:
    """Return when requests come, in seconds. Their number is fixed, so that the load does not depend on the seed."""
    chance = random.Random(seed)
    return sorted(chance.uniform(0, seconds) for _ in range(round(per_s * seconds)))


async def open_loop(
    http: httpx.AsyncClient, images: int, arrivals: Sequence[float], more: dict[str, str]
) -> list[Answer]:
    """Send requests at their times, whether or not those before are answered."""
    began_s, tasks = time.perf_counter(), []
    for at_s in arrivals:
        await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(http, images, more)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(http: httpx.AsyncClient, images: int) -> float:
    """Return the requests a second of some clients that send the next one as soon as they have an answer."""
    began_s = time.perf_counter()
    done = 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < began_s + CLOSED_S:
            await ask(http, images)
            done += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return done / (time.perf_counter() - began_s)


async def ask(http: httpx.AsyncClient, images: int, more: dict[str, str] | None = None) -> Answer:
    """Send one request. Raises for an answer that is neither images nor a missed deadline nor a refusal."""
    began_s = time.perf_counter()
    answer = await http.post("/sample", params={"n": images, "class_label": "bag", **(more or {})})
    if answer.status_code not in (200, 429, 504):
        answer.raise_for_status()
    place = answer.headers.get("x-quality", "").partition("/")[0]
    return Answer(answer.status_code, time.perf_counter() - began_s, int(place) if place else None)


if __name__ == "__main__":
    main()
