"""Checks whether a job exceeds a limit, and computes when a refused client should retry. Pure: no clock.

A refusal reserves no capacity, because the client may not return. Each client only gets a different retry time.
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

PARTS = 1000  # a BacklogForecast is exact to 1/PARTS of the time between two of its points
MARGIN = 1.05  # factor on forecast times, because the forecast errs by up to 5 %
SPREAD_S = 300.0  # the longest span of retry times; further clients get times spread over this span
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of this number modulo 1 are spread evenly
ROUNDING = 1e-6  # tolerance for comparisons of seconds and of limits


@dataclass(frozen=True, slots=True)
class Load:
    """The quantities that have limits, for all jobs or for one owner's jobs."""

    jobs: int = 0
    rows: Mapping[int, int] = field(default_factory=dict)  # keyed by model, because each model has separate slots
    ticks_s: float = 0.0  # remaining work, in seconds of full ticks
    autoencoder_s: float = 0.0  # remaining seconds to encode and decode, for latent models
    own: "Load | None" = None  # load of the request's owner, if several owners share the server

    def decoding(self, part: float, at_first: "Load") -> "Load":
        """Return a copy with the autoencoder's remaining time set to `part` of the time in `at_first`."""
        autoencoder_s = part * at_first.autoencoder_s
        jobs = max(self.jobs, 1) if autoencoder_s > ROUNDING else self.jobs  # a server that decodes is not idle
        own = None if self.own is None or at_first.own is None else self.own.decoding(part, at_first.own)
        return replace(self, jobs=jobs, autoencoder_s=autoencoder_s, own=own)

    def values(self, work: Work, speed: Speed) -> dict[str, float]:
        """Return each limited quantity with one more job, keyed by the limit's name."""
        work_s = work.places * speed.place_s + work.autoencoder_s
        return {
            "backlog_s": self.ticks_s + self.autoencoder_s + work_s,
            "jobs": self.jobs + 1,
            "rows": self.rows.get(work.model, 0) + work.rows,
        }


def load_of(jobs: Sequence[Pending], speeds: Mapping[int, Speed], owner: str | None = None) -> Load:
    """Return the load of jobs. owner: the owner of the request, if several owners share the server."""
    rows: Counter[int] = Counter()
    places: Counter[int] = Counter()  # keyed by model, to add up integers
    for job in jobs:
        rows[job.work.model] += job.work.rows
        places[job.work.model] += job.places_left
    ticks_s = sum(count * speeds[model].place_s for model, count in places.items())
    own = None if owner is None else load_of([job for job in jobs if job.owner == owner], speeds)
    return Load(len(jobs), rows, ticks_s, sum(job.autoencoder_s for job in jobs), own)


@dataclass(frozen=True, slots=True)
class Overload:
    """A limit that a job would exceed, and the value that exceeds the limit."""

    field: str
    value: float
    limit: float
    of_owner: bool = False  # the limit is for one owner


def find_overload(load: Load, work: Work, limits: Limits, speed: Speed) -> Overload | None:
    """Return the first limit that one more job would exceed. A server without jobs accepts any job.

    load: the load of the accepted jobs. speed: the speed of the new job's model.

    If several owners share the server, an owner with jobs may hold at most SHARE of the capacity that the other owners
    leave. So there is always some capacity for other owners.
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
    """The decrease of the accepted work if no other job arrives: the load after each stride of a simulation.

    The autoencoder counts as always busy: if its work exceeds a limit, the autoencoder seldom waits for latents.
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
        """service_time_s: keyed by owner. owner: the owner of the request, if several owners share the server."""
        self._limits, self._speeds, self._owner = limits, speeds, owner
        simulation = Simulation(jobs, speeds, service_time_s)
        self._jobs = {job.job_id: job for job in jobs}
        # A job waits for the running tick before it begins. The server notices the job's end one more tick later.
        starts_s = now_s + 2 * max(speed.longest_tick_s for speed in speeds.values())
        # An image counts in the ledger until it is fully decoded.
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
        """Return the load of one owner, or of all owners, after a stride."""
        stepped = [job for job_id in stride.places if owner in (None, (job := self._jobs[job_id]).owner)]
        ended = [job for job in stepped if job.job_id in stride.ended]
        ended_rows = sum(job.work.rows for job in ended)
        rows = {**load.rows, stride.model: load.rows.get(stride.model, 0) - ended_rows}  # an owner may have no rows
        done_s = self._speeds[stride.model].place_s * sum(stride.places[job.job_id] for job in stepped)
        return replace(load, jobs=load.jobs - len(ended), rows=rows, ticks_s=load.ticks_s - done_s)

    def room_s(self, work: Work, speed: Speed) -> float:
        """Return the earliest time at which one more job exceeds no limit."""

        def fits(load: Load) -> bool:
            return find_overload(load, work, self._limits, speed) is None

        at = bisect_left(self._points, True, key=lambda point: fits(point[1]))
        room_s, load = self._points[at]
        if at == 0:
            return room_s
        before_s, before = self._points[at - 1]
        # Between two points the work decreases linearly. The numbers of jobs and rows stay as at the first point.
        part = bisect_left(range(PARTS), True, key=lambda part: fits(_between(before, load, part / PARTS)))
        return before_s + part / PARTS * (room_s - before_s)

    def share_s(self, overload: Overload, work: Work, speed: Speed) -> float:
        """Return the average seconds in which the server frees the capacity for one such job."""
        if overload.field == "backlog_s":
            return MARGIN * (work.places * speed.place_s + work.autoencoder_s)
        starts_s, load = self._points[0]
        rows = load.rows.get(work.model, 0)
        share = 1 / max(1, load.jobs) if overload.field == "jobs" else work.rows / max(1, rows)
        return share * (self._points[-1][0] - starts_s)


