"""Simulate the scheduler and admission under a virtual clock. No network runs: ticks take as long as predicted.

    python -m bench.simulate [--seconds 900]

Writes bench/results/simulate.json: by load, how long short and long jobs take with the reserve for the oldest job and
without it. First in a mix of 80 % of 20 steps, 15 % of 50 and 5 % of 1000, with how much longer a job took than its
first ETA; then jobs of 20 steps beside one of 1000. Last, whether an order by slack would let more jobs meet their
deadlines, where all have one of 3 times their time alone, and where every second one has none.
"""

import heapq
import math
import random
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from typing import Any

from bench import result_file
from bench.cluster import TICKS
from bench.servers import describe, options_of
from bench.traffic import MEAN_PLACES, ROWS, at_rate
from tminus.service.cli.bench import MIX, read_mix
from tminus.service.cli.bench import mixed as mixed_slo
from tminus.service.engine.loading import SHORT_SHARE, smallest_batch_at
from tminus.service.errors import Overloaded
from tminus.service.model_info import Limits
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.scheduler import BatchPolicy, OwnerQueue, QueuedJob, Scheduler, TickTimes
from tminus.service.work import Batch, Work

LIMITS = Limits(max_n=64, max_batch=8, max_rows=10_000, max_jobs=1000, max_backlog_s=1e9, max_body_bytes=4096)
LOADS = (0.5, 0.7, 0.8, 0.9, 0.95)
RESERVES: dict[str, int | None] = {"reserve": None, "none": 0}  # places kept for the oldest job: the usual, or none

SIZES = read_mix(MIX)
# By name: the key in an owner's queue, whose last job goes first, of the due time and the work that is left, both in
# seconds. None is the usual order, by work alone.
ORDERS: dict[str, Callable[[float, float], float] | None] = {
    "work": None,
    "slack": lambda due_s, left_s: left_s - due_s,
}

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
    policy = BatchPolicy.of(limits.max_batch, smallest_batch_at(points, SHORT_SHARE), times)
    if reserved is not None:
        policy = replace(policy, reserved=reserved)
    scheduler, admission = Scheduler(policy), Admission(limits)
    admission.put(0, Speed(policy, limits.max_rows))
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
    """Make requests of the mix at random moments, which together take a share of the machine."""
    per_s = load / (MEAN_PLACES * TickTimes(TICKS).seconds_per_place(LIMITS.max_batch))
    return list(at_rate(per_s, seconds, seed))


def main() -> None:
    """Simulate, write."""
    args = options_of(__doc__, seconds=900.0, out="")
    begun = result_file.begin(wait=False, code=("service/scheduling",))
    found: dict[str, dict[str, Any]] = {
        "mix": {f"{load:.0%}": by_reserve(mixed(load, args.seconds, seed=3)) for load in LOADS},
        "beside_one_long": {
            f"{load:.0%}": {name: one_long(load, reserved) for name, reserved in RESERVES.items()} for load in LOADS
        },
    }
    slack: dict[str, dict[str, Any]] = {
        f"{load:.0%}": {order: by_slack(load, order) for order in ORDERS} for load in (*LOADS, 1.2)
    }
    result_file.write("simulate", begun.made(describe(0), timed=False), found | {"slack": slack}, args.out)
    print("load, reserve | 20 steps: median, 99 % | 1000 steps: median, 99 % | took / told, 1000 steps: median, 95 %")
    for load, each in found["mix"].items():
        for name, one in each.items():
            print(f"{load}, {name} | " + " | ".join(f"{value:.3g}" for value in one.values()))
    print("\nload of 20-step jobs, reserve | each of them beside one of 1000 steps: median, longest | that one")
    for load, each in found["beside_one_long"].items():
        for name, one in each.items():
            print(f"{load}, {name} | " + " | ".join(f"{value:.3g} s" for value in one.values()))


def by_reserve(requests: Sequence[tuple[float, Work]]) -> dict[str, dict[str, float]]:
    """Run the mix with the reserve for the oldest job and without; return how long jobs take, also over their ETA."""
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


def one_long(load: float, reserved: int | None) -> dict[str, float]:
    """Run short jobs that take a share of the machine and, after a minute, one job of 1000 steps.

    Return how long that one takes, and how long the short ones take that come while it runs, in seconds.
    """
    rng, time_s = random.Random(4), 0.0
    per_s = load / (ROWS * 20 * TickTimes(TICKS).seconds_per_place(LIMITS.max_batch))
    requests: list[tuple[float, Work]] = [(60.0, Work(ROWS, 1000, range(0)))]
    while (time_s := time_s + rng.expovariate(per_s)) < 300.0:
        requests.append((time_s, Work(ROWS, 20, range(0))))
    outcome = serve(requests, LIMITS, reserved=reserved)
    ended_s = 60.0 + outcome.took[0]
    beside = [outcome.took[k] for k in range(1, len(requests)) if 60.0 <= outcome.entered[k] < ended_s]
    return {"short_median_s": median(beside), "short_longest_s": max(beside), "long_s": outcome.took[0]}


def by_slack(load: float, order: str) -> dict[str, float]:
    """Run the mix of `bench slo` with another order in the queue, first with deadlines, then with half of them.

    Return the percentage of deadlines that are met, with all jobs and with every second job having one. Also return how
    many times its time alone a job without one takes, at the 95th percentile.
    """
    times, found = TickTimes(TICKS), {}
    asked = mixed_slo(SIZES, load / times.seconds_per_place(LIMITS.max_batch), 1200.0, seed=6)
    requests = [(at_s, Work(size.n, size.steps, range(0))) for at_s, size in asked]
    alone_s = [work.steps * times.seconds(min(work.rows, LIMITS.max_batch)) for _, work in requests]
    for name, every in (("all", 1), ("half", 2)):
        due_s = {str(k): at_s + 3 * alone_s[k] for k, (at_s, _) in enumerate(requests) if k % every == 0}
        with ordered(ORDERS[order], due_s, times.seconds_per_place(LIMITS.max_batch)):
            outcome = serve(requests, LIMITS)
        met = [outcome.took[int(job_id)] <= 3 * alone_s[int(job_id)] for job_id in due_s]
        found[f"met_of_{name}_percent"] = 100 * sum(met) / len(met)
        others = [outcome.took[k] / alone_s[k] for k in range(len(requests)) if str(k) not in due_s]
        if others:
            found["others_p95"] = quantiles(others, n=20)[-1]
    return found


@contextmanager
def ordered(key: Callable[[float, float], float] | None, due_s: Mapping[str, float], place_s: float) -> Iterator[None]:
    """Make the jobs of an owner wait in another order. key: of the due time and the seconds of work that are left."""
    usual = OwnerQueue.put_back

    def put_back(queue: OwnerQueue, job: QueuedJob) -> None:
        usual(queue, job)
        if key is not None and (job.singles or job.doubles):
            queue.take_out(job)
            first = key(due_s.get(job.id, math.inf), job.places_left * place_s)
            job.key = (first, -job.places_left, job.id)  # type: ignore[assignment]
            insort(queue._queue, job.key)

    try:
        OwnerQueue.put_back = put_back  # type: ignore[method-assign,assignment]
        yield
    finally:
        OwnerQueue.put_back = usual  # type: ignore[method-assign]


def _spread(seconds: list[float], name: str) -> dict[str, float]:
    return {f"{name}_median_s": median(seconds), f"{name}_p99_s": quantiles(seconds, n=100)[98]}


if __name__ == "__main__":
    main()
