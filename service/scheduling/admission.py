"""Whether a job may enter: its cost is known on arrival, so the answer is a yes or a refusal with a time. No torch.

Two threads share this: the edge lets jobs in and asks, the worker takes work off. Time is an argument: seconds of any
clock that does not go back.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from service.errors import DeadlineUnmeetable, InvalidField, Overloaded
from service.model_info import Limits
from service.scheduling.forecast import Fluid, Outlook, Pending, forecast
from service.scheduling.promises import MARGIN, Excess, Load, Moment, Promise, Promises, find_excess
from service.scheduling.scheduler import Sharing
from service.scheduling.tick_times import TickTimes
from service.work import Work

SLOWER = 2.0  # how far over the backlog limit work may be while promises are still kept
DEADLINE_TRIES = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """What an accepted job is told: how many jobs are ahead of it, and in how many seconds it will be done."""

    position: int
    eta_s: float


class Admission:
    """Owns the ledger of accepted work and how long ticks take; refuses what is over the limits or would be late."""

    def __init__(self, limits: Limits, sharing: Sharing) -> None:
        assert sharing.max_batch == limits.max_batch
        self._limits, self._sharing = limits, sharing
        # The ledger. The worker must not wait for a forecast, so none is made under this lock.
        self._lock = threading.Lock()
        self._jobs: dict[str, Pending] = {}  # in order of arrival
        self._load = Load()
        self._tick_times = TickTimes()  # until ticks are measured nothing is refused for time
        # Who is at the door holds this, one at a time, and with it the promises. Taken before _lock.
        self._door = threading.Lock()
        self._promises = Promises(limits, self._fluid)

    # --- from the edge ---

    def enter(
        self,
        job_id: str,
        work: Work,
        *,
        now_s: float,
        deadline_s: float | None = None,
    ) -> Entry:
        """Accept a job and count it, or raise Overloaded, DeadlineUnmeetable or InvalidField.

        An idle server takes any job within the bounds. A client that is refused and asks again for the same work when
        Retry-After seconds are over finds room.
        """
        if work.rows > self._limits.max_rows:
            raise InvalidField.of("n", f"at most {self._limits.max_rows}", work.rows)
        job = Pending(job_id, work, work.places)
        with self._door:
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
                self._load += Load(1, work.rows, job.places_left)
        return Entry(outlook.position, outlook.eta_s)

    def readmit(self, job_id: str, work: Work, *, places_left: int) -> Entry:
        """Count a job that an earlier process accepted: neither backlog nor deadline refuses it any more.

        Raises Overloaded while there are no slots for it, which is no promise to anybody.
        """
        job = Pending(job_id, work, places_left)
        with self._door, self._lock:
            slots = replace(self._limits, max_backlog_s=math.inf)
            excess = find_excess(self._load, work, slots, self._tick_times)
            if excess is not None:
                raise _overloaded(excess, 1)
            assert job_id not in self._jobs
            self._jobs[job_id] = job
            self._load += Load(1, work.rows, places_left)
        outlook = self.outlook(job_id)
        assert outlook is not None
        return Entry(outlook.position, outlook.eta_s)

    def outlook(self, job_id: str) -> Outlook | None:
        """Predict one job's end; None if it is not here."""
        server = self._now()
        if all(job.job_id != job_id for job in server.jobs):
            return None
        return self._forecast(server.jobs, server.tick_times, until=job_id)[job_id]

    def outlooks(self) -> list[Outlook]:
        """Predict every job's end, in order of arrival."""
        server = self._now()
        outlooks = self._forecast(server.jobs, server.tick_times)
        return [outlooks[job.job_id] for job in server.jobs]

    # --- from the worker ---

    def calibrate(self, points: Sequence[tuple[int, float]]) -> None:
        """Set how long ticks take from the warm-up's measurement: (places, seconds), places ascending."""
        times = TickTimes(tuple(points))
        with self._lock:
            self._tick_times = times

    def stepped(self, places_by_job: Mapping[str, int], places: int, seconds: float) -> None:
        """Take a tick's work off the ledger, and learn how fast the machine is now."""
        with self._lock:
            total = 0.0
            for job_id, count in places_by_job.items():
                job = self._jobs.get(job_id)
                if job is not None:
                    done = min(count, job.places_left)
                    self._jobs[job_id] = Pending(job_id, job.work, job.places_left - done)
                    total += done
            self._load -= Load(places=total)
            if places > 0:
                self._tick_times = self._tick_times.observe(places, seconds)

    def leave(self, job_id: str) -> None:
        """Take a job off that is done, or was given up: with all it had left. One that is not here is let be."""
        with self._lock:
            job = self._jobs.pop(job_id, None)
            if job is not None:
                self._load -= Load(1, job.work.rows, job.places_left)

    # --- from anywhere ---

    @property
    def backlog_s(self) -> float:
        """Predicted seconds of accepted work that is not done, at the rate of full ticks."""
        with self._lock:
            return self._load.places * self._tick_times.seconds_per_place(self._limits.max_batch)

    @property
    def rows(self) -> int:
        """Rows accepted and not yet delivered."""
        with self._lock:
            return self._load.rows

    @property
    def jobs(self) -> int:
        """Jobs accepted and not yet delivered."""
        with self._lock:
            return self._load.jobs

    # --- the limits ---

    def _check_room(self, job: Pending, now_s: float, server: Moment) -> None:
        """Refuse a newcomer that would pass a limit, with the promised work counted as if it were here."""
        excess = find_excess(server.load + self._promises.load, job.work, self._limits, server.tick_times)
        if excess is None:
            self._promises.forget_plan()
        elif not self._promises.harms_none(job, now_s, server):
            raise _overloaded(excess, self._promises.make(job.work, now_s, server))

    def _check_promise(self, promise: Promise, now_s: float, server: Moment) -> None:
        """Refuse one that was promised room only while the rest is over twice the backlog limit, or jobs or rows over.

        So a machine that runs a little slower than foreseen breaks no promise, one that runs much slower does.
        """
        own_s = promise.work.places * server.tick_times.seconds_per_place(self._limits.max_batch)
        lenient = replace(self._limits, max_backlog_s=SLOWER * self._limits.max_backlog_s + own_s)
        if find_excess(server.load, promise.work, lenient, server.tick_times):
            excess = find_excess(server.load, promise.work, self._limits, server.tick_times)
            assert excess is not None
            raise _overloaded(excess, self._promises.renew(promise, now_s, server))

    # --- deadlines ---

    def _check_alone(self, job: Pending, deadline_s: float, server: Moment) -> None:
        """Refuse for good what would be late on an idle server."""
        alone_s = self._forecast([job], server.tick_times)[job.job_id].eta_s
        if not deadline_s >= alone_s:  # so written that NaN is refused
            least_s = math.ceil(alone_s * 1000) / 1000
            raise InvalidField.of("deadline_s", f"at least {least_s:g} s for this work", deadline_s)

    def _refuse_deadline(self, job: Pending, server: Moment, deadline_s: float, eta_s: float) -> DeadlineUnmeetable:
        """Find when the job would be done in time, if no other comes before it."""
        wait_s, late_s = 0, eta_s - deadline_s
        for _ in range(DEADLINE_TRIES):
            wait_s += max(1, math.ceil(late_s))
            # Later is not always better: what ran meanwhile may by then be shorter than this job. So look again.
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
        """In how many seconds a job would be done that came after so many."""
        fluid = self._fluid(server.jobs, server.tick_times)
        fluid.run_to(wait_s)
        fluid.add(job)
        while job.job_id not in fluid.step():
            pass
        return fluid.tick_end_s - wait_s

    # --- the forecast ---

    def _now(self) -> Moment:
        with self._lock:
            return Moment(tuple(self._jobs.values()), self._load, self._tick_times)

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
