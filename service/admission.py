"""Whether a job may enter: its cost is known on arrival, so the answer is a yes or a refusal with a time. No torch.

Two threads share this: the edge lets jobs in and asks, the worker takes work off. Time is an argument: seconds of any
clock that does not go back.
"""

import math
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from service.errors import DeadlineUnmeetable, InvalidField, Overloaded
from service.forecast import Fluid, Outlook, Pending, TickTimes, forecast
from service.job import Limits, Work
from service.scheduler import Policy, reserved_places

MAX_PROMISES = 10_000
GRACE_S = 2.0  # how long after its time a promise is kept, at least
GRACE_SHARE = 0.1  # and as a share of the wait
MARGIN = 1.05  # on the time of a tick in what is promised, as the forecast is good to 5%
SLOWER = 2.0  # how far over the backlog limit work may be while promises are still kept
SPARE_SHARE = 1 / 8  # of jobs and rows that no promise counts on, as jobs may end in another order than foreseen
RENEW_S = 1.0  # how old a plan may get; jobs that left early since it was made only make it too careful
PROMISES_A_SECOND = 1000  # that a plan may cost to make again: one of many promises may get older
ROUNDING = 1e-6  # of seconds and of places
DEADLINE_TRIES = 4
PROMISED = 1 << 60  # arrivals of promised jobs in a plan: after all that are here


@dataclass(frozen=True, slots=True)
class Entry:
    """What an accepted job is told: how many jobs are ahead of it, and in how many seconds it will be done."""

    position: int
    eta_s: float


@dataclass(frozen=True, slots=True)
class _Held:
    """What the limits count."""

    jobs: int = 0
    rows: int = 0
    places: float = 0.0

    def __add__(self, other: "_Held") -> "_Held":
        return _Held(self.jobs + other.jobs, self.rows + other.rows, self.places + other.places)

    def __sub__(self, other: "_Held") -> "_Held":
        return _Held(self.jobs - other.jobs, self.rows - other.rows, self.places - other.places)


@dataclass(frozen=True, slots=True)
class _Over:
    """A limit that would be passed."""

    field: str
    value: float
    limit: float


@dataclass(frozen=True, order=True, slots=True)
class _Promise:
    """Room that a refused client will find. Until it comes or the promise expires, nobody else gets it."""

    due_s: float
    number: int
    work: Work = field(compare=False)
    expires_s: float = field(compare=False)

    @property
    def held(self) -> _Held:
        return _held(self.work)

    @property
    def pending(self) -> Pending:
        return Pending(f"promise {self.number}", PROMISED + self.number, self.work, self.work.places)


class _Plan:
    """How the server will go on, each promise coming in when it is due. It has run ahead: to the last promise."""

    def __init__(self, fluid: Fluid, tick_times: TickTimes, made_s: float) -> None:
        self.fluid, self.tick_times, self.made_s = fluid, tick_times, made_s

    @property
    def reached_s(self) -> float:
        return self.made_s + self.fluid.now_s

    def go_to(self, time_s: float) -> None:
        while self.reached_s < time_s - ROUNDING:
            self.fluid.step(until_s=time_s - self.made_s)

    def take(self, promise: _Promise) -> None:
        self.go_to(promise.due_s)
        self.fluid.add(promise.pending)


