"""Decides whether a server or its replicas have room for a job, and when a refused client should retry. Pure: no clock.

A refusal reserves no room, since a client may not come back. It only gives each client a different time.
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

PARTS = 1000  # a room forecast is exact to this part of the time between two events
MARGIN = 1.05  # factor on forecast times, since the forecast errs by up to 5 %
SPREAD_S = 300.0  # the most that the retry queue reaches ahead; later clients get a time within it
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly
ROUNDING = 1e-6  # for comparisons of seconds and of limits


@dataclass(frozen=True, slots=True)
class Load:
    """The quantities that the limits bound, for all jobs or for one owner's jobs."""

    jobs: int = 0
    rows: Mapping[int, int] = field(default_factory=dict)  # keyed by model, since each model has its own slots
    ticks_s: float = 0.0  # left, in full ticks
    autoencoder_s: float = 0.0  # left to encode and decode, for latent models
    own: "Load | None" = None  # the part of the request's owner, if several share the server

    def decoding(self, part: float, at_first: "Load") -> "Load":
        """Return this load with `part` of the autoencoder's time in the first load."""
        autoencoder_s = part * at_first.autoencoder_s
        jobs = max(self.jobs, 1) if autoencoder_s > ROUNDING else self.jobs  # a server that decodes is not idle
        own = None if self.own is None or at_first.own is None else self.own.decoding(part, at_first.own)
        return replace(self, jobs=jobs, autoencoder_s=autoencoder_s, own=own)

    def values(self, work: Work, speed: Speed) -> dict[str, float]:
        """Return each bounded quantity with one more job, by the limit's name."""
        work_s = work.places * speed.place_s + work.autoencoder_s
        return {
            "backlog_s": self.ticks_s + self.autoencoder_s + work_s,
            "jobs": self.jobs + 1,
            "rows": self.rows.get(work.model, 0) + work.rows,
        }


def load_of(jobs: Sequence[Pending], speeds: Mapping[int, Speed], owner: str | None = None) -> Load:
    """Add up the load of jobs. owner: the owner of the request, if several share the server."""
    rows: Counter[int] = Counter()
    places: Counter[int] = Counter()  # keyed by model, so that integers are added
    for job in jobs:
        rows[job.work.model] += job.work.rows
        places[job.work.model] += job.places_left
    ticks_s = sum(count * speeds[model].place_s for model, count in places.items())
    own = None if owner is None else load_of([job for job in jobs if job.owner == owner], speeds)
    return Load(len(jobs), rows, ticks_s, sum(job.autoencoder_s for job in jobs), own)


@dataclass(frozen=True, slots=True)
class Overload:
    """A limit that a job would exceed, and the value that would exceed it."""

    field: str
    value: float
    limit: float
    of_owner: bool = False  # whether the limit is for one owner


def find_overload(load: Load, work: Work, limits: Limits, speed: Speed) -> Overload | None:
    """Return the first limit that one more job would exceed. An idle server has room for any job.

    load: of the jobs here. speed: of the new job's model. If several owners share the server, an owner with jobs may
    hold at most SHARE of what the others leave, so that the others always have some room.
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
    """How the accepted work decreases if no other job comes: the load after each stride of a simulation.

    The autoencoder counts as always busy from now on. If its time exceeds a limit, it seldom waits for latents.
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
        """service_time_s: by owner. owner: the owner of the request, if several share the server."""
        self._limits, self._speeds, self._owner = limits, speeds, owner
        simulation = Simulation(jobs, speeds, service_time_s)
        self._jobs = {job.job_id: job for job in jobs}
        # A job waits for the running tick before it begins, and for one more tick before its end is noticed.
        starts_s = now_s + 2 * max(speed.longest_tick_s for speed in speeds.values())
        # An image stays in the ledger until it is fully decoded.
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
        """Return the load of one owner, or of all, after a stride."""
        stepped = [job for job_id in stride.places if owner in (None, (job := self._jobs[job_id]).owner)]
        ended = [job for job in stepped if job.job_id in stride.ended]
        ended_rows = sum(job.work.rows for job in ended)
        rows = {**load.rows, stride.model: load.rows.get(stride.model, 0) - ended_rows}  # an owner may have no rows
        done_s = self._speeds[stride.model].place_s * sum(stride.places[job.job_id] for job in stepped)
        return replace(load, jobs=load.jobs - len(ended), rows=rows, ticks_s=load.ticks_s - done_s)

    def room_s(self, work: Work, speed: Speed) -> float:
        """Return the first time when one more job exceeds no limit."""

        def fits(load: Load) -> bool:
            return find_overload(load, work, self._limits, speed) is None

        at = bisect_left(self._points, True, key=lambda point: fits(point[1]))
        room_s, load = self._points[at]
        if at == 0:
            return room_s
        before_s, before = self._points[at - 1]
        # Between two points the work decreases linearly, while jobs and rows stay as at the first point.
        part = bisect_left(range(PARTS), True, key=lambda part: fits(_between(before, load, part / PARTS)))
        return before_s + part / PARTS * (room_s - before_s)

    def share_s(self, overload: Overload, work: Work, speed: Speed) -> float:
        """Return the seconds until the limit that a job exceeds has room for it."""
        if overload.field == "backlog_s":
            return MARGIN * (work.places * speed.place_s + work.autoencoder_s)
        starts_s, load = self._points[0]
        rows = load.rows.get(work.model, 0)
        share = 1 / max(1, load.jobs) if overload.field == "jobs" else work.rows / max(1, rows)
        return share * (self._points[-1][0] - starts_s)