def _between(before: Load, after: Load, part: float) -> Load:
    """Interpolate the load between two points. part: the elapsed fraction of the time between the points."""
    own = None if before.own is None else _between(before.own, after.own or Load(), part)
    ticks_s = before.ticks_s + part * (after.ticks_s - before.ticks_s)
    autoencoder_s = before.autoencoder_s + part * (after.autoencoder_s - before.autoencoder_s)
    return replace(before, ticks_s=ticks_s, autoencoder_s=autoencoder_s, own=own)


class RetryQueue:
    """Assigns a retry time to each refused client, later than the previous client's time."""

    def __init__(self) -> None:
        self._end_s = -math.inf
        self._beyond = 0  # number of clients beyond SPREAD_S

    def next_s(self, room_s: float, share_s: float) -> float:
        """Return the retry time of one more client.

        room_s: the earliest possible time. share_s: seconds from this client's time to the next client's.
        """
        due_s = max(room_s, self._end_s)
        if due_s > room_s + SPREAD_S:
            self._beyond += 1
            return room_s + self._beyond * GOLDEN % 1 * SPREAD_S
        self._end_s = due_s + share_s
        return due_s


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """The work of all replicas of a model, as reported by their last renewals."""

    replicas: int = 0
    places_per_s: float = 0.0  # sum over all replicas
    held_s: float = 0.0  # average seconds of work on a replica
    jobs: int = 0  # jobs that no replica holds
    places: float = 0.0  # work of the jobs that no replica holds
    least_s: float = math.inf  # seconds of work on the least loaded other replica

    @property
    def backlog_s(self) -> float:
        """Seconds until all work is done, if the replicas share it evenly."""
        return self.held_s + (self.places / self.places_per_s if self.places_per_s else 0.0)

    @property
    def waiting_s(self) -> float:
        """Seconds that one replica would need for the jobs that no replica holds."""
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
        """Return the seconds until another replica accepts a job refused here; infinite if there is no other replica.

        max_backlog_s: 0 if a different limit was exceeded. Then only an idle replica is sure to accept the job.
        """
        own_s = work.places * self.replicas / self.places_per_s if self.places_per_s else 0.0
        return max(0.0, min(self.least_s, self.least_s + own_s - max_backlog_s))  # an idle replica accepts any job

    def room_in_s(self, overload: Overload) -> float:
        """Return the seconds until the job would exceed no limit, if no other job arrives."""
        if overload.field == "backlog_s":
            return overload.value - overload.limit
        return self.backlog_s / (self.jobs + 1)


class Intake:
    """Decides which jobs a server takes, by the work that goes before each job. Work is counted in places.

    Shorter jobs go first, so a server with much long work still takes a short job.
    """

    def __init__(self, room: float, held: Iterable[float] = (), *, oldest_us: int | None = None) -> None:
        """room: the most work before a job. held: remaining work of each job. oldest_us: arrival of the oldest job."""
        self._room, self._held, self._oldest_us = room, sorted(held), oldest_us
        self.refused = math.inf  # places of the shortest refused job

    def has_room(self, places: float) -> bool:
        """Return True if a job can be taken. A job with no work before it can always be taken."""
        return sum(self._held[: bisect_right(self._held, places)]) < self._room

    def add(self, places: float) -> None:
        insort(self._held, places)

    def offer(self, places: float) -> bool:
        """Take a job if there is room for it. Return True if the job was taken."""
        if self.has_room(places):
            self.add(places)
            return True
        self.refused = min(self.refused, places)
        return False

    def offer_oldest(self, places: float, created_us: int) -> bool:
        """Take the oldest waiting job if there is room, or if the job is older than all jobs of this server.

        Return True if the job was taken. A server's oldest job has a share of each tick, so it ends even if many
        shorter jobs arrive.
        """
        if not self._held or (self._oldest_us is not None and created_us < self._oldest_us):
            self.add(places)
            return True
        return self.offer(places)