class Admission:
    """Owns the ledger of accepted work, how long ticks take, and the promises made to those it refused."""

    def __init__(self, limits: Limits, policy: Policy = "srpt", reserved_share: float = 0.25) -> None:
        self._limits, self._policy = limits, policy
        self._reserved = reserved_places(limits.max_batch, reserved_share, policy)
        # The ledger. The worker must not wait for a forecast, so none is made under this lock.
        self._lock = threading.Lock()
        self._jobs: dict[str, tuple[int, Work]] = {}  # id -> arrival, work; in order of arrival
        self._places_left: dict[str, int] = {}
        self._held = _Held()
        self._tick_times = TickTimes()  # until ticks are measured nothing is refused for time
        # Who is at the door holds this, one at a time, and with it the promises and the plan. Taken before _lock.
        self._door = threading.Lock()
        self._arrivals = 0
        self._promises: list[_Promise] = []  # sorted by when they are due
        self._promised = _Held()
        self._promises_made = 0
        self._plan: _Plan | None = None

    # --- from the edge ---

    def enter(self, job_id: str, work: Work, *, now_s: float, deadline_s: float | None = None) -> Entry:
        """Accept a job and count it, or raise Overloaded, DeadlineUnmeetable or InvalidField.

        An idle server takes any job within the bounds. A client that is refused and asks again for the same work when
        Retry-After seconds are over finds room.
        """
        with self._door:
            if work.rows > self._limits.max_rows:
                raise InvalidField.of("n", f"at most {self._limits.max_rows}", work.rows)
            job = Pending(job_id, self._arrivals, work, work.places)
            if deadline_s is not None:
                self._check_alone(job, deadline_s)
            self._forget_expired(now_s)
            promise = next((promise for promise in self._ripe(now_s) if promise.work == work), None)
            slips_in = False
            with self._lock:
                assert job_id not in self._jobs
                held, times = self._held, self._tick_times
            if promise is not None:
                over = self._over(held, work, times, redeems=True)
            else:
                over = self._over(held + self._promised, work, times)
                slips_in = over is not None and self._done_before_the_next_promise(job, now_s)
            if over is not None and not slips_in:
                raise self._refuse(over, work, now_s, promise)
            jobs, times = self._snapshot()
            outlook = self._forecast([*jobs, job], times, until=job_id)[job_id]
            if deadline_s is not None and outlook.eta_s > deadline_s:
                raise self._refuse_deadline(job, jobs, times, deadline_s, outlook.eta_s)
            if promise is not None:
                self._forget(promise)
            elif not slips_in:
                self._plan = None  # it does not know of this job
            self._arrivals += 1
            with self._lock:
                self._jobs[job_id] = (job.arrival, work)
                self._places_left[job_id] = work.places
                self._held += _held(work)
        return Entry(outlook.position, outlook.eta_s)

    def outlook(self, job_id: str) -> Outlook | None:
        """Predict one job's end; None if it is not here."""
        jobs, times = self._snapshot()
        if all(job.job_id != job_id for job in jobs):
            return None
        return self._forecast(jobs, times, until=job_id)[job_id]

    def outlooks(self) -> list[Outlook]:
        """Predict every job's end, in order of arrival."""
        jobs, times = self._snapshot()
        outlooks = self._forecast(jobs, times)
        return [outlooks[job.job_id] for job in jobs]

    # --- from the worker ---

    def calibrate(self, points: Sequence[tuple[int, float]]) -> None:
        """Set how long ticks take from the warm-up's measurement: (places, seconds), places ascending."""
        times = TickTimes(tuple(points))
        with self._lock:
            self._tick_times = times

    def stepped(self, places_by_job: Mapping[str, int], places: int, seconds: float) -> None:
        """Take a tick's work off the ledger, and learn how fast the machine is now."""
        with self._lock:
            total = 0
            for job_id, count in places_by_job.items():
                left = self._places_left.get(job_id, 0)
                if left:
                    self._places_left[job_id] = left - min(count, left)
                    total += min(count, left)
            self._held -= _Held(places=total)
            if places > 0:
                self._tick_times = self._tick_times.observe(places, seconds)

    def leave(self, job_id: str) -> None:
        """Take a job off that is done, or was given up: with all it had left. One that is not here is let be."""
        with self._lock:
            if job_id in self._jobs:
                _, work = self._jobs.pop(job_id)
                self._held -= _Held(1, work.rows, self._places_left.pop(job_id))

    # --- from anywhere ---

    @property
    def backlog_s(self) -> float:
        """Predicted seconds of accepted work that is not done, at the rate of full ticks."""
        with self._lock:
            return self._held.places * self._seconds_per_place(self._tick_times)

    @property
    def rows(self) -> int:
        """Rows accepted and not yet delivered."""
        with self._lock:
            return self._held.rows

    @property
    def jobs(self) -> int:
        """Jobs accepted and not yet delivered."""
        with self._lock:
            return self._held.jobs

    # --- the limits ---

    def _seconds_per_place(self, times: TickTimes) -> float:
        return times.seconds_per_place(self._limits.max_batch)

    def _over(
        self, held: _Held, work: Work, times: TickTimes, *, redeems: bool = False, spare: bool = False
    ) -> _Over | None:
        """The first limit that one more job would pass; with `spare`, some jobs and rows below it.

        Who redeems a promise is let in while the rest is within twice the backlog limit: a machine that runs a little
        slower than foreseen breaks no promise, one that runs much slower does.
        """
        limits = self._limits
        max_jobs, max_rows = limits.max_jobs, limits.max_rows
        if spare:
            max_jobs -= round(SPARE_SHARE * max_jobs)
            max_rows = max(work.rows, max_rows - round(SPARE_SHARE * max_rows))
        backlog_s = (held.places + work.places) * self._seconds_per_place(times)
        counted_s = held.places * self._seconds_per_place(times) / SLOWER if redeems else backlog_s
        if held.jobs and counted_s > limits.max_backlog_s * (1 + ROUNDING):
            return _Over("backlog_s", backlog_s, limits.max_backlog_s)
        if held.jobs + 1 > max_jobs:
            return _Over("jobs", held.jobs + 1, limits.max_jobs)
        if held.rows + work.rows > max_rows:
            return _Over("rows", held.rows + work.rows, limits.max_rows)
        return None

    def _check_alone(self, job: Pending, deadline_s: float) -> None:
        with self._lock:
            times = self._tick_times
        alone_s = self._forecast([job], times)[job.job_id].eta_s
        if not deadline_s >= alone_s:  # so written that NaN is refused
            least_s = math.ceil(alone_s * 1000) / 1000
            raise InvalidField.of("deadline_s", f"at least {least_s:g} s for this work", deadline_s)

    # --- refusals and what they promise ---

    def _refuse(self, over: _Over, work: Work, now_s: float, broken: _Promise | None) -> Overloaded:
        """Find when there will be room, and promise it."""
        if broken is None:
            plan = self._plan
            oldest_s = now_s - max(RENEW_S, len(self._promises) / PROMISES_A_SECOND)
            if plan is None or plan.made_s < oldest_s or plan.reached_s < now_s:
                plan = self._make_plan(now_s)
            self._plan = plan
        else:  # the server was slower than foreseen: this client is next, not last
            self._forget(broken)
            plan = self._make_plan(now_s, stop_for=work)
            self._plan = None  # as it stopped half-way
        start_s = room_s = plan.reached_s
        self._go_until_room(plan, work)
        if plan.reached_s > start_s:
            room_s = plan.made_s + plan.fluid.tick_end_s
        wait_s = max(1, math.ceil(room_s - now_s - ROUNDING))
        if len(self._promises) < MAX_PROMISES:
            grace_s = max(GRACE_S, GRACE_SHARE * wait_s)
            promise = _Promise(now_s + wait_s, self._promises_made, work, now_s + wait_s + grace_s)
            self._promises_made += 1
            self._promised += promise.held
            insort(self._promises, promise)
            if self._plan is not None:
                self._plan.take(promise)
        if over.field == "backlog_s":
            detail = f"{over.value:.1f} s of work would be waiting; the limit is {over.limit:g} s"
        else:
            detail = f"{over.value} {over.field} would be held at once; the limit is {over.limit}"
        return Overloaded(
            f"{detail}. Try again in {wait_s} s",
            retry_after_s=wait_s,
            field=over.field,
            value=round(over.value, 1),
            bound=f"at most {over.limit:g}",
        )

    def _make_plan(self, now_s: float, stop_for: Work | None = None) -> _Plan:
        """Look ahead to the last promise, or until there is room for work between two."""
        jobs, times = self._snapshot()
        # A job waits for the tick that runs to end before it begins, and another until it is seen to be done.
        lag_s = 2 * times.seconds(self._limits.max_batch)
        plan = _Plan(self._fluid(jobs, times.slower(MARGIN)), times, now_s + lag_s)
        for promise in self._promises:
            if stop_for is not None and self._go_until_room(plan, stop_for, promise.due_s):
                return plan
            plan.take(promise)
        if stop_for is not None:
            self._go_until_room(plan, stop_for)
        return plan

    def _go_until_room(self, plan: _Plan, work: Work, until_s: float = math.inf) -> bool:
        """Let a plan run until it has room for work; says whether it had before a time."""
        fluid = plan.fluid
        while over := self._over(_Held(fluid.jobs, fluid.rows, fluid.places_left), work, plan.tick_times, spare=True):
            if plan.reached_s >= until_s - ROUNDING:
                return False
            target = -math.inf
            if over.field == "backlog_s":
                target = over.limit / self._seconds_per_place(plan.tick_times) - work.places
            fluid.step(until_s=until_s - plan.made_s, until_places=target if target > 0 else -math.inf)
        return True

    def _done_before_the_next_promise(self, job: Pending, now_s: float) -> bool:
        """Whether a newcomer finds room now, and all that is here will be gone when the next promise is due.

        So promises that nobody comes back for leave no server idle, and the others are kept none the less.
        """
        ripe = self._ripe(now_s)
        if len(ripe) == len(self._promises):
            return False
        free_s = (self._promises[len(ripe)].due_s - now_s) / MARGIN
        with self._lock:
            held, times = self._held, self._tick_times
        for promise in ripe:
            held += promise.held
        if self._over(held, job.work, times):
            return False
        if (held.places + job.work.places) * self._seconds_per_place(times) > free_s:
            return False
        jobs, times = self._snapshot()
        outlooks = self._forecast([*jobs, job, *(promise.pending for promise in ripe)], times)
        return max(outlook.eta_s for outlook in outlooks.values()) <= free_s

    def _refuse_deadline(
        self, job: Pending, jobs: Sequence[Pending], times: TickTimes, deadline_s: float, eta_s: float
    ) -> DeadlineUnmeetable:
        """Find when the job would be done in time, if no other comes before it."""
        late_s = eta_s - deadline_s
        wait_s = 0
        for _ in range(DEADLINE_TRIES):
            wait_s += max(1, math.ceil(late_s))
            # Later is not always better: what ran meanwhile may by then be shorter than this job. So try two speeds.
            ends_s = [self._end_if_added(job, jobs, times.slower(factor), wait_s) for factor in (1.0, MARGIN)]
            late_s = max(ends_s) - wait_s - deadline_s
            if late_s <= 0:
                break
        else:
            idle_s = max(outlook.eta_s for outlook in self._forecast(jobs, times).values())
            wait_s = max(1, math.ceil(MARGIN * idle_s))
        return DeadlineUnmeetable(
            f"this job would be done in {eta_s:.1f} s, its deadline_s is {deadline_s:g}. Try again in {wait_s} s",
            retry_after_s=wait_s,
            value=deadline_s,
            bound=f"at least {math.ceil(eta_s * 10) / 10:g} s at this load",
        )

    def _end_if_added(self, job: Pending, jobs: Sequence[Pending], times: TickTimes, wait_s: float) -> float:
        plan = _Plan(self._fluid(jobs, times), times, 0.0)
        plan.go_to(wait_s)
        plan.fluid.add(job)
        while job.job_id not in plan.fluid.step():
            pass
        return plan.fluid.tick_end_s

    def _ripe(self, now_s: float) -> list[_Promise]:
        """The promises that are due."""
        return self._promises[: bisect_right(self._promises, now_s + ROUNDING, key=lambda promise: promise.due_s)]

    def _forget_expired(self, now_s: float) -> None:
        for promise in self._ripe(now_s):
            if promise.expires_s < now_s:
                self._forget(promise)

    def _forget(self, promise: _Promise) -> None:
        del self._promises[bisect_left(self._promises, promise)]
        self._promised -= promise.held

    # --- the forecast ---

    def _snapshot(self) -> tuple[list[Pending], TickTimes]:
        with self._lock:
            left = self._places_left
            jobs = [Pending(job_id, arrival, work, left[job_id]) for job_id, (arrival, work) in self._jobs.items()]
            return jobs, self._tick_times

    def _fluid(self, jobs: Sequence[Pending], times: TickTimes) -> Fluid:
        fluid = Fluid(self._limits.max_batch, self._reserved, self._policy, times)
        for job in jobs:
            fluid.add(job)
        return fluid

    def _forecast(self, jobs: Sequence[Pending], times: TickTimes, until: str | None = None) -> dict[str, Outlook]:
        return forecast(jobs, self._limits.max_batch, self._reserved, self._policy, times, until)


def _held(work: Work) -> _Held:
    return _Held(1, work.rows, work.places)