def _between(before: Load, after: Load, part: float) -> Load:
    """Interpolate the load between two points. part: the share of the time that has passed."""
    own = None if before.own is None else _between(before.own, after.own or Load(), part)
    ticks_s = before.ticks_s + part * (after.ticks_s - before.ticks_s)
    autoencoder_s = before.autoencoder_s + part * (after.autoencoder_s - before.autoencoder_s)
    return replace(before, ticks_s=ticks_s, autoencoder_s=autoencoder_s, own=own)


class RetryQueue:
    """The retry times of refused clients, each later than the one before."""

    def __init__(self) -> None:
        self._end_s = -math.inf
        self._beyond = 0  # clients that found the queue too long

    def next_s(self, room_s: float, share_s: float) -> float:
        """Return the retry time of one more client, once there is room."""
        due_s = max(room_s, self._end_s)
        if due_s > room_s + SPREAD_S:
            self._beyond += 1
            return room_s + self._beyond * GOLDEN % 1 * SPREAD_S
        self._end_s = due_s + share_s
        return due_s


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """The work of all replicas of a model, as their last renewals reported it."""

    replicas: int = 0  # live replicas
    places_per_s: float = 0.0  # over all replicas
    held_s: float = 0.0  # average seconds of work on a replica
    jobs: int = 0  # jobs that no replica holds
    places: float = 0.0  # the work of those jobs
    least_s: float = math.inf  # seconds of work on the least loaded other replica

    @property
    def backlog_s(self) -> float:
        """Seconds until all work is done, if it is shared evenly."""
        return self.held_s + (self.places / self.places_per_s if self.places_per_s else 0.0)

    @property
    def waiting_s(self) -> float:
        """Seconds that one replica takes for the jobs that no replica holds."""
        return self.places * self.replicas / self.places_per_s if self.places_per_s else 0.0

    def overload(self, work: Work, limits: Limits) -> Overload | None:
        """Return the first limit that one more job would exceed. Each live replica adds the limits of one server."""
        if not self.jobs and not self.held_s:
            return None
        own_s = work.places / self.places_per_s if self.places_per_s else 0.0
        if (backlog_s := self.backlog_s + own_s) > limits.max_backlog_s * (1 + ROUNDING):
            return Overload("backlog_s", backlog_s, limits.max_backlog_s)
        if self.jobs + 1 > (most := limits.max_jobs * max(1, self.replicas)):
            return Overload("jobs", self.jobs + 1, most)
        return None

    def room_elsewhere_in_s(self, work: Work, max_backlog_s: float) -> float:
        """Return the seconds until another replica has room for a job refused here; infinite if there is no other.

        max_backlog_s: 0 if another limit was reached; then only an idle replica is known to have room.
        """
        own_s = work.places * self.replicas / self.places_per_s if self.places_per_s else 0.0
        return max(0.0, min(self.least_s, self.least_s + own_s - max_backlog_s))  # an idle replica takes any job

    def room_in_s(self, overload: Overload) -> float:
        """Return the seconds until there is room, if no other job comes."""
        if overload.field == "backlog_s":
            return overload.value - overload.limit
        return self.backlog_s / (self.jobs + 1)


class Intake:
    """Limits the work that goes before each job a server takes. Work is counted in places.

    Shorter jobs go first, so a server with much long work still takes a short job.
    """

    def __init__(self, room: float, held: Iterable[float] = (), *, oldest_us: int | None = None) -> None:
        """room: the most work before a job. held: the work left of each job. oldest_us: when the first job came."""
        self._room, self._held, self._oldest_us = room, sorted(held), oldest_us
        self.refused = math.inf  # the shortest job that was refused

    def has_room(self, places: float) -> bool:
        """Whether a job can be taken. Any job can, if no work goes before it."""
        return sum(self._held[: bisect_right(self._held, places)]) < self._room

    def add(self, places: float) -> None:
        """Take a job."""
        insort(self._held, places)

    def offer(self, places: float) -> bool:
        """Take a job if there is room, and return whether it was taken."""
        if self.has_room(places):
            self.add(places)
            return True
        self.refused = min(self.refused, places)
        return False

    def offer_oldest(self, places: float, created_us: int) -> bool:
        """Take the oldest waiting job if there is room, or if it is older than the jobs here.

        A server's oldest job has a share of each tick, so it ends however many shorter jobs come.
        """
        if not self._held or (self._oldest_us is not None and created_us < self._oldest_us):
            self.add(places)
            return True
        return self.offer(places)
