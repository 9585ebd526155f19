"""Whether there is room for a job, and when one that was refused should come again. Pure: no torch, no clock, no lock.

A refusal keeps no room: who does not come back costs nobody anything. It only tells each of many a time of its own.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tminus.service.model_info import Limits
from tminus.service.scheduling.fluid import Pending
from tminus.service.scheduling.forecast import Fluids
from tminus.service.scheduling.speed import Speed
from tminus.service.work import Work

MARGIN = 1.05  # on forecast times, as the forecast is good to 5 %
SPREAD_S = 300.0  # the line of those who were told a time is at most so long; who comes later gets a time within it
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, spread evenly however many are taken
ROUNDING = 1e-6  # of seconds and of limits


@dataclass(frozen=True, slots=True)
class Load:
    """What the limits count."""

    jobs: int = 0
    rows: Mapping[int, int] = field(default_factory=dict)  # by model, each of which has slots of its own
    ticks_s: float = 0.0  # what is left in full ticks
    beside_s: float = 0.0  # of latent models, see `Work.beside_s`


@dataclass(frozen=True, slots=True)
class Excess:
    """A limit that would be passed, and what it would come to."""

    field: str
    value: float
    limit: float


def find_excess(load: Load, work: Work, limits: Limits, speed: Speed) -> Excess | None:
    """The first limit that one more job would pass. An empty server has room for any.

    speed: of the job's model.
    """
    if not load.jobs:
        return None
    backlog_s = load.ticks_s + work.places * speed.place_s + load.beside_s + work.beside_s
    for name, value, limit in (
        ("backlog_s", backlog_s, limits.max_backlog_s),
        ("jobs", load.jobs + 1, limits.max_jobs),
        ("rows", load.rows.get(work.model, 0) + work.rows, speed.max_rows),
    ):
        if value > limit * (1 + ROUNDING):
            return Excess(name, value, limit)
    return None


class Drain:
    """How the accepted work goes down if nobody else comes: what is left whenever a job ends or the pace changes."""

    def __init__(self, jobs: Sequence[Pending], now_s: float, limits: Limits, speeds: Mapping[int, Speed]) -> None:
        self._limits = limits
        slower = {model: speed.slower(MARGIN) for model, speed in speeds.items()}
        fluids = Fluids(jobs, slower)
        # A job waits for the tick that runs to end before it begins, and another until it is seen to be done.
        starts_s = now_s + 2 * max(speed.longest_tick_s for speed in speeds.values())
        self._points = [(starts_s, _load(fluids))]
        while fluids.jobs:
            fluids.step()
            self._points.append((starts_s + fluids.tick_end_s, _load(fluids)))

    def room_s(self, work: Work, speed: Speed) -> float:
        """The first time when no limit is passed by one more job."""
        at = bisect_left(self._points, True, key=lambda point: self._fits(point[1], work, speed))
        room_s, load = self._points[at]
        if at == 0:
            return room_s
        before_s, before = self._points[at - 1]
        enough_s = self._limits.max_backlog_s - work.beside_s - before.beside_s - work.places * speed.place_s
        # Between two points the work goes down evenly, and jobs and rows are those of the first.
        if enough_s <= load.ticks_s or not self._fits(replace(before, ticks_s=0.0), work, speed):
            return room_s
        return before_s + (before.ticks_s - enough_s) / (before.ticks_s - load.ticks_s) * (room_s - before_s)

    def share_s(self, excess: Excess, work: Work, speed: Speed) -> float:
        """How long it takes to make room for one more such job, by the limit that it would pass."""
        if excess.field == "backlog_s":
            return MARGIN * (work.places * speed.place_s + work.beside_s)
        starts_s, load = self._points[0]
        rows = load.rows.get(work.model, 0)
        share = 1 / max(1, load.jobs) if excess.field == "jobs" else work.rows / max(1, rows)
        return share * (self._points[-1][0] - starts_s)

    def _fits(self, load: Load, work: Work, speed: Speed) -> bool:
        return find_excess(load, work, self._limits, speed) is None


def _load(fluids: Fluids) -> Load:
    return Load(fluids.jobs, fluids.rows, fluids.ticks_s / MARGIN, fluids.beside_s)


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

    def end(self) -> None:
        """The server is idle: whoever was told a time may be gone, and the next need not come after them."""
        self._end_s = -math.inf
