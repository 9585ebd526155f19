"""Whether there is room for a job, and when one that was refused should come again. Pure: no torch, no clock, no lock.

A refusal keeps no room: who does not come back costs nobody anything. It only tells each of many a time of its own.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tminus.service.byte_budget import SHARE
from tminus.service.model_info import Limits
from tminus.service.scheduling.forecast import Ahead, Pending, Speed, Stride
from tminus.service.work import Work

PARTS = 1000  # of the time between two events, to which a forecast of room is exact
MARGIN = 1.05  # on forecast times, as the forecast is good to 5 %
SPREAD_S = 300.0  # the line of those who were told a time is at most so long; who comes later gets a time within it
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, spread evenly however many are taken
ROUNDING = 1e-6  # of seconds and of limits


@dataclass(frozen=True, slots=True)
class Load:
    """What the limits count, of all jobs or of those of one owner."""

    jobs: int = 0
    rows: Mapping[int, int] = field(default_factory=dict)  # by model, each of which has slots of its own
    ticks_s: float = 0.0  # what is left in full ticks
    beside_s: float = 0.0  # of latent models, see `Work.beside_s`
    own: "Load | None" = None  # of it, what the owner has that asks, where several share the server

    def decoding(self, part: float, beside: "Load") -> "Load":
        """Count what is left of the decoding too, which comes beside the ticks."""
        beside_s = part * beside.beside_s
        jobs = max(self.jobs, 1) if beside_s > ROUNDING else self.jobs  # a server that decodes is not empty
        own = None if self.own is None or beside.own is None else self.own.decoding(part, beside.own)
        return replace(self, jobs=jobs, beside_s=beside_s, own=own)

    def values(self, work: Work, speed: Speed) -> dict[str, float]:
        """Return what each limit counts, with one more job."""
        work_s = work.places * speed.place_s + work.beside_s
        return {
            "backlog_s": self.ticks_s + self.beside_s + work_s,
            "jobs": self.jobs + 1,
            "rows": self.rows.get(work.model, 0) + work.rows,
        }


def load_of(jobs: Sequence[Pending], speeds: Mapping[int, Speed], owner: str | None = None) -> Load:
    """What jobs come to. owner: who asks, where several share the server."""
    rows: Counter[int] = Counter()
    places: Counter[int] = Counter()  # by model, so that the sums are of whole numbers of places
    for job in jobs:
        rows[job.work.model] += job.work.rows
        places[job.work.model] += job.places_left
    ticks_s = sum(count * speeds[model].place_s for model, count in places.items())
    own = None if owner is None else load_of([job for job in jobs if job.owner == owner], speeds)
    return Load(len(jobs), rows, ticks_s, sum(job.beside_s for job in jobs), own)


@dataclass(frozen=True, slots=True)
class Excess:
    """A limit that would be passed, and what it would come to."""

    field: str
    value: float
    limit: float
    of_owner: bool = False  # the limit is of what one owner may hold, not of all


def find_excess(load: Load, work: Work, limits: Limits, speed: Speed) -> Excess | None:
    """The first limit that one more job would pass. A server that has no job has room for any.

    load: of its jobs. speed: of the job's model. Where several owners share the server, one that has jobs
    may hold no more than SHARE of what the others leave, so that there is always some room for others.
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
                return Excess(name, value, limit, of_owner=True)
    for name, value in values.items():
        if value > bounds[name] * (1 + ROUNDING):
            return Excess(name, value, bounds[name])
    return None


