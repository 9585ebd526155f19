"""Replicas on one job store under a virtual clock: the scheduler and admission themselves, no network, no database.

    python -m bench.cluster [--replicas 1,3,10,100] [--seconds 300] [--load 0.8,1.5] [--traffic FILE]
    python -m bench.cluster --page

Durable jobs come at random moments to any replica that lives. As in service/jobs/leases.py, a replica works on a new
job if little goes before it there, and else leaves it in the table; every second it claims new jobs that nobody holds,
and those of a replica that is gone however much it has to do. It renews its leases three times in their time. One that
dies leaves its jobs until their lease ends, and comes back empty. Prints how long jobs wait, how many are refused,
and how many statements the database gets.
"""

import argparse
import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, repeat
from pathlib import Path

from bench import result_file, traffic
from bench.figures import quantile
from bench.servers import describe
from tminus.service.errors import Overloaded
from tminus.service.jobs.leases import AHEAD_S, CLAIM_S, RENEWALS
from tminus.service.jobs.store.shared_store import CLAIM_JOBS
from tminus.service.model_info import Limits
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.room import ClusterLoad, Intake
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler, TickTimes
from tminus.service.work import Batch, Work

TICKS = ((1, 0.003), (2, 0.005), (4, 0.01), (8, 0.02))  # (places, seconds), as on two cores
LIMITS = Limits(max_n=64, max_batch=8, max_rows=4096, max_jobs=1024, max_backlog_s=60.0, max_body_bytes=4096)
LEASE_S = 15.0
DEATHS_PER_HOUR = 2.0
MILLION_PER_S = 29.0  # a million jobs a day, in an hour of two and a half times the mean
PAGE_REPLICAS, PAGE_S = (12, 14), 300.0
BACK_S = 30.0  # until one that died is there again
# Statements of PostgresStore for one job: to find its key and add it, to claim it and read its snapshot where it was
# left to others, to keep its end. BEGIN and COMMIT are not counted.
ADD, LOAD, RESUME, FINISH, RENEW, CLAIM = 2, 2, 1, 4, 5, 2

COLUMNS = (
    "replicas", "load", "jobs", "refused", "20 steps: median, 99 %", "1000 steps: median, 99 %", "moved",
    "statements a job", "and a second, of a replica",
)  # fmt: skip


@dataclass(slots=True)
class Job:
    """One durable job, wherever it is."""

    id: str
    work: Work
    came_s: float
    steps: list[int]  # the next of each row
    ended_s: float | None = None
    died_s: float | None = None  # when the last replica that worked on it died
    moves: int = 0  # from one replica to another


@dataclass
class Outcome:
    """What became of the jobs."""

    jobs: list[Job] = field(default_factory=list)  # that were accepted
    refused: list[int] = field(default_factory=list)  # what each was told to wait, in seconds
    statements: int = 0  # for jobs
    renewals: int = 0  # statements of renewals, and of looks for jobs that nobody holds
    ticks_s: float = 0.0  # of all replicas
    until_s: float = 0.0  # when the last job ended
    taken_s: list[float] = field(default_factory=list)  # from a death until a job of it was claimed

    def waits(self, steps: int | None = None) -> list[float]:
        """How long jobs took, of these steps or of all."""
        those = (job for job in self.jobs if job.ended_s is not None and steps in (None, job.work.steps))
        return [job.ended_s - job.came_s for job in those]  # type: ignore[operator]


