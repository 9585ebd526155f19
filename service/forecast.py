"""When each job will end and what is ahead of it. Pure prediction: no torch, no asyncio, no clock, no lock.

A fluid model of the scheduler: between two events (a job ends, its guidance goes on or off, it overtakes another) every
job has the same rows in each tick, so whole stretches of ticks are one step of the model.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter, itemgetter

from service.job import Work
from service.scheduler import Policy

LEARNING_RATE = 0.02  # a slow average: one tick says little
OUTLIER = 4.0  # a tick that took so many times longer than predicted, or less, counts as one that took just that
MAX_CORRECTION = 100.0
LOOK_PAST = 8  # how many guided jobs the model looks past for one that fits a last single place
ROUNDING = 1e-7  # of a step: sums of parts of steps are not exact


@dataclass(frozen=True, slots=True)
class TickTimes:
    """How long a tick takes by its places: measured points, lines between them, and a factor that follows the machine.

    Without points nothing is known, and all takes no time.
    """

    points: tuple[tuple[int, float], ...] = ()  # (places, seconds), places ascending
    correction: float = 1.0

    def __post_init__(self) -> None:
        places = [point[0] for point in self.points]
        assert all(count >= 1 for count in places)
        assert all(a < b for a, b in pairwise(places)), f"places must ascend: {places}"
        assert all(0 <= seconds < math.inf for _, seconds in self.points)

    def seconds(self, places: int) -> float:
        """Predict a tick. Beyond the last point the last line goes on, below the first it costs as much as there."""
        return self.correction * self._measured(places)

    def seconds_per_place(self, max_batch: int) -> float:
        """How long a place takes where ticks are full."""
        return self.seconds(max_batch) / max_batch

    def slower(self, factor: float) -> "TickTimes":
        """The same by a factor."""
        return replace(self, correction=self.correction * factor)

    def observe(self, places: int, seconds: float) -> "TickTimes":
        """Learn from a tick."""
        predicted = self.seconds(places)
        if predicted <= 0 or not seconds >= 0:
            return self
        ratio = min(max(seconds / predicted, 1 / OUTLIER), OUTLIER)
        correction = self.correction * (1 + LEARNING_RATE * (ratio - 1))
        return replace(self, correction=min(max(correction, 1 / MAX_CORRECTION), MAX_CORRECTION))

    def _measured(self, places: int) -> float:
        points = self.points
        if not points:
            return 0.0
        if len(points) == 1:
            return points[0][1] * max(1.0, places / points[0][0])
        if places <= points[0][0]:
            return points[0][1]
        right = min(bisect_right(points, places, key=itemgetter(0)), len(points) - 1)
        (b0, t0), (b1, t1) = points[right - 1 : right + 1]
        slope = (t1 - t0) / (b1 - b0)
        if places > b1:
            slope = max(0.0, slope)  # noise may let the last point look cheaper; more places never are, for long
            return t1 + slope * (places - b1)
        return t0 + slope * (places - b0)


def knee(points: Sequence[tuple[int, float]], share: float = 0.95) -> int:
    """The fewest places whose throughput is at least this share of the best in the table."""
    assert points
    assert 0 < share <= 1
    best = max(places / seconds for places, seconds in points)
    return min(places for places, seconds in points if places / seconds >= share * best)


@dataclass(frozen=True, slots=True)
class Pending:
    """A job as the forecast needs it. Its rows are taken to be at the same step, which the scheduler sees to."""

    job_id: str
    arrival: int
    work: Work
    places_left: float  # of all its rows


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a client is told: how many jobs are ahead of it (0 when all its rows run), and when it will be done."""

    job_id: str
    position: int
    eta_s: float


class _Flow:
    """A job in the model: stretches of steps that cost the same, the current one last."""

    __slots__ = ("arrival", "id", "left", "listed", "places", "rows", "steps", "stretches")

    def __init__(self, job: Pending) -> None:
        self.id, self.arrival, self.rows = job.job_id, job.arrival, job.work.rows
        self.left = float(job.places_left)
        self.listed = True  # in the list of those that never had a place
        self.stretches = _stretches(job.work, job.places_left / job.work.rows)
        self.steps, self.places = self.stretches.pop()  # steps left to each row in this stretch, and what each costs


