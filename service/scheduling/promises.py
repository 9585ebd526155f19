"""When there will be room for refused work, and the promise that there will be. Pure: no torch, no clock, no lock."""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from service.model_info import Limits
from service.scheduling.forecast import Fluid, Pending
from service.scheduling.tick_times import TickTimes
from service.work import Work

MAX_PROMISES = 10_000
GRACE_S = 2.0  # how long after its time a promise is kept, at least
GRACE_SHARE = 0.1  # and as a share of the wait
MARGIN = 1.05  # on the time of a tick in what is promised, as the forecast is good to 5%
SPARE_SHARE = 1 / 8  # of jobs and rows that no promise counts on, as jobs may end in another order than forecast
RENEW_S = 5.0  # how old a plan may get: jobs that left early since it was made only make it too careful
ROUNDING = 1e-6  # of seconds and of limits


@dataclass(frozen=True, slots=True)
class Load:
    """What the limits count."""

    jobs: int = 0
    rows: int = 0
    places: float = 0.0

    @classmethod
    def of(cls, work: Work) -> "Load":
        """One job's, before its first step."""
        return cls(1, work.rows, work.places)

    def __add__(self, other: "Load") -> "Load":
        return Load(self.jobs + other.jobs, self.rows + other.rows, self.places + other.places)

    def __sub__(self, other: "Load") -> "Load":
        return Load(self.jobs - other.jobs, self.rows - other.rows, self.places - other.places)


@dataclass(frozen=True, slots=True)
class Excess:
    """A limit that would be passed, and what it would come to."""

    field: str
    value: float
    limit: float


def find_excess(load: Load, work: Work, limits: Limits, tick_times: TickTimes) -> Excess | None:
    """The first limit that one more job would pass. An empty server has room for any."""
    if not load.jobs:
        return None
    backlog_s = (load.places + work.places) * tick_times.seconds_per_place(limits.max_batch)
    for name, value, limit in (
        ("backlog_s", backlog_s, limits.max_backlog_s),
        ("jobs", load.jobs + 1, limits.max_jobs),
        ("rows", load.rows + work.rows, limits.max_rows),
    ):
        if value > limit * (1 + ROUNDING):
            return Excess(name, value, limit)
    return None


@dataclass(frozen=True, slots=True)
class Moment:
    """The accepted jobs at a time, in order of arrival, what they come to, and how long ticks take."""

    jobs: Sequence[Pending]
    load: Load
    tick_times: TickTimes


@dataclass(frozen=True, order=True, slots=True)
class Promise:
    """Room that a refused client will find. Until it comes or the promise expires, nobody else gets it."""

    due_s: float
    number: int
    work: Work = field(compare=False)
    wait_s: int = field(compare=False)

    @property
    def expires_s(self) -> float:
        """Until when the client is waited for."""
        return self.due_s + max(GRACE_S, GRACE_SHARE * self.wait_s)

    @property
    def pending(self) -> Pending:
        """The job it is made for."""
        return Pending(f"promise {self.number}", self.work, self.work.places)


class _Plan:
    """The server run ahead. Each promise comes in when it is due."""

    def __init__(
        self, fluid: Fluid, tick_times: TickTimes, limits: Limits, starts_s: float, promises: Iterable[Promise]
    ) -> None:
        self._fluid, self._tick_times, self._limits, self.starts_s = fluid, tick_times, limits, starts_s
        self._coming = deque(promises)  # by when they are due

    @property
    def now_s(self) -> float:
        return self.starts_s + self._fluid.now_s

    def take(self, promise: Promise) -> None:
        """Go on to when a promise is due, and let it in."""
        self._fluid.run_to(promise.due_s - self.starts_s)
        self._fluid.add(promise.pending)

    def take_all(self) -> None:
        """Go on to the last promise."""
        while self._coming:
            self.take(self._coming.popleft())

    def run_to_room(self, work: Work) -> float:
        """Go on until there is room for work; says when that will be seen."""
        room_s = self.now_s
        while excess := self._find_excess(work):
            due_s = self._coming[0].due_s if self._coming else math.inf
            if self.now_s >= due_s - ROUNDING:
                self.take(self._coming.popleft())
                continue
            enough = -math.inf  # places left that are few enough
            if excess.field == "backlog_s":
                enough = excess.limit / self._tick_times.seconds_per_place(self._limits.max_batch) - work.places
            self._fluid.step(until_s=due_s - self.starts_s, until_places=enough if enough > 0 else -math.inf)
            room_s = self.starts_s + self._fluid.tick_end_s
        return room_s

    def _find_excess(self, work: Work) -> Excess | None:
        load = Load(self._fluid.jobs, self._fluid.rows, self._fluid.places_left)
        return find_excess(load, work, self._limits, self._tick_times)


