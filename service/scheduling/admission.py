"""Accept or refuse jobs. A job's cost is known on arrival, so a refusal can say when to try again. No torch.

Any thread may ask; the worker's takes work off. Time is an argument: seconds of any clock that does not go back.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from service.errors import DeadlineUnmeetable, InvalidField, Overloaded
from service.model_info import Limits
from service.scheduling.forecast import Fluid, Pending, forecast
from service.scheduling.promises import MARGIN, Excess, Load, Moment, Promise, Promises, find_excess
from service.scheduling.scheduler import Sharing
from service.scheduling.tick_times import TickTimes
from service.work import Outlook, Work

SLOWER = 2.0  # how far over the backlog limit work may be while promises are still kept
DEADLINE_TRIES = 4


class Admission:
    """Owns the ledger of accepted work and how long ticks take; refuses what is over the limits or would be late."""

    def __init__(self, limits: Limits, sharing: Sharing) -> None:
        assert sharing.max_batch == limits.max_batch
        self._limits, self._sharing = limits, sharing
        # Guards the ledger. The worker must not wait for a forecast, so none is made under this lock.
        self._lock = threading.Lock()
        # The ledger, in order of arrival. The scheduler counts the same work, but only in the worker's thread, and only
        # once that has taken a job up; requests are admitted in other threads, and a job counts from then on.
        self._jobs: dict[str, Pending] = {}
        self._tick_times = TickTimes()  # until ticks are measured nothing is refused for time
        # Held while a request is being admitted, one at a time; guards the promises. Taken before _lock.
        self._admitting = threading.Lock()
        self._promises = Promises(limits, self._fluid)

    # --- from any thread ---

    def enter(
        self,
        job_id: str,
        work: Work,
        *,
        now_s: float,
        deadline_s: float | None = None,
    ) -> Outlook:
        """Accept a job and count it, or raise Overloaded, DeadlineUnmeetable or InvalidField.

        An idle server takes any job within the bounds. A client that is refused and asks again for the same work when
        Retry-After seconds are over finds room.
        """
        if work.rows > self._limits.max_rows:
            raise InvalidField.of("n", f"at most {self._limits.max_rows}", work.rows)
        job = Pending(job_id, work, work.places)
        with self._admitting:
            server = self._now()
            if deadline_s is not None:
                self._check_alone(job, deadline_s, server)
            self._promises.expire(now_s)
            promise = self._promises.find(work, now_s)
            if promise is None:
                self._check_room(job, now_s, server)
            else:
                self._check_promise(promise, now_s, server)
            outlook = self._forecast([*server.jobs, job], server.tick_times, until=job_id)[job_id]
            if deadline_s is not None and outlook.eta_s > deadline_s:
                raise self._refuse_deadline(job, server, deadline_s, outlook.eta_s)
            if promise is not None:
                self._promises.drop(promise)
            with self._lock:
                assert job_id not in self._jobs
                self._jobs[job_id] = job
        return outlook

    def readmit(self, job_id: str, work: Work, *, places_left: int) -> Outlook:
        """Count a job that an earlier process accepted: neither backlog nor deadline refuses it any more.

        Raises Overloaded while there are no slots for it; its Retry-After promises nothing.
        """
        job = Pending(job_id, work, places_left)
        with self._admitting:
            slots = replace(self._limits, max_backlog_s=math.inf)
            server = self._now()
            excess = find_excess(server.load, work, slots, server.tick_times)
            if excess is not None:
                raise _overloaded(excess, 1)
            with self._lock:
                assert job_id not in self._jobs
                self._jobs[job_id] = job
        jobs, tick_times = self._read()
        return self._forecast(jobs, tick_times, until=job_id)[job_id]

    def outlooks(self) -> dict[str, Outlook]:
        """Predict the end of every job, by its id."""
        return self._forecast(*self._read())

    @property
    def backlog_s(self) -> float:
        """Predicted seconds of accepted work that is not done, at the rate of full ticks."""
        server = self._now()
        return server.load.places * server.tick_times.seconds_per_place(self._limits.max_batch)

    @property
    def rows(self) -> int:
        """Rows accepted and not yet delivered."""
        return self._now().load.rows

    # --- from the worker's thread ---

    def calibrate(self, points: Sequence[tuple[int, float]]) -> None:
        """Set how long ticks take from the warm-up's measurement: (places, seconds), places ascending."""
        times = TickTimes(tuple(points))
        with self._lock:
            self._tick_times = times

    def stepped(self, places_by_job: Mapping[str, int], places: int, seconds: float) -> None:
        """Take a tick's work off the ledger, and learn how fast the machine is now."""
        with self._lock:
            for job_id, count in places_by_job.items():
                job = self._jobs.get(job_id)
                if job is not None:
                    self._jobs[job_id] = Pending(job_id, job.work, max(0, job.places_left - count))
            if places > 0:
                self._tick_times = self._tick_times.observe(places, seconds)

    def leave(self, job_id: str) -> None:
        """Take a job off that is done or given up, with all it had left. Nothing happens if it is not here."""
        with self._lock:
            self._jobs.pop(job_id, None)

    # --- the limits ---

    def _check_room(self, job: Pending, now_s: float, server: Moment) -> None:
        """Refuse a job that would pass a limit, with the promised work counted as if it were here."""
        excess = find_excess(server.load + self._promises.load, job.work, self._limits, server.tick_times)
        if excess is None:
            self._promises.forget_plan()
        elif not self._promises.harms_none(job, now_s, server):
            raise _overloaded(excess, self._promises.make(job.work, now_s, server))

    def _check_promise(self, promise: Promise, now_s: float, server: Moment) -> None:
        """Refuse a promised job only where the other work exceeds twice the backlog limit, or any other limit.

        So a machine that runs a little slower than forecast breaks no promise; one that runs much slower does.
        """
        own_s = promise.work.places * server.tick_times.seconds_per_place(self._limits.max_batch)
        lenient = replace(self._limits, max_backlog_s=SLOWER * self._limits.max_backlog_s + own_s)
        if find_excess(server.load, promise.work, lenient, server.tick_times):
            excess = find_excess(server.load, promise.work, self._limits, server.tick_times)
            assert excess is not None
            raise _overloaded(excess, self._promises.renew(promise, now_s, server))

    # --- deadlines ---

    def _check_alone(self, job: Pending, deadline_s: float, server: Moment) -> None:
        """Refuse for good a job that would be late even on an idle server."""
        alone_s = self._forecast([job], server.tick_times)[job.job_id].eta_s
        if not deadline_s >= alone_s:  # not `<`, so that NaN is refused
            least_s = math.ceil(alone_s * 1000) / 1000
            raise InvalidField.of("deadline_s", f"at least {least_s:g} s for this work", deadline_s)

    def _refuse_deadline(self, job: Pending, server: Moment, deadline_s: float, eta_s: float) -> DeadlineUnmeetable:
        """Make the refusal, with the time after which the job would be in time if no other came before it."""
        wait_s, late_s = 0, eta_s - deadline_s
        for _ in range(DEADLINE_TRIES):
            wait_s += max(1, math.ceil(late_s))
            # Later is not always better: a job that ran meanwhile may then have less left than this one. So look again.
            late_s = self._eta_later(job, server, wait_s) - deadline_s
            if late_s <= 0:
                break
        else:
            idle_s = max(outlook.eta_s for outlook in self._forecast(server.jobs, server.tick_times).values())
            wait_s = max(1, math.ceil(MARGIN * idle_s))
        return DeadlineUnmeetable(
            f"this job would be done in {eta_s:.1f} s, its deadline_s is {deadline_s:g}. Try again in {wait_s} s",
            retry_after_s=wait_s,
            value=deadline_s,
            bound=f"at least {math.ceil(eta_s * 10) / 10:g} s at this load",
        )

    def _eta_later(self, job: Pending, server: Moment, wait_s: float) -> float:
        """Predict how long a job would take, in seconds, if it came wait_s from now."""
        fluid = self._fluid(server.jobs, server.tick_times)
        fluid.run_to(wait_s)
        fluid.add(job)
        while job.job_id not in fluid.step():
            pass
        return fluid.tick_end_s - wait_s

    # --- the forecast ---

    def _read(self) -> tuple[tuple[Pending, ...], TickTimes]:
        with self._lock:
            return tuple(self._jobs.values()), self._tick_times

    def _now(self) -> Moment:
        jobs, tick_times = self._read()
        load = Load(len(jobs), sum(job.work.rows for job in jobs), sum(job.places_left for job in jobs))
        return Moment(jobs, load, tick_times)

    def _fluid(self, jobs: Sequence[Pending], times: TickTimes) -> Fluid:
        return Fluid(jobs, self._sharing, times)

    def _forecast(self, jobs: Sequence[Pending], times: TickTimes, until: str | None = None) -> dict[str, Outlook]:
        return forecast(jobs, self._sharing, times, until)


def _overloaded(excess: Excess, wait_s: int) -> Overloaded:
    if excess.field == "backlog_s":
        detail = f"{excess.value:.1f} s of work would be waiting; the limit is {excess.limit:g} s"
    else:
        detail = f"{excess.value} {excess.field} would be held at once; the limit is {excess.limit}"
    return Overloaded(
        f"{detail}. Try again in {wait_s} s",
        retry_after_s=wait_s,
        field=excess.field,
        value=round(excess.value, 1),
        bound=f"at most {excess.limit:g}",
    )
