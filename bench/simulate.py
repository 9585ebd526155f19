"""The scheduler and admission themselves, with a clock of predicted ticks: minutes of load in seconds, no network.

    python -m bench.simulate [--seconds 900]

Writes bench/results/simulate.json: by load, how long short and long jobs take in the mix of the design (80 % of 20
steps, 15 % of 50, 5 % of 1000), with the reserve for the oldest job and without it, by how much an ETA was overtaken,
how good a forecast is, and what background jobs cost others.
"""

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import median, quantiles
from typing import Any

from bench import result_file
from bench.cluster import TICKS
from bench.servers import describe, options_of
from bench.traffic import MEAN_PLACES, ROWS, at_rate
from tminus.service.errors import Overloaded
from tminus.service.model_info import Limits
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.forecast import Pending, Speed, forecast
from tminus.service.scheduling.scheduler import BACKGROUND_TICKS, Policy, Scheduler, Sharing, TickTimes, Turns
from tminus.service.work import Batch, Work

LIMITS = Limits(max_n=64, max_batch=8, max_rows=10_000, max_jobs=1000, max_backlog_s=1e9, max_body_bytes=4096)
SHORT_TICKS = ((1, 0.003), (2, 0.0044), (4, 0.007), (8, 0.0127))  # (places, seconds), as on two cores in bfloat16
LOADS = (0.5, 0.7, 0.8, 0.9, 0.95)
RESERVES: dict[str, int | None] = {"reserve": None, "none": 0}  # places kept for the oldest job: the usual, or none

OnRefusal = Callable[[Admission, Work], None]


@dataclass
class Outcome:
    """What became of the requests, by their numbers."""

    tries: Counter[int] = field(default_factory=Counter)  # of those who were let in, by number of tries
    waits: list[int] = field(default_factory=list)  # that the refused were told, in seconds
    entered: dict[int, float] = field(default_factory=dict)  # when each request was let in
    told: dict[int, float] = field(default_factory=dict)  # the ETA that it was told then
    took: dict[int, float] = field(default_factory=dict)  # and how long it took
    done: list[tuple[float, float]] = field(default_factory=list)  # at the end of each tick, its work in full seconds
    ended_s: float = 0.0