class Promises:
    """Owns the promises that are open, and the plan that says when the next can be kept."""

    def __init__(self, limits: Limits, new_fluid: Callable[[Sequence[Pending], TickTimes], Fluid]) -> None:
        self._limits, self._new_fluid = limits, new_fluid
        self._plan_limits = replace(
            limits,
            max_jobs=limits.max_jobs - round(SPARE_SHARE * limits.max_jobs),
            max_rows=limits.max_rows - round(SPARE_SHARE * limits.max_rows),
        )
        self._promises: list[Promise] = []  # by when they are due
        self._made = 0
        self._plan: _Plan | None = None
        self.load = Load()  # of all that are promised room

    def make(self, work: Work, now_s: float, server: Moment) -> int:
        """Promise the first room after all other promises; returns in how many seconds that is."""
        plan = self._plan
        if plan is None or now_s > min(plan.starts_s + RENEW_S, plan.now_s):
            plan = self._plan = self._new_plan(now_s, server)
            plan.take_all()
        promise = self._new_promise(work, now_s, plan.run_to_room(work))
        if self._keep(promise):
            plan.take(promise)
        return promise.wait_s

    def renew(self, broken: Promise, now_s: float, server: Moment) -> int:
        """Promise the first room between two others: as the server was slower than forecast, whoever waited is next."""
        self.drop(broken)
        promise = self._new_promise(broken.work, now_s, self._new_plan(now_s, server).run_to_room(broken.work))
        self._keep(promise)
        return promise.wait_s

    def find(self, work: Work, now_s: float) -> Promise | None:
        """The promise, due by now, of room for just this work."""
        return next((promise for promise in self._ripe(now_s) if promise.work == work), None)

    def drop(self, promise: Promise) -> None:
        """Let go of a promise that is kept or broken."""
        del self._promises[bisect_left(self._promises, promise)]
        self.load -= Load.of(promise.work)

    def expire(self, now_s: float) -> None:
        """Let go of those nobody came for."""
        for promise in self._ripe(now_s):
            if promise.expires_s < now_s:
                self.drop(promise)

    def forget_plan(self) -> None:
        """Plan anew at the next refusal, as a job came in that the plan does not know."""
        self._plan = None

    def harms_none(self, job: Pending, now_s: float, server: Moment) -> bool:
        """Whether there is room for a job, and all that is here will be gone when the next promise is due.

        So promises that nobody comes back for leave no server idle, and the others are kept none the less.
        """
        ripe = self._ripe(now_s)
        if len(ripe) == len(self._promises):
            return False
        free_s = self._promises[len(ripe)].due_s - now_s
        load, times = server.load, server.tick_times.slower(MARGIN)
        for promise in ripe:
            load += Load.of(promise.work)
        if find_excess(load, job.work, self._limits, server.tick_times):
            return False
        if (load.places + job.work.places) * times.seconds_per_place(self._limits.max_batch) > free_s:
            return False  # at the best rate there is: no need to look closer
        fluid = self._new_fluid([*server.jobs, job, *(promise.pending for promise in ripe)], times)
        fluid.run_to(free_s)
        return fluid.jobs == 0

    def _ripe(self, now_s: float) -> list[Promise]:
        """Those that are due."""
        return self._promises[: bisect_right(self._promises, now_s + ROUNDING, key=lambda promise: promise.due_s)]

    def _new_plan(self, now_s: float, server: Moment) -> _Plan:
        # A job waits for the tick that runs to end before it begins, and another until it is seen to be done.
        lag_s = 2 * server.tick_times.seconds(self._limits.max_batch)
        fluid = self._new_fluid(server.jobs, server.tick_times.slower(MARGIN))
        return _Plan(fluid, server.tick_times, self._plan_limits, now_s + lag_s, self._promises)

    def _new_promise(self, work: Work, now_s: float, room_s: float) -> Promise:
        wait_s = max(1, math.ceil(room_s - now_s - ROUNDING))
        self._made += 1
        return Promise(now_s + wait_s, self._made, work, wait_s)

    def _keep(self, promise: Promise) -> bool:
        """Keep a promise if they are not too many; beyond that a time is told, but no room is kept."""
        if len(self._promises) == MAX_PROMISES:
            return False
        insort(self._promises, promise)
        self.load += Load.of(promise.work)
        return True
