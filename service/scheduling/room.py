"""Checks a new job against the limits, and computes when a refused client should retry. Pure: no clock.

A refusal reserves no capacity, because the client may not come back. It only gives each client a different retry time.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tminus.service.byte_budget import SHARE
from tminus.service.model_info import Limits
from tminus.service.scheduling.forecast import Pending, Simulation, Speed, Stride
from tminus.service.work import Work

PARTS = 1000  # resolution of BacklogForecast.room_s: 1/PARTS of the interval between two points
MARGIN = 1.05  # factor applied to forecast times, because a forecast can be 5 % too early
SPREAD_S = 300.0  # longest queue of retry times, in seconds; the times of further clients are spread evenly within it
GOLDEN = (math.sqrt(5) - 1) / 2  # the fractional parts of this number's multiples are spread evenly over [0, 1)
ROUNDING = 1e-6  # tolerance when seconds or limits are compared


@dataclass(frozen=True, slots=True)
class Load:
    """The quantities that have limits: a sum over all jobs, or over one owner's jobs."""

    jobs: int = 0
    rows: Mapping[int, int] = field(default_factory=dict)  # keyed by model number: each model has its own slots
    ticks_s: float = 0.0  # duration of the remaining work in seconds, if every tick is full
    autoencoder_s: float = 0.0  # remaining seconds to encode and decode, for latent models
    own: "Load | None" = None  # load of the new job's owner, if several owners share the server

    def decoding(self, part: float, at_first: "Load") -> "Load":
        """Return a copy in which the autoencoder's remaining time is `part` times that of `at_first`."""
        autoencoder_s = part * at_first.autoencoder_s
        jobs = max(self.jobs, 1) if autoencoder_s > ROUNDING else self.jobs  # a server is not idle while it decodes
        own = None if self.own is None or at_first.own is None else self.own.decoding(part, at_first.own)
        return replace(self, jobs=jobs, autoencoder_s=autoencoder_s, own=own)

    def values(self, work: Work, speed: Speed) -> dict[str, float]:
        """Add a new job to the load. Returns each limited quantity, keyed by the name of its limit."""
        work_s = work.places * speed.place_s + work.autoencoder_s
        return {
            "backlog_s": self.ticks_s + self.autoencoder_s + work_s,
            "jobs": self.jobs + 1,
            "rows": self.rows.get(work.model, 0) + work.rows,
        }


def load_of(jobs: Sequence[Pending], speeds: Mapping[int, Speed], owner: str | None = None) -> Load:
    """Add up the load of jobs. owner: the new job's owner, if several owners share the server."""
    rows: Counter[int] = Counter()
    places: Counter[int] = Counter()  # keyed by model number; integers, so the sum has no rounding errors
    for job in jobs:
        rows[job.work.model] += job.work.rows
        places[job.work.model] += job.places_left
    ticks_s = sum(count * speeds[model].place_s for model, count in places.items())
    own = None if owner is None else load_of([job for job in jobs if job.owner == owner], speeds)
    return Load(len(jobs), rows, ticks_s, sum(job.autoencoder_s for job in jobs), own)


@dataclass(frozen=True, slots=True)
class Overload:
    """A limit that a new job would exceed."""

    field: str
    value: float
    limit: float
    of_owner: bool = False  # True if the limit is that of one owner, not of the whole server


def find_overload(load: Load, work: Work, limits: Limits, speed: Speed) -> Overload | None:
    """Return the first limit that a new job would exceed, or None. A server without jobs accepts any job.

    load: the load of the accepted jobs. speed: the speed of the new job's model.

    If several owners share the server, an owner that already has a job may use at most SHARE of the capacity that the
    other owners leave free. This keeps some capacity available for others.
    """
    if not load.jobs:
        return None
    bounds = {"backlog_s": limits.max_backlog_s, "jobs": limits.max_jobs, "rows": speed.max_rows}
    values = load.values(work, speed)
    if load.own is not None and load.own.jobs:
        for name, value in load.own.values(work, speed).items():
            limit = SHARE * (bounds[name] - (values[name] - value))
            limit = limit if name == "backlog_s" else math.floor(limit + ROUNDING)
            if value > limit * (1 + ROUNDING):
                return Overload(name, value, limit, of_owner=True)
    for name, value in values.items():
        if value > bounds[name] * (1 + ROUNDING):
            return Overload(name, value, bounds[name])
    return None