def serve(
    requests: Sequence[tuple[float, Work]],
    limits: Limits,
    points: tuple[tuple[int, float], ...] = TICKS,
    policy: Policy = "srpt",
    *,
    reserved: int | None = None,
    comes_back: Callable[[int], bool] = lambda _number: True,
    on_refusal: OnRefusal = lambda _admission, _work: None,
) -> Outcome:
    """Run requests at their times to the end of all work.

    reserved: places for the oldest job; None for the usual. comes_back: whether a request that was refused is made
    again when it was told to be.
    """
    times = TickTimes(points)
    sharing = Sharing.of(limits.max_batch, policy, limits.max_batch // 2, times)
    if reserved is not None:
        sharing = replace(sharing, reserved=reserved)
    scheduler, admission = Scheduler(sharing), Admission(limits)
    admission.put(0, Speed(sharing, limits.max_rows))
    place_s = times.seconds_per_place(limits.max_batch)
    coming = [(at_s, number, 1) for number, (at_s, _) in enumerate(requests)]
    heapq.heapify(coming)
    outcome, row = Outcome(), 0
    running: tuple[Batch, float] | None = None  # and when its tick ends
    while coming or running is not None:
        if running is not None and (not coming or running[1] <= coming[0][0]):
            batch, now_s = running
            admission.stepped(0, batch.jobs, batch.places, times.seconds(batch.places))
            outcome.done.append((now_s, batch.places * place_s))
            for job_id in scheduler.advance(batch).finished:
                admission.leave(job_id)
                outcome.took[int(job_id)] = now_s - outcome.entered[int(job_id)]
            running = None
        else:
            now_s, number, tries = heapq.heappop(coming)
            work = requests[number][1]
            try:
                outlook = admission.enter(str(number), work, now_s=now_s)
            except Overloaded as error:
                on_refusal(admission, work)
                wait_s = int(error.headers["Retry-After"])
                outcome.waits.append(wait_s)
                if comes_back(number):
                    heapq.heappush(coming, (now_s + wait_s, number, tries + 1))
            else:
                outcome.tries[tries] += 1
                outcome.entered[number], outcome.told[number] = now_s, outlook.eta_s
                scheduler.add(str(number), range(row, row + work.rows), work)
                row += work.rows
        if running is None and (following := scheduler.next_batch()) is not None:
            running = (following, now_s + times.seconds(following.places))
    assert (len(admission.outlooks(now_s)), admission.rows, admission.backlog_s) == (0, 0, 0)
    outcome.ended_s = now_s
    return outcome


def mixed(load: float, seconds: float, seed: int) -> list[tuple[float, Work]]:
    """Requests of the mix at random moments, that together take a share of the machine."""
    per_s = load / (MEAN_PLACES * TickTimes(TICKS).seconds_per_place(LIMITS.max_batch))
    return list(at_rate(per_s, seconds, seed))


def main() -> None:
    """Simulate, write."""
    args = options_of(__doc__, seconds=900.0, out=result_file.RESULTS)
    begun = result_file.begin(wait=False, code=("service/scheduling",))
    found: dict[str, dict[str, Any]] = {
        "mix": {f"{load:.0%}": by_reserve(mixed(load, args.seconds, seed=3)) for load in LOADS},
        "forecast": {f"{load:.0%}": told_and_true(mixed(load, args.seconds, seed=3)) for load in LOADS},
        "beside_one_long": {
            f"{load:.0%}": {name: one_long(load, reserved) for name, reserved in RESERVES.items()} for load in LOADS
        },
        "background": {
            f"{per_s:g} a second of {steps} steps": {
                name: under_background(per_s, steps, ticks)
                for name, ticks in (("none", None), ("short", BACKGROUND_TICKS), ("full", math.inf))
            }
            for per_s, steps in ((0.2, 20), (1.0, 20), (5.0, 20), (1.0, 8))
        },
    }
    result_file.write("simulate", begun.made(describe(0), timed=False), found, args.out)
    print("load, reserve | 20 steps: median, 99 % | 1000 steps: median, 99 % | took / told, 1000 steps: median, 95 %")
    for load, each in found["mix"].items():
        for name, one in each.items():
            print(f"{load}, {name} | " + " | ".join(f"{value:.3g}" for value in one.values()))
    print("\nload of 20-step jobs, reserve | each of them beside one of 1000 steps: median, longest | that one")
    for load, each in found["beside_one_long"].items():
        for name, one in each.items():
            print(f"{load}, {name} | " + " | ".join(f"{value:.3g} s" for value in one.values()))


def by_reserve(requests: Sequence[tuple[float, Work]]) -> dict[str, dict[str, float]]:
    """How long jobs of the mix take, with the reserve for the oldest job and without; and what an ETA was worth."""
    found = {}
    for name, reserved in RESERVES.items():
        outcome = serve(requests, LIMITS, reserved=reserved)
        short, long = ([k for k, (_, work) in enumerate(requests) if work.steps == steps] for steps in (20, 1000))
        ratios = [outcome.took[k] / outcome.told[k] for k in long]
        found[name] = (
            _spread([outcome.took[k] for k in short], "short")
            | _spread([outcome.took[k] for k in long], "long")
            | {"over_eta_median": median(ratios), "over_eta_p95": quantiles(ratios, n=20)[-1]}
        )
    return found


def told_and_true(requests: Sequence[tuple[float, Work]]) -> dict[str, float]:
    """How far off forecasts are where no other job comes."""
    errors = forecast_errors(requests)
    return {"median": median(errors), "p95": quantiles(errors, n=20)[-1], "jobs": len(errors)}


def one_long(load: float, reserved: int | None) -> dict[str, float]:
    """Short jobs beside one of 1000 steps, and that one."""
    beside, long_s = beside_one_long(load, reserved)
    return {"short_median_s": median(beside), "short_longest_s": max(beside), "long_s": long_s}


def under_background(per_s: float, steps: int, ticks: float | None) -> dict[str, float]:
    """Requests of one image beside background jobs, and what those have."""
    took, share = beside_background(per_s, steps, ticks)
    return {
        "median_ms": 1e3 * median(took),
        "p99_ms": 1e3 * quantiles(took, n=100)[98],
        "background_share": 100 * share,
    }


def forecast_errors(requests: Sequence[tuple[float, Work]], every: int = 20) -> list[float]:
    """How far from the truth a forecast is, of each job that is there whenever so many more have come."""
    times = TickTimes(TICKS)
    sharing = Sharing.of(LIMITS.max_batch, short_batch=LIMITS.max_batch // 2, times=times)
    scheduler, now_s, errors = Scheduler(sharing), 0.0, list[float]()
    works: dict[str, Work] = {}  # of the jobs that have not ended
    for number, (at_s, work) in enumerate(requests):
        while now_s < at_s and (batch := scheduler.next_batch()) is not None:
            now_s += times.seconds(batch.places)
            for job_id in scheduler.advance(batch).finished:
                del works[job_id]
        now_s = max(now_s, at_s)
        works[f"{number}"] = work
        scheduler.add(f"{number}", range(work.rows), work)
        if number % every:
            continue
        steps = {job_id: scheduler.steps(job_id) for job_id in works}
        left = {job_id: sum(map(works[job_id].places_left, each)) for job_id, each in steps.items()}
        told = forecast([Pending(job_id, works[job_id], n) for job_id, n in left.items()], {0: Speed(sharing, 1)})
        alone, true_s = Scheduler(sharing), 0.0
        for job_id, each in steps.items():
            alone.add(job_id, range(len(each)), works[job_id], each)
        while (batch := alone.next_batch()) is not None:
            true_s += times.seconds(batch.places)
            errors += [abs(told[job_id].eta_s - true_s) / true_s for job_id in alone.advance(batch).finished]
    return errors


def beside_one_long(load: float, reserved: int | None) -> tuple[list[float], float]:
    """Short jobs that take a share of the machine, and from the minute on one of 1000 steps.

    How long the short ones take that come while it runs, and how long it takes, in seconds.
    """
    rng, time_s = random.Random(4), 0.0
    per_s = load / (ROWS * 20 * TickTimes(TICKS).seconds_per_place(LIMITS.max_batch))
    requests: list[tuple[float, Work]] = [(60.0, Work(ROWS, 1000, range(0)))]
    while (time_s := time_s + rng.expovariate(per_s)) < 300.0:
        requests.append((time_s, Work(ROWS, 20, range(0))))
    outcome = serve(requests, LIMITS, reserved=reserved)
    ended_s = 60.0 + outcome.took[0]
    beside = [outcome.took[k] for k in range(1, len(requests)) if 60.0 <= outcome.entered[k] < ended_s]
    return beside, outcome.took[0]


def beside_background(per_s: float, steps: int, background_ticks: float | None) -> tuple[list[float], float]:
    """Requests of one image at random for twenty minutes, while background jobs take what is left.

    background_ticks: how long their ticks may be, in ticks of one row; None for no background job. How long each of the
    requests takes, and what share of all that the machine can do the background jobs have had.
    """
    times, rng = TickTimes(SHORT_TICKS), random.Random(7)
    sharing = Sharing.of(LIMITS.max_batch, short_batch=LIMITS.max_batch // 2, times=times)
    scheduler, turns = Scheduler(replace(sharing, background_ticks=background_ticks or 1.0)), Turns[int]()
    turns.put(0, scheduler)
    if background_ticks is not None:
        scheduler.add("background", range(64), Work(64, 10**6, range(0), held_back_s=1e9))
    came_s = list(accumulate(rng.expovariate(per_s) for _ in range(round(1200 * per_s))))
    now_s, number, had, took = 0.0, 0, 0, list[float]()
    while len(took) < len(came_s):
        while number < len(came_s) and came_s[number] <= now_s:
            scheduler.add(f"{number}", range(1), Work(1, steps, range(0)))
            number += 1
        turns.next(now_s)
        if (batch := scheduler.next_batch()) is None:
            now_s = came_s[number]
            continue
        seconds = times.seconds(batch.places)
        now_s += seconds
        advance = scheduler.advance(batch)
        turns.stepped(0, seconds)
        had += advance.places.get("background", 0)
        took += [now_s - came_s[int(job_id)] for job_id in advance.finished]
    return took, had * times.seconds_per_place(LIMITS.max_batch) / now_s


def _spread(seconds: list[float], name: str) -> dict[str, float]:
    return {f"{name}_median_s": median(seconds), f"{name}_p99_s": quantiles(seconds, n=100)[98]}


if __name__ == "__main__":
    main()
