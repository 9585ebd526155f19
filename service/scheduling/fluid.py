"""A fluid model of one model's scheduler. Pure: no torch, no asyncio, no clock, no lock.

Between two events (a job ends, its guidance goes on or off, it overtakes another, an owner has caught up with another)
every job has the same number of rows in each tick, so the fluid model takes all the ticks between two events in one
step.
"""

import math
from collections.abc import Iterable, Mapping
from heapq import nsmallest
from itertools import count, pairwise

from tminus.service.scheduling.flows import LEAST, Flow, OwnerFlows, Pending
from tminus.service.scheduling.owners import BURST_S, fill, levels
from tminus.service.scheduling.scheduler import Rank
from tminus.service.scheduling.sharing import Sharing
from tminus.service.scheduling.tick_times import TickTimes

LEVEL_S = 0.005
ROUNDING = 1e-7  # of a step and of a second: sums of parts are not exact


class Fluid:
    """The fluid model. Owns its state: a time from 0 s on, and the jobs of that time."""

    def __init__(
        self,
        jobs: Iterable[Pending],
        sharing: Sharing,
        tick_times: TickTimes,
        arrivals: Iterable[int] | None = None,
        had_s: dict[str, float] | None = None,
    ) -> None:
        """jobs: in order of arrival. arrivals: their numbers among the jobs of all models.

        had_s: what each owner has had; it is kept up to date here, and by the fluid models of other models that have
        the same one.
        """
        self._sharing, self._shortest_first = sharing, sharing.policy == "srpt"
        self._tick_times, self._tick_cache = tick_times, dict[int, float]()
        self._owners: dict[str, OwnerFlows] = {}  # those that have jobs
        self._had_s = dict[str, float]() if had_s is None else had_s
        self._grants: list[tuple[Flow, float]] = []  # how many rows each job has in a tick until the next event
        self._stale = True  # whether the grants must be found again
        self._short: list[int] = []  # positions of the grants that have fewer rows than the job
        self._used = 0.0  # places of a tick
        self._leader: str | None = None  # the owner that goes before all others until the next event
        self._places: dict[str, float] = {}  # of a tick that each owner has
        self._first_grant: dict[str, int] = {}  # where its grants begin, one after the other
        self._ticks = 0.0
        self.now_s = 0.0
        self.tick_end_s = 0.0  # the end of the tick that now_s lies in: the worker sees then what happened in it
        self.jobs = 0  # now
        self.rows = 0
        self.places_left = 0.0
        by_owner: dict[str, list[Flow]] = {}
        for arrival, job in zip(count() if arrivals is None else arrivals, jobs, strict=False):
            if job.places_left > 0:
                by_owner.setdefault(job.owner, []).append(self._count_in(job, arrival))
        for owner, flows in by_owner.items():
            self._owners[owner] = OwnerFlows(sharing)
            self._owners[owner].put_all(flows)
            had = self._had_s.setdefault(owner, 0.0)
            # The more owners there are, the more of them are taken to be level, or a forecast has no end.
            self._had_s[owner] = round(had / (level_s := LEVEL_S * len(by_owner))) * level_s

    @property
    def owners(self) -> Mapping[str, OwnerFlows]:
        """The jobs by owner."""
        return self._owners

    @property
    def oldest(self) -> int:
        """The number of the oldest job of the owner whose turn it is."""
        return self._owners[self.first_owner].oldest.arrival

    @property
    def next_rank(self) -> Rank:
        """As of the scheduler, of the job that goes next."""
        owner = self.first_owner
        first = self._owners[owner].next
        left_s = first.left * self._sharing.place_s if self._shortest_first else 0.0
        return self._had_s[owner], left_s, first.arrival

    @property
    def reserves(self) -> bool:
        """Whether places are kept for the oldest job."""
        return self._sharing.reserved > 0

    @property
    def next_pace(self) -> float:
        """How many seconds of work are done a second of the job that goes next."""
        self._share_out()
        arrival, tick_s = self.next_rank[2], self._tick_seconds(self._used)
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
        if not self.jobs:
            self.now_s = self.tick_end_s = until_s if self.now_s < until_s < math.inf else self.now_s
            return []
        until_s = max(until_s, self.now_s)
        self._share_out()
        tick_s = self._tick_seconds(self._used)
        ticks = self._ticks_to_event()
        assert ticks > 0
        if tick_s:
            ticks = min(ticks, (until_s - self.now_s) / tick_s)
        self._ticks += ticks
        self.now_s = until_s if (until_s - self.now_s) <= ticks * tick_s else self.now_s + ticks * tick_s
        self.tick_end_s = self.now_s + (math.ceil(self._ticks - ROUNDING) - self._ticks) * tick_s
        self.places_left -= ticks * self._used
        return self._move(ticks)

    def _count_in(self, job: Pending, arrival: int) -> Flow:
        flow = Flow(job, arrival)
        self.jobs += 1
        self.rows += flow.rows
        self.places_left += flow.left
        return flow

    def _move(self, ticks: float) -> list[str]:
        ended = []
        if len(self._owners) > 1:
            self._stale = True  # of several owners, what each has had counts
        if len(self._had_s) > 1:
            self._let_owners_have(ticks)
        for owner, places in self._places.items():
            self._owners[owner].places_left -= ticks * places
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
                self._end(job)
        if self._shortest_first and self._short:
            self._stale = True  # a job may have overtaken another
        if not self.jobs:
            self.places_left = 0.0
        return ended

    def _let_owners_have(self, ticks: float) -> None:
        had_s = self._had_s
        for owner, seconds in self._sharing.seconds(self._places, self._leader).items():
            had_s[owner] += ticks * seconds
        least_s = max(map(had_s.__getitem__, self._owners)) - BURST_S
        for owner in self._owners:
            if had_s[owner] < least_s:
                had_s[owner] = least_s

    def _end(self, job: Flow) -> None:
        self._owners[job.owner].end(job)
        if not self._owners[job.owner]:
            del self._owners[job.owner]
        self.jobs -= 1
        self.rows -= job.rows

    @property
    def first_owner(self) -> str:
        """The owner that has had least."""
        if len(self._owners) == 1:
            return next(iter(self._owners))
        return min(self._owners, key=lambda owner: (self._had_s[owner], self._owners[owner].oldest.arrival))

    def _levels(self) -> list[list[str]]:
        return levels({owner: self._had_s[owner] for owner in self._owners}, self._sharing.tick_s)

    def _share_out(self) -> None:
        """Share out the places of a tick as the scheduler does."""
        if not self._stale:
            return
        self._stale, self._grants, self._used, self._leader = False, [], 0.0, None
        self._places, self._first_grant = {}, {}
        if not self.jobs:
            return
        if len(self._owners) == 1:
            ((owner, flows),) = self._owners.items()
            self._grant(owner, self._sharing.max_batch, flows.much_longer)
        else:
            self._share_out_to_owners()
        self._short = [at for at, (job, rows) in enumerate(self._grants) if rows < job.rows]

    def _share_out_to_owners(self) -> None:
        sharing, groups = self._sharing, self._levels()
        if len(groups) > 1 and len(groups[0]) == 1:
            first_s, second_s = (self._had_s[group[0]] for group in groups[:2])
            self._leader = groups[0][0] if sharing.leads(second_s - first_s) else None
        free: float = sharing.max_batch
        for group in groups:
            wants = {owner: self._owners[owner].places_now for owner in group}
            before = self._used
            for owner, places in fill(free, wants).items():
                self._grant(owner, places, self._owners[owner].much_longer if owner == self._leader else math.inf)
            free = max(0.0, free - (self._used - before))
            if group[0] == self._leader:
                free = min(free, sharing.beside(self._used))
            if free <= LEAST:
                break

    def _grant(self, owner: str, places: float, longer: float) -> None:
        begin, before = len(self._grants), self._used
        free = self._sharing.max_batch - self._used
        self._grants += self._owners[owner].share_out(places, free, longer)
        if len(self._grants) > begin:
            self._first_grant[owner] = begin
            self._used += sum(rows * job.places for job, rows in self._grants[begin:])
            self._places[owner] = self._used - before

    def _ticks_to_event(self) -> float:
        """Ticks until a job ends or its cost changes, until one that is short of places overtakes another, …"""
        grants = self._grants
        ticks = min([job.steps * job.rows / rows for job, rows in grants])
        if len(self._owners) > 1:
            ticks = min(ticks, self._ticks_to_catch_up())
        if not self._shortest_first:
            return ticks
        for at in self._short:
            job, rows = grants[at]
            speed = rows * job.places
            for other, other_rows in grants[self._first_grant[job.owner] : at]:
                faster = speed - other_rows * other.places
                if faster > 0 and other.left <= job.left:
                    ticks = min(ticks, max(1.0, (job.left - other.left) / faster))
        return ticks

    def _ticks_to_catch_up(self) -> float:
        """Ticks until an owner is level with the next one, or until the first begins or ceases to lead."""
        sharing, groups, ticks = self._sharing, self._levels(), math.inf
        pace = dict.fromkeys(self._owners, 0.0) | sharing.seconds(self._places, self._leader)
        for lower, upper in pairwise(groups):
            for owner in lower:
                faster = pace[owner] - pace[upper[0]]
                if faster > 0:
                    ahead_s = self._had_s[upper[0]] - self._had_s[owner] - sharing.tick_s / 2
                    ticks = min(ticks, max(1.0, ahead_s / faster))
        first, second = nsmallest(2, self._owners, key=lambda owner: (self._had_s[owner], pace[owner]))
        beyond_s = self._had_s[second] - self._had_s[first] - sharing.lead_s
        slower = pace[second] - pace[first]
        if beyond_s * slower < 0:
            ticks = min(ticks, max(1.0, -beyond_s / slower + ROUNDING))
        return ticks

    def _tick_seconds(self, places: float) -> float:
        count = math.ceil(places - ROUNDING)
        if count not in self._tick_cache:
            self._tick_cache[count] = self._tick_times.seconds(count)
        return self._tick_cache[count]
