"""A fluid model of one model's scheduler. Pure: no torch, no asyncio, no clock, no lock.

Between two events (a job ends, its guidance goes on or off, it overtakes another) every job has the same number of rows
in each tick, so the fluid model takes all the ticks between two events in one step.
"""

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from operator import attrgetter

from tminus.service.scheduling.scheduler import Sharing
from tminus.service.scheduling.tick_times import TickTimes
from tminus.service.work import Work

LOOK_PAST = 8  # how many guided jobs the model looks past for one that fits a last single place
ROUNDING = 1e-7  # of a step and of a second: sums of parts are not exact


@dataclass(frozen=True, slots=True)
class Pending:
    """A job as the forecast needs it. Its rows are taken to be level, as the scheduler keeps them."""

    job_id: str
    work: Work
    places_left: float  # of all its rows
    beside_s: float = 0.0  # of a latent model, what is left to encode and decode, in seconds


class _Flow:
    """A job in the model, as stretches of steps that cost the same; the current stretch is kept apart."""

    __slots__ = ("arrival", "beside_s", "id", "left", "places", "rows", "steps", "stretches", "waits", "whole")

    def __init__(self, job: Pending, arrival: int) -> None:
        self.id, self.arrival, self.rows = job.job_id, arrival, job.work.rows
        self.whole, self.left, self.beside_s = job.work.places, job.places_left, job.beside_s
        self.waits = True  # never had a place yet
        self.stretches = _stretches(job.work, job.places_left / job.work.rows)
        self.steps, self.places = self.stretches.pop()  # in this stretch: the steps each row has left, the cost of one


def _stretches(work: Work, left: float) -> list[tuple[float, int]]:
    """The stretches that one row has left, as (steps, places a step), the last one first."""
    guided = work.guided
    stretches: list[tuple[float, int]] = []
    if not guided:
        return [(left, 1)]
    for steps, places in ((work.steps - guided.stop, 1), (len(guided), 2), (guided.start, 1)):
        if steps and left > 0:
            stretches.append((min(steps, left / places), places))
            left -= steps * places
    return stretches


_SHORTEST_FIRST: Callable[[_Flow], tuple[float, int]] = attrgetter("left", "arrival")
_IN_ORDER: Callable[[_Flow], tuple[float, int]] = attrgetter("arrival", "arrival")