class BacklogForecast:
    """Predicts how the load of accepted jobs decreases over time, assuming that no other job arrives.

    The forecast assumes that the autoencoder is always busy. This is nearly true whenever the autoencoder's work is the
    reason for a refusal.
    """

    def __init__(
        self,
        jobs: Sequence[Pending],
        now_s: float,
        limits: Limits,
        speeds: Mapping[int, Speed],
        service_time_s: Mapping[str, float] | None = None,
        owner: str | None = None,
    ) -> None:
        """service_time_s: keyed by owner. owner: the new job's owner, if several owners share the server."""
        self._limits, self._speeds, self._owner = limits, speeds, owner
        simulation = Simulation(jobs, speeds, service_time_s)
        self._jobs = {job.job_id: job for job in jobs}
        # Allow one tick until a job can begin, and one more tick until the server notices that a job has ended.
        starts_s = now_s + 2 * max(speed.longest_tick_s for speed in speeds.values())
        # The ledger counts an image until it is fully decoded.
        decodes_s = starts_s + max(speed.decode_s for speed in speeds.values())
        at_first = load_of(jobs, speeds, owner)
        load = load_of([job for job in jobs if job.places_left > 0], speeds, owner)
        self._points: list[tuple[float, Load]] = []

        def note(time_s: float) -> None:
            decoded_s = max(0.0, time_s - decodes_s)
            part = max(0.0, 1 - decoded_s / at_first.autoencoder_s) if at_first.autoencoder_s else 0.0
            self._points.append((time_s, load.decoding(part, at_first)))

        note(starts_s)
        while load.jobs and (stride := simulation.step()) is not None:
            own = None if load.own is None else self._less(load.own, stride, owner)
            load = replace(self._less(load, stride), own=own)
            note(starts_s + MARGIN * simulation.now_s)
        for time_s in (decodes_s, decodes_s + at_first.autoencoder_s):
            if time_s > self._points[-1][0]:
                note(time_s)

    def _less(self, load: Load, stride: Stride, owner: str | None = None) -> Load:
        """Subtract a stride from a load. owner: subtract only this owner's work; None: all work."""
        stepped = [job for job_id in stride.places if owner in (None, (job := self._jobs[job_id]).owner)]
        ended = [job for job in stepped if job.job_id in stride.ended]
        ended_rows = sum(job.work.rows for job in ended)
        rows = {**load.rows, stride.model: load.rows.get(stride.model, 0) - ended_rows}  # there may be no entry
        done_s = self._speeds[stride.model].place_s * sum(stride.places[job.job_id] for job in stepped)
        return replace(load, jobs=load.jobs - len(ended), rows=rows, ticks_s=load.ticks_s - done_s)

    def room_s(self, work: Work, speed: Speed) -> float:
        """Return the earliest time at which a new job would exceed no limit."""

        def fits(load: Load) -> bool:
            return find_overload(load, work, self._limits, speed) is None

        at = bisect_left(self._points, True, key=lambda point: fits(point[1]))
        room_s, load = self._points[at]
        if at == 0:
            return room_s
        before_s, before = self._points[at - 1]
        # Between two points, the remaining work decreases linearly. The numbers of jobs and rows stay the same.
        part = bisect_left(range(PARTS), True, key=lambda part: fits(_between(before, load, part / PARTS)))
        return before_s + part / PARTS * (room_s - before_s)

    def share_s(self, overload: Overload, work: Work, speed: Speed) -> float:
        """Return how many seconds the server needs, on average, to free enough capacity for one such job."""
        if overload.field == "backlog_s":
            return MARGIN * (work.places * speed.place_s + work.autoencoder_s)
        starts_s, load = self._points[0]
        rows = load.rows.get(work.model, 0)
        share = 1 / max(1, load.jobs) if overload.field == "jobs" else work.rows / max(1, rows)
        return share * (self._points[-1][0] - starts_s)


def _between(before: Load, after: Load, part: float) -> Load:
    """Interpolate between two loads. part: the fraction of the time that has passed, from 0 to 1."""
    own = None if before.own is None else _between(before.own, after.own or Load(), part)
    ticks_s = before.ticks_s + part * (after.ticks_s - before.ticks_s)
    autoencoder_s = before.autoencoder_s + part * (after.autoencoder_s - before.autoencoder_s)
    return replace(before, ticks_s=ticks_s, autoencoder_s=autoencoder_s, own=own)