class Drain:
    """How the accepted work goes down if nobody else comes: what is left after each stride of a look ahead.

    What comes beside the ticks is taken to go on from now, a second's work in a second: the decoder seldom waits for
    latents where it is what a limit is reached by.
    """

    def __init__(
        self,
        jobs: Sequence[Pending],
        now_s: float,
        limits: Limits,
        speeds: Mapping[int, Speed],
        had_s: Mapping[str, float] | None = None,
        owner: str | None = None,
    ) -> None:
        """had_s: by owner, the time it has had. owner: who asks, where several share the server."""
        self._limits, self._speeds, self._owner = limits, speeds, owner
        ahead = Ahead(jobs, speeds, had_s)
        self._jobs = {job.job_id: job for job in jobs}
        # A job waits for the tick that runs to end before it begins, and another until it is seen to be done.
        starts_s = now_s + 2 * max(speed.longest_tick_s for speed in speeds.values())
        # An image is off the ledger when it is decoded as a whole.
        decodes_s = starts_s + max(speed.decode_s for speed in speeds.values())
        beside = load_of(jobs, speeds, owner)
        load = load_of([job for job in jobs if job.places_left > 0], speeds, owner)
        self._points: list[tuple[float, Load]] = []

        def note(time_s: float) -> None:
            decoded_s = max(0.0, time_s - decodes_s)
            part = max(0.0, 1 - decoded_s / beside.beside_s) if beside.beside_s else 0.0
            self._points.append((time_s, load.decoding(part, beside)))

        note(starts_s)
        while load.jobs and (stride := ahead.step()) is not None:
            own = None if load.own is None else self._less(load.own, stride, owner)
            load = replace(self._less(load, stride), own=own)
            note(starts_s + MARGIN * ahead.now_s)
        for time_s in (decodes_s, decodes_s + beside.beside_s):
            if time_s > self._points[-1][0]:
                note(time_s)

    def _less(self, load: Load, stride: Stride, owner: str | None = None) -> Load:
        """What is left after a stride of the jobs of one owner, or of all."""
        stepped = [job for job_id in stride.places if owner in (None, (job := self._jobs[job_id]).owner)]
        ended = [job for job in stepped if job.job_id in stride.ended]
        ended_rows = sum(job.work.rows for job in ended)
        rows = {**load.rows, stride.model: load.rows.get(stride.model, 0) - ended_rows}  # one owner may have none
        done_s = self._speeds[stride.model].place_s * sum(stride.places[job.job_id] for job in stepped)
        return replace(load, jobs=load.jobs - len(ended), rows=rows, ticks_s=load.ticks_s - done_s)

    def room_s(self, work: Work, speed: Speed) -> float:
        """The first time when no limit is passed by one more job."""

        def fits(load: Load) -> bool:
            return find_excess(load, work, self._limits, speed) is None

        at = bisect_left(self._points, True, key=lambda point: fits(point[1]))
        room_s, load = self._points[at]
        if at == 0:
            return room_s
        before_s, before = self._points[at - 1]
        # Between two points the work goes down evenly, and jobs and rows are those of the first.
        part = bisect_left(range(PARTS), True, key=lambda part: fits(_between(before, load, part / PARTS)))
        return before_s + part / PARTS * (room_s - before_s)

    def share_s(self, excess: Excess, work: Work, speed: Speed) -> float:
        """How long it takes to make room for one more such job, by the limit that it would pass."""
        if excess.field == "backlog_s":
            return MARGIN * (work.places * speed.place_s + work.beside_s)
        starts_s, load = self._points[0]
        rows = load.rows.get(work.model, 0)
        share = 1 / max(1, load.jobs) if excess.field == "jobs" else work.rows / max(1, rows)
        return share * (self._points[-1][0] - starts_s)


def _between(before: Load, after: Load, part: float) -> Load:
    """What is left when a part of the time between two points has passed."""
    own = None if before.own is None else _between(before.own, after.own or Load(), part)
    ticks_s = before.ticks_s + part * (after.ticks_s - before.ticks_s)
    beside_s = before.beside_s + part * (after.beside_s - before.beside_s)
    return replace(before, ticks_s=ticks_s, beside_s=beside_s, own=own)


class Line:
    """The line of those who were told a time that is still to come, each after the one before."""

    def __init__(self) -> None:
        self._end_s = -math.inf
        self._beyond = 0  # how many found the line too long

    def next_s(self, room_s: float, share_s: float) -> float:
        """When one more should come; no earlier than there is room."""
        due_s = max(room_s, self._end_s)
        if due_s > room_s + SPREAD_S:
            self._beyond += 1
            return room_s + self._beyond * GOLDEN % 1 * SPREAD_S
        self._end_s = due_s + share_s
        return due_s