def _stretches(work: Work, left: float) -> list[tuple[float, int]]:
    """The (steps, places a step) that one row has still to go, from the last to the next."""
    guided = work.guided
    parts = [(work.steps - guided.stop, 1), (len(guided), 2), (guided.start, 1)] if guided else [(work.steps, 1)]
    stretches: list[tuple[float, int]] = []
    for steps, places in parts:
        if steps and left > 0:
            stretches.append((min(steps, left / places), places))
            left -= steps * places
    return stretches


_SHORTEST_FIRST = attrgetter("left", "arrival")
_BY_ARRIVAL = attrgetter("arrival")


class Fluid:
    """The model. Owns its state: a time from 0 s on, and the jobs of that time."""

    def __init__(self, max_batch: int, reserved: int, policy: Policy, tick_times: TickTimes) -> None:
        self._max_batch, self._reserved, self._shortest_first = max_batch, reserved, policy == "srpt"
        self._tick_times, self._tick_cache = tick_times, dict[int, float]()
        self._jobs: OrderedDict[int, _Flow] = OrderedDict()  # by arrival, in its order
        self._waiting: list[tuple[float, int, _Flow]] = []  # those that never had a place, sorted, the next one last
        self._active: list[_Flow] = []
        self._grants: list[tuple[_Flow, int]] | None = None  # rows in each tick of this stretch; None: to be found
        self._short: list[int] = []  # which of the grants are of fewer rows than the job has
        self._used = 0  # places of a tick
        self._ticks = 0.0
        self.now_s = 0.0
        self.tick_end_s = 0.0  # the end of the tick that now_s lies in: when what happened is seen
        self.rows = 0
        self.places_left = 0.0

    @property
    def jobs(self) -> int:
        """How many jobs there are now."""
        return len(self._jobs)

    def add(self, job: Pending) -> None:
        """Let a job in now; in order of arrival. One with nothing left is not counted."""
        if job.places_left <= 0:
            return
        flow = _Flow(job)
        self._jobs[flow.arrival] = flow
        insort(self._waiting, self._entry(flow))
        self.rows += flow.rows
        self.places_left += flow.left
        self._grants = None

    def running(self) -> frozenset[str]:
        """The jobs all of whose rows step now."""
        return frozenset(job.id for job, rows in self._find_grants() if rows == job.rows)

    def step(self, until_s: float = math.inf, until_places: float = -math.inf) -> list[str]:
        """Go on to the next event, but no further than a time or places left; returns the jobs that ended."""
        if not self._jobs:
            self.now_s = self.tick_end_s = until_s if self.now_s < until_s < math.inf else self.now_s
            return []
        until_s = max(until_s, self.now_s)
        grants = self._find_grants()
        used = self._used
        tick_s = self._tick_seconds(used)
        ticks = self._ticks_to_event(grants)
        limit = min((until_s - self.now_s) / tick_s if tick_s else math.inf, (self.places_left - until_places) / used)
        if limit < ticks:
            ticks = max(0.0, limit)
        self._ticks += ticks
        self.now_s = until_s if (until_s - self.now_s) <= ticks * tick_s else self.now_s + ticks * tick_s
        self.tick_end_s = self.now_s + (math.ceil(self._ticks - ROUNDING) - self._ticks) * tick_s
        self.places_left -= ticks * used
        return self._move(grants, ticks)

    def _move(self, grants: list[tuple[_Flow, int]], ticks: float) -> list[str]:
        ended = []
        for job, rows in grants:
            job.left -= ticks * rows * job.places
            job.steps -= ticks * rows / job.rows
            if job.steps > ROUNDING:
                continue
            self._grants = None
            if job.stretches:
                job.steps, job.places = job.stretches.pop()
            else:
                ended.append(job.id)
                del self._jobs[job.arrival]
                self._active.remove(job)
                self.rows -= job.rows
        if self._shortest_first and self._short:
            self._grants = None  # one may have overtaken another
        if not self._jobs:
            self.places_left = 0.0
        return ended

    def _find_grants(self) -> list[tuple[_Flow, int]]:
        """Give the places of a tick to jobs, as the scheduler would."""
        if self._grants is not None:
            return self._grants
        grants: list[tuple[_Flow, int]] = []
        self._grants, self._short, self._used = grants, [], 0
        if not self._jobs:
            return grants
        active, waiting, by_left = self._active, self._waiting, self._shortest_first
        oldest, kept = next(iter(self._jobs.values())), 0
        if self._reserved:
            kept = min(oldest.rows, self._reserved // oldest.places)
            self._activate(oldest)
        active.sort(key=_SHORTEST_FIRST if by_left else _BY_ARRIVAL)
        free, at, looked_past, seen_oldest = self._max_batch - kept * oldest.places, 0, 0, kept == 0
        next_rank = -waiting[-1][0] if waiting else math.inf
        while free > 0 and looked_past < LOOK_PAST:
            job = active[at] if at < len(active) else None
            if waiting and (
                job is None or ((job.left if by_left else job.arrival) >= next_rank and self._entry(job) < waiting[-1])
            ):
                job = waiting.pop()[2]
                job.listed = False
                active.insert(at, job)
                next_rank = -waiting[-1][0] if waiting else math.inf
            if job is None:
                break
            at += 1
            rows = 0
            if job is oldest:
                rows, seen_oldest = kept, True
            more = min(job.rows - rows, free // job.places)
            free -= more * job.places
            rows += more
            if not rows:
                looked_past += 1
                continue
            if rows < job.rows:
                self._short.append(len(grants))
            grants.append((job, rows))
        if not seen_oldest:
            if kept < oldest.rows:
                self._short.append(len(grants))
            grants.append((oldest, kept))
        self._used = self._max_batch - free
        return grants

    def _activate(self, job: _Flow) -> None:
        if job.listed:
            job.listed = False
            del self._waiting[bisect_left(self._waiting, self._entry(job))]
            self._active.append(job)

    def _entry(self, job: _Flow) -> tuple[float, int, _Flow]:
        return (-job.left if self._shortest_first else -job.arrival, -job.arrival, job)

    def _ticks_to_event(self, grants: list[tuple[_Flow, int]]) -> float:
        """Ticks until a job ends or changes its cost, or one that lacks places overtakes one that has them."""
        ticks = min([job.steps * job.rows / rows for job, rows in grants])
        if not self._shortest_first:
            return ticks
        for at in self._short:
            job, rows = grants[at]
            speed = rows * job.places
            for other, other_rows in grants[:at]:
                faster = speed - other_rows * other.places
                if faster > 0 and other.left <= job.left:
                    ticks = min(ticks, max(1.0, (job.left - other.left) / faster))
        return ticks

    def _tick_seconds(self, places: int) -> float:
        if places not in self._tick_cache:
            self._tick_cache[places] = self._tick_times.seconds(places)
        return self._tick_cache[places]


def forecast(
    jobs: Iterable[Pending],
    max_batch: int,
    reserved: int,
    policy: Policy,
    tick_times: TickTimes,
    until: str | None = None,
) -> dict[str, Outlook]:
    """Predict each job's end if no other comes; with `until`, of that job and those that end before it."""
    waiting = sorted(jobs, key=lambda job: job.arrival)
    fluid = Fluid(max_batch, reserved, policy, tick_times)
    outlooks: dict[str, Outlook] = {}
    for job in waiting:
        fluid.add(job)
        if job.places_left <= 0:
            outlooks[job.job_id] = Outlook(job.job_id, 0, 0.0)  # only to be delivered
    if policy == "srpt":
        waiting.sort(key=lambda job: job.places_left)
    ranks = {job.job_id: rank for rank, job in enumerate(waiting)}
    running = fluid.running()
    ended_ranks: list[int] = []
    while fluid.jobs and until not in outlooks:
        ended = fluid.step()
        for job_id in ended:
            insort(ended_ranks, ranks[job_id])
        for job_id in ended:
            position = 0 if job_id in running else bisect_left(ended_ranks, ranks[job_id])
            outlooks[job_id] = Outlook(job_id, position, fluid.tick_end_s)
    return outlooks