class RetryQueue:
    """Spreads the retry times of refused clients.

    Each time is later than the one before, as long as the queue of times fits into SPREAD_S.
    """

    def __init__(self) -> None:
        self._end_s = -math.inf
        self._beyond = 0  # number of clients that no longer fit into SPREAD_S

    def next_s(self, room_s: float, share_s: float) -> float:
        """Return the retry time of the next client.

        room_s: the earliest possible time. share_s: the interval until the following client's time.
        """
        due_s = max(room_s, self._end_s)
        if due_s > room_s + SPREAD_S:
            self._beyond += 1
            return room_s + self._beyond * GOLDEN % 1 * SPREAD_S
        self._end_s = due_s + share_s
        return due_s


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """The work of all replicas of a model, as last reported by each replica."""

    replicas: int = 0  # live replicas
    places_per_s: float = 0.0  # sum over all replicas
    held_s: float = 0.0  # work already taken by a replica, in seconds; the average over all replicas
    jobs: int = 0  # number of jobs that no replica has taken yet
    places: float = 0.0  # remaining work, in places, of the jobs that no replica has taken yet
    least_s: float = math.inf  # seconds of work on the least loaded replica, not counting this one

    @property
    def backlog_s(self) -> float:
        """Predicted seconds until all work is done, if the replicas share the work evenly."""
        return self.held_s + (self.places / self.places_per_s if self.places_per_s else 0.0)

    @property
    def waiting_s(self) -> float:
        """Predicted seconds that one replica would need for all jobs that no replica has taken yet."""
        return self.places * self.replicas / self.places_per_s if self.places_per_s else 0.0

    def overload(self, work: Work, limits: Limits) -> Overload | None:
        """Return the first limit that a new job would exceed, or None.

        The limit on jobs is that of one server, multiplied by the number of replicas.
        """
        if not self.jobs and not self.held_s:
            return None
        own_s = work.places / self.places_per_s if self.places_per_s else 0.0
        if (backlog_s := self.backlog_s + own_s) > limits.max_backlog_s * (1 + ROUNDING):
            return Overload("backlog_s", backlog_s, limits.max_backlog_s)
        if self.jobs + 1 > (most := limits.max_jobs * max(1, self.replicas)):
            return Overload("jobs", self.jobs + 1, most)
        return None

    def room_elsewhere_in_s(self, work: Work, max_backlog_s: float) -> float:
        """Predict the seconds until another replica accepts a job that this server refuses.

        Infinite if there is no other replica. max_backlog_s: 0 if this server refused the job for a reason other than
        its backlog. In that case only an idle replica is sure to accept the job.
        """
        own_s = work.places * self.replicas / self.places_per_s if self.places_per_s else 0.0
        return max(0.0, min(self.least_s, self.least_s + own_s - max_backlog_s))  # an idle replica accepts any job

    def room_in_s(self, overload: Overload) -> float:
        """Predict the seconds until the job would exceed no limit, assuming that no other job arrives."""
        if overload.field == "backlog_s":
            return overload.value - overload.limit
        return self.backlog_s / (self.jobs + 1)


class Intake:
    """Decides which jobs this server takes. All amounts of work are in places.

    A job is taken if little work goes before it. Shorter jobs go first, so a server that is busy with long jobs can
    still take a short one.
    """

    def __init__(self, room: float, held: Iterable[float] = (), *, oldest_us: int | None = None) -> None:
        """room: the maximum work before a job. held: remaining work of each job that this server already has.

        oldest_us: arrival time of the oldest of these jobs.
        """
        self._room, self._held, self._oldest_us = room, sorted(held), oldest_us
        self.refused = math.inf  # work of the shortest job refused so far

    def has_room(self, places: float) -> bool:
        """Return True if a job of this size may be taken. A job with no work before it always may."""
        return sum(self._held[: bisect_right(self._held, places)]) < self._room

    def add(self, places: float) -> None:
        insort(self._held, places)

    def offer(self, places: float) -> bool:
        """Take a job if there is room for it. Returns True if the job was taken."""
        if self.has_room(places):
            self.add(places)
            return True
        self.refused = min(self.refused, places)
        return False

    def offer_oldest(self, places: float, created_us: int) -> bool:
        """Take the oldest waiting job if there is room, or if it is older than every job of this server.

        Returns True if the job was taken. Because the oldest job of a server has a share of each tick, it ends even if
        many shorter jobs arrive.
        """
        if not self._held or (self._oldest_us is not None and created_us < self._oldest_us):
            self.add(places)
            return True
        return self.offer(places)