class Fluid:
    """The fluid model. Owns its state: a time from 0 s on, and the jobs of that time."""

    def __init__(
        self, jobs: Iterable[Pending], sharing: Sharing, tick_times: TickTimes, arrivals: Iterable[int] | None = None
    ) -> None:
        """jobs: in order of arrival. arrivals: their numbers among the jobs of all models."""
        self._sharing, self._shortest_first = sharing, sharing.policy == "srpt"
        self._rank = _SHORTEST_FIRST if self._shortest_first else _IN_ORDER
        self._tick_times, self._tick_cache = tick_times, dict[int, float]()
        self._jobs: OrderedDict[int, _Flow] = OrderedDict()  # by arrival, in its order
        self._waiting: list[_Flow] = []  # those that never had a place, the next one first
        self._active: list[_Flow] = []  # the others
        self._grants: list[tuple[_Flow, int]] = []  # how many rows each job has in a tick until the next event, by rank
        self._stale = True  # whether the grants must be found again
        self._short: list[int] = []  # positions of the grants that have fewer rows than the job
        self._used = 0  # places of a tick
        self._ticks = 0.0
        self.now_s = 0.0
        self.tick_end_s = 0.0  # the end of the tick that now_s lies in: the worker sees then what happened in it
        self.rows = 0
        self.places_left = 0.0
        self.beside_s = 0.0  # of the jobs whose ticks are not over
        for arrival, job in zip(count() if arrivals is None else arrivals, jobs, strict=False):
            if job.places_left > 0:
                self._count_in(job, arrival)
        self._waiting = sorted(self._jobs.values(), key=self._rank)

    @property
    def jobs(self) -> int:
        """How many jobs there are now."""
        return len(self._jobs)

    @property
    def oldest(self) -> int:
        """The number of the oldest job."""
        return next(iter(self._jobs))

    @property
    def next_rank(self) -> tuple[float, int]:
        """As of the scheduler, of the job that goes next."""
        first = min((*self._active, *self._waiting[:1]), key=self._rank)
        return (first.left * self._sharing.place_s if self._shortest_first else 0.0), first.arrival

    @property
    def reserves(self) -> bool:
        """Whether places are kept for the oldest job."""
        return self._sharing.reserved > 0

    @property
    def next_pace(self) -> float:
        """How many seconds of work are done a second of the job that goes next."""
        self._share_out()
        arrival, tick_s = self.next_rank[1], self._tick_seconds(self._used)
        places = sum(rows * job.places for job, rows in self._grants if job.arrival == arrival)
        return places * self._sharing.place_s / tick_s if tick_s else math.inf

    @property
    def longest_tick_s(self) -> float:
        """How long a full tick takes."""
        return self._tick_seconds(self._sharing.max_batch)

    @property
    def event_s(self) -> float:
        """How long it is to the next event."""
        self._share_out()
        return self._ticks_to_event() * self._tick_seconds(self._used)

    def running(self) -> frozenset[str]:
        """The jobs all of whose rows step now."""
        self._share_out()
        return frozenset(job.id for job, rows in self._grants if rows == job.rows)

    def step(self, until_s: float = math.inf) -> list[str]:
        """Go on to the next event, but no further than a time; returns the jobs that ended."""
        if not self._jobs:
            self.now_s = self.tick_end_s = until_s if self.now_s < until_s < math.inf else self.now_s
            return []
        until_s = max(until_s, self.now_s)
        self._share_out()
        tick_s = self._tick_seconds(self._used)
        ticks = self._ticks_to_event()
        if tick_s:
            ticks = min(ticks, (until_s - self.now_s) / tick_s)
        self._ticks += ticks
        self.now_s = until_s if (until_s - self.now_s) <= ticks * tick_s else self.now_s + ticks * tick_s
        self.tick_end_s = self.now_s + (math.ceil(self._ticks - ROUNDING) - self._ticks) * tick_s
        self.places_left -= ticks * self._used
        return self._move(ticks)

    def _count_in(self, job: Pending, arrival: int) -> None:
        flow = self._jobs[arrival] = _Flow(job, arrival)
        self.rows += flow.rows
        self.places_left += flow.left
        self.beside_s += flow.beside_s

    def _move(self, ticks: float) -> list[str]:
        ended = []
        for job, rows in self._grants:
            job.left -= ticks * rows * job.places
            job.steps -= ticks * rows / job.rows
            if job.steps > ROUNDING:
                continue
            self._stale = True
            if job.stretches:
                job.steps, job.places = job.stretches.pop()
            else:
                ended.append(job.id)
                del self._jobs[job.arrival]
                self._active.remove(job)
                self.rows -= job.rows
                self.beside_s -= job.beside_s
        if self._shortest_first and self._short:
            self._stale = True  # a job may have overtaken another
        if not self._jobs:
            self.places_left = 0.0
        return ended

    def _share_out(self) -> None:
        """Share out the places of a tick as the scheduler does: the reserve to the oldest job, then to all in turn."""
        if not self._stale:
            return
        self._stale, self._grants = False, []
        if not self._jobs:
            return
        much_longer = self._sharing.much_longer([job.whole for job in self._jobs.values()])
        oldest = next(iter(self._jobs.values()))
        reserve = self._reserve_for(oldest)
        free = self._sharing.max_batch - reserve
        looked_past = 0
        for job in self._in_turn() if free else ():
            mine, reserve = (reserve, 0) if job is oldest else (0, reserve)
            held_back = job.whole >= much_longer
            rows = min(job.rows, (mine + self._sharing.room(free, held_back=held_back)) // job.places)
            free += mine - rows * job.places
            if rows:
                self._grants.append((job, rows))
            elif not held_back:
                looked_past += 1
            if free == 0 or looked_past == LOOK_PAST:
                break
        if reserve:
            self._grants.append((oldest, reserve // oldest.places))
        self._short = [at for at, (job, rows) in enumerate(self._grants) if rows < job.rows]
        self._used = self._sharing.max_batch - free

    def _reserve_for(self, oldest: _Flow) -> int:
        """How many of the reserved places the oldest job can use."""
        if self._sharing.reserved and oldest.waits:
            del self._waiting[bisect_left(self._waiting, self._rank(oldest), key=self._rank)]
            self._activate(oldest, 0)
        return min(oldest.rows, self._sharing.reserved // oldest.places) * oldest.places

    def _in_turn(self) -> Iterator[_Flow]:
        """The jobs by rank. A job that is reached becomes active."""
        active, waiting, rank = self._active, self._waiting, self._rank
        active.sort(key=rank)
        at = 0
        while waiting:
            turn = bisect_left(active, rank(waiting[0]), at, key=rank)
            yield from active[at:turn]
            self._activate(waiting.pop(0), turn)
            yield active[turn]
            at = turn + 1
        yield from active[at:]

    def _activate(self, job: _Flow, at: int) -> None:
        job.waits = False
        self._active.insert(at, job)

    def _ticks_to_event(self) -> float:
        """Ticks until a job ends or its cost changes, or until a job that is short of places overtakes another."""
        grants = self._grants
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