class Replica:
    """A server: its own scheduler, ledger and clock of ticks."""

    def __init__(self, limits: Limits, points: Sequence[tuple[int, float]]) -> None:
        self._limits, self._times = limits, TickTimes(tuple(points))
        self.jobs: dict[str, Job] = {}
        self.lives, self.least_waiting = True, math.inf
        self.running: Batch | None = None
        self.tick_s = 0.0  # of what runs
        self._rows = count()
        self.restart()

    def restart(self) -> None:
        """Begin with nothing, as a new process does."""
        policy = BatchPolicy.of(self._limits.max_batch, self._limits.max_batch // 2, self._times)
        self.scheduler, self.admission = Scheduler(policy), Admission(self._limits)
        self.admission.put(0, Speed(policy, self._limits.max_rows))
        self.jobs, self.running, self.lives, self.least_waiting = {}, None, True, math.inf

    def takes(self, places: int) -> bool:
        """Tell whether it works on a new job that came to it."""
        return places < self.least_waiting and self.admission.intake(0, AHEAD_S).has_room(places)

    def hold(self, job: Job) -> None:
        """Work on a job that it has admitted."""
        self.jobs[job.id] = job
        rows = [next(self._rows) for _ in range(job.work.rows)]
        self.scheduler.add(job.id, rows, job.work, job.steps)

    def begin(self) -> float | None:
        """Begin a tick; how long it takes, or None if there is nothing to do."""
        self.running = self.scheduler.next_batch()
        return None if self.running is None else self._times.seconds(self.running.places)

    def end(self) -> list[Job]:
        """End the tick; the jobs that ended with it."""
        batch = self.running
        assert batch is not None
        self.admission.stepped(0, batch.jobs, batch.places, self.tick_s)
        for rows in batch.jobs:
            for step, index in rows.steps:
                self.jobs[rows.job_id].steps[index] = step + 1
        finished = list(self.scheduler.advance(batch).finished)
        for job_id in finished:
            self.admission.leave(job_id)
        return [self.jobs.pop(job_id) for job_id in finished]


class Waiting:
    """Jobs in the table that nobody holds."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}  # by the number of their arrival
        self._by_length: list[tuple[int, int]] = []  # heaps, also of those that are claimed since
        self._by_arrival: list[int] = []
        self.places = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, order: int, job: Job) -> None:
        self._jobs[order] = job
        heapq.heappush(self._by_length, (job.work.places, order))
        heapq.heappush(self._by_arrival, order)
        self.places += job.work.places

    def offer(self, intake: Intake) -> list[Job]:
        """Take jobs, the shortest first, and then the oldest; as in PostgresStore.claim."""
        shortest: list[tuple[int, int]] = []
        while self._by_length and len(shortest) < CLAIM_JOBS:
            if (each := heapq.heappop(self._by_length))[1] in self._jobs:
                shortest.append(each)
        taken = [order for places, order in shortest if intake.offer(places)]
        for each in shortest:
            heapq.heappush(self._by_length, each)
        if intake.refused < math.inf:
            oldest = self._oldest()
            if oldest not in taken and intake.offer_oldest(self._jobs[oldest].work.places, oldest):
                taken.append(oldest)
        return [self._remove(order) for order in taken]

    def take_oldest(self, places: float) -> list[Job]:
        """Take the jobs that came first, until they make up so many places."""
        taken: list[Job] = []
        while self._jobs and places > 0 and len(taken) < CLAIM_JOBS:
            taken.append(self._remove(self._oldest()))
            places -= taken[-1].work.places
        return taken

    def _oldest(self) -> int:
        while self._by_arrival[0] not in self._jobs:
            heapq.heappop(self._by_arrival)
        return self._by_arrival[0]

    def _remove(self, order: int) -> Job:
        job = self._jobs.pop(order)
        self.places -= job.work.places
        return job


class Cluster:
    """The replicas, and the table as they see it."""

    def __init__(
        self,
        replicas: int,
        limits: Limits = LIMITS,
        points: Sequence[tuple[int, float]] = TICKS,
        seed: int = 0,
        cores: int | None = None,
    ) -> None:
        """cores: that the replicas share, one each while they step; None: each has its own."""
        self._cores = cores or replicas
        self.replicas = [Replica(limits, points) for _ in range(replicas)]
        self.outcome = Outcome()
        self._open = 0  # jobs that have not ended
        self._free = Waiting()  # new jobs that nobody holds
        self._begun = Waiting()  # those of replicas that are gone
        self._paces: dict[int, tuple[float, float]] = {}  # what each replica told at its last renewal
        self._arrivals = count()
        self._order: dict[str, int] = {}
        self._draw = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = count()

    def run(
        self,
        requests: Sequence[tuple[float, Work]],
        deaths: Sequence[tuple[float, int]] = (),
        to: Sequence[int] | None = None,
    ) -> Outcome:
        """Run requests at their times to the end of all work.

        deaths: when, and of which replica. to: which replica gets each request; else any that lives does.
        """
        for number, replica in enumerate(self.replicas):
            first_s = self._draw.uniform(0, CLAIM_S)
            self._at(0.0, lambda now_s, number=number: self._renew(number, now_s))  # type: ignore[misc]
            self._at(first_s, lambda now_s, replica=replica: self._claim(replica, now_s))  # type: ignore[misc]
        for (at_s, work), which in zip(requests, to or repeat(None), strict=to is not None):
            self._at(at_s, lambda now_s, work=work, which=which: self._arrive(work, now_s, which))  # type: ignore[misc]
        for at_s, number in deaths:
            self._at(at_s, lambda now_s, number=number: self._die(number, now_s))  # type: ignore[misc]
        last_s = requests[-1][0]
        while self._events:
            now_s, _, act = heapq.heappop(self._events)
            if now_s > last_s and not self._open:
                break
            act(now_s)
            self.outcome.until_s = now_s
        return self.outcome

    def _at(self, at_s: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), act))

    # --- jobs ---

    def _arrive(self, work: Work, now_s: float, number: int | None) -> None:
        living = [replica for replica in self.replicas if replica.lives]
        if not living:
            self.outcome.refused.append(0)
            return
        replica = self._draw.choice(living) if number is None else self.replicas[number]
        job = Job(f"job {next(self._arrivals)}", work, now_s, [work.start] * work.rows)
        here = replica.takes(work.places)
        if here:
            try:
                replica.admission.enter(job.id, work, now_s=now_s)
            except Overloaded:
                here = False
        if not here:
            self.outcome.statements += LOAD
            try:
                replica.admission.leave_to_any(work, self._load(), now_s=now_s)
            except Overloaded as error:
                self.outcome.refused.append(int(error.headers["Retry-After"]))
                return
        self._order[job.id] = len(self.outcome.jobs)
        self.outcome.jobs.append(job)
        self._open += 1
        self.outcome.statements += ADD + FINISH
        if here:
            replica.hold(job)
            self._step(replica, now_s)
        else:
            self._free.add(self._order[job.id], job)

    def _load(self) -> ClusterLoad:
        paces = self._paces.values()
        held_s = sum(backlog_s for _, backlog_s in paces) / len(paces) if paces else 0.0
        jobs, places = len(self._free) + len(self._begun), self._free.places + self._begun.places
        return ClusterLoad(len(paces), sum(pace for pace, _ in paces), held_s, jobs, places)

    def _step(self, replica: Replica, now_s: float) -> None:
        if replica.running is None and (seconds := replica.begin()) is not None:
            batch = replica.running
            if self._cores < len(self.replicas):
                seconds *= max(1.0, sum(each.running is not None for each in self.replicas) / self._cores)
            replica.tick_s = seconds
            self.outcome.ticks_s += seconds
            self._at(now_s + seconds, lambda at_s: self._stepped(replica, batch, at_s))

    def _stepped(self, replica: Replica, batch: Batch | None, now_s: float) -> None:
        if replica.running is not batch:  # it died
            return
        for job in replica.end():
            job.ended_s = now_s
            self._open -= 1
        replica.running = None
        self._step(replica, now_s)

    # --- leases ---

    def _claim(self, replica: Replica, now_s: float) -> None:
        self._at(now_s + CLAIM_S, lambda at_s: self._claim(replica, at_s))
        if not replica.lives:
            return
        oldest = min((self._order[job_id] for job_id in replica.jobs), default=None)
        intake = replica.admission.intake(0, AHEAD_S, oldest)  # the number of an arrival is as good as its time
        claimed = self._begun.take_oldest(AHEAD_S * replica.admission.places_per_s(0))
        for job in claimed:
            assert job.died_s is not None
            self.outcome.taken_s.append(now_s - job.died_s)
            intake.add(job.work.places)
        claimed += self._free.offer(intake)
        self.outcome.renewals += CLAIM + (intake.refused < math.inf)
        replica.least_waiting = intake.refused
        if claimed:
            self.outcome.statements += 1 + RESUME * len(claimed)
        for job in claimed:
            places_left = sum(map(job.work.places_left, job.steps))
            replica.admission.readmit(job.id, job.work, places_left=places_left)
            replica.hold(job)
        self._step(replica, now_s)

    def _renew(self, number: int, now_s: float) -> None:
        replica = self.replicas[number]
        self._at(now_s + LEASE_S / RENEWALS, lambda at_s: self._renew(number, at_s))
        if replica.lives:
            self._paces[number] = replica.admission.places_per_s(0), replica.admission.backlog_s
            self.outcome.renewals += RENEW

    def _die(self, number: int, now_s: float) -> None:
        replica = self.replicas[number]
        if not replica.lives:
            return
        jobs, replica.lives, replica.running = list(replica.jobs.values()), False, None
        replica.jobs = {}
        until_s = now_s + LEASE_S * self._draw.uniform(1 - 1 / RENEWALS, 1)  # since its last renewal

        def expire(_at_s: float) -> None:
            self._paces.pop(number, None)
            for job in jobs:
                job.moves, job.died_s = job.moves + 1, now_s
                self._begun.add(self._order[job.id], job)

        self._at(until_s, expire)
        self._at(now_s + BACK_S, lambda _at_s: replica.restart())


# --- what is asked for ---


def capacity_per_s(points: Sequence[tuple[int, float]] = TICKS) -> float:
    """Return how many jobs of the mix one replica does in a second at most."""
    return 1 / (traffic.MEAN_PLACES * TickTimes(tuple(points)).seconds_per_place(LIMITS.max_batch))


# --- the table and the plot ---


@dataclass(frozen=True, slots=True)
class Line:
    """What came of one simulation."""

    replicas: int
    load: float  # that was asked for, or else that came
    refused: float
    outcome: Outcome

    def figures(self) -> dict[str, float]:
        """Give the line as figures: waits, and the store's statements for a job and in a second for a server."""
        outcome, found = self.outcome, dict[str, float]()
        for name, steps in (("short", 20), ("long", 1000)):
            if len(waits := outcome.waits(steps)) > 1:
                found |= {f"{name}_median_s": quantile(waits, 0.5), f"{name}_p99_s": quantile(waits, 0.99)}
        return found | {
            "load": self.load,
            "jobs": len(outcome.jobs),
            "refused": 100 * self.refused,  # %
            "moved": sum(job.moves > 0 for job in outcome.jobs),
            "statements": outcome.statements / max(1, len(outcome.jobs)),
            "statements_a_second": outcome.renewals / outcome.until_s / self.replicas,
        }

    def row(self) -> str:
        """Return the line as in a table of Markdown."""
        found = {name: f"{value:.3g}" for name, value in self.figures().items()}
        short, long = (f"{found.get(f'{key}_median_s')}, {found.get(f'{key}_p99_s')} s" for key in ("short", "long"))
        cells = [f"{self.replicas}", found["load"], f"{len(self.outcome.jobs)}", f"{found['refused']} %", short, long]
        return "| " + " | ".join([*cells, found["moved"], found["statements"], found["statements_a_second"]]) + " |"


def simulate(
    replicas: int, requests: traffic.Requests, seconds: float, deaths_per_hour: float, load: float | None = None
) -> Line:
    """Simulate one line of the table."""
    deaths = list(traffic.deaths(replicas, seconds, deaths_per_hour)) if replicas > 1 else []
    outcome = Cluster(replicas).run(requests, deaths)
    if load is None:
        places = sum(work.places for _, work in requests)
        load = places / traffic.MEAN_PLACES / seconds / replicas / capacity_per_s()
    return Line(replicas, load, len(outcome.refused) / len(requests), outcome)


def page() -> None:
    """Simulate what docs/scaling.md shows, and write it."""
    begun, found = result_file.begin(wait=False, code=("service/scheduling",)), dict[str, dict[str, float]]()
    for replicas in PAGE_REPLICAS:
        requests = list(traffic.at_rate(MILLION_PER_S, PAGE_S))
        found[f"{replicas}"] = simulate(replicas, requests, PAGE_S, DEATHS_PER_HOUR).figures()
    made = begun.made(describe(0), timed=False)
    result_file.write("scaling", made, {"passes_per_s": passes_per_s(), "million": found})


def passes_per_s() -> float:
    """Return how many row-steps one replica does in a second at most."""
    return 1 / TickTimes(TICKS).seconds_per_place(LIMITS.max_batch)


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__.partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="write bench/results/scaling.json")
    parser.add_argument("--replicas", default="1,3,10,100")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--load", default="0.8,1.5", help="of what all replicas can do")
    parser.add_argument("--per-s", type=float, help="requests a second, instead of --load")
    parser.add_argument("--traffic", type=Path, help="a file that bench/traffic.py wrote, instead of --load")
    parser.add_argument("--deaths", type=float, default=DEATHS_PER_HOUR, help="of each replica, an hour")
    args = parser.parse_args()
    if args.page:
        page()
        return
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    recorded = traffic.read(args.traffic) if args.traffic is not None else None
    for load in [None] if recorded or args.per_s else map(float, args.load.split(",")):
        for replicas in map(int, args.replicas.split(",")):
            per_s = args.per_s if load is None else load * replicas * capacity_per_s()
            requests = recorded or list(traffic.at_rate(per_s, args.seconds))
            seconds = max(args.seconds, requests[-1][0]) if recorded is None else requests[-1][0]
            print(simulate(replicas, requests, seconds, args.deaths, load).row(), flush=True)


if __name__ == "__main__":
    main()
