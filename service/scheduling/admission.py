"""Accept or refuse jobs. A job's cost is known on arrival, so a refusal can say when to try again. No torch.

Any thread may ask; the worker's takes work off. Time is an argument: seconds of any clock that does not go back.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tminus.service.errors import DeadlineUnmeetable, InvalidField, Overloaded
from tminus.service.model_info import Limits
from tminus.service.scheduling.arrivals import Arrivals
from tminus.service.scheduling.forecast import Fluid, Pending, forecast
from tminus.service.scheduling.room import MARGIN, Drain, Excess, Line, Load, find_excess
from tminus.service.scheduling.scheduler import RESERVED_SHARE, Sharing
from tminus.service.scheduling.tick_times import TickTimes
from tminus.service.work import Outlook, Work

RENEW_S = 5.0  # how old a forecast of room may get: jobs that left early since only make it too careful
ROUNDING = 1e-6  # of a second


@dataclass(frozen=True, slots=True)
class _Moment:
    """The accepted jobs at a time, in order of arrival, what they come to, and how long ticks take."""

    jobs: Sequence[Pending]
    load: Load
    tick_times: TickTimes


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
        self._decode_s = self._encode_s = 0.0  # of an image of a latent model
        # Held while a request is being admitted, one at a time; guards what follows. Taken before _lock.
        self._admitting = threading.Lock()
        self._line = Line()
        self._arrivals = Arrivals()
        self._drain: Drain | None = None  # None: a job came in since it was made
        self._drain_made_s = 0.0

    # --- from any thread ---

    def enter(
        self,
        job_id: str,
        work: Work,
        *,
        now_s: float,
        deadline_s: float | None = None,
        has_picture: bool = False,
    ) -> Outlook:
        """Accept a job and count it, or raise Overloaded, DeadlineUnmeetable or InvalidField.

        has_picture: it starts from one.

        An idle server takes any job within the bounds. Overloaded tells when there should be room, each client another
        time; none is kept for it.
        """
        if work.rows > self._limits.max_rows:
            raise InvalidField.of("n", f"at most {self._limits.max_rows}", work.rows)
        work = self._with_beside(work, has_picture=has_picture)
        job = Pending(job_id, work, work.places, work.beside_s)
        with self._admitting:
            server = self._now()
            if deadline_s is not None:
                self._check_alone(job, deadline_s, server)
            self._check_room(job, now_s, server)
            outlook = self._forecast([*server.jobs, job], server.tick_times, until=job_id)[job_id]
            if deadline_s is not None and outlook.eta_s > deadline_s:
                raise _unmeetable(deadline_s, outlook.eta_s)
            self._arrivals.add(work.places, now_s)
            self._take(job)
            return self._foresee(outlook, job, now_s, server.tick_times)

    def readmit(self, job_id: str, work: Work, *, places_left: int) -> Outlook:
        """Count a job that an earlier process accepted: neither backlog nor deadline refuses it any more.

        Raises Overloaded while there are no slots for it; its Retry-After is no forecast.
        """
        work = self._with_beside(work, has_picture=False)
        job = Pending(job_id, work, places_left, work.beside_s)
        with self._admitting:
            slots = replace(self._limits, max_backlog_s=math.inf)
            server = self._now()
            excess = find_excess(server.load, work, slots, server.tick_times)
            if excess is not None:
                raise _overloaded(excess, 1)
            self._take(job)
        jobs, tick_times = self._read()
        return self._forecast(jobs, tick_times, until=job_id)[job_id]

    def outlooks(self, now_s: float) -> dict[str, Outlook]:
        """Predict the end of every job, by its id."""
        jobs, tick_times = self._read()
        outlooks = self._forecast(jobs, tick_times)
        with self._admitting:
            return {job.job_id: self._foresee(outlooks[job.job_id], job, now_s, tick_times) for job in jobs}

    @property
    def backlog_s(self) -> float:
        """Predicted seconds of accepted work that is not done, at the rate of full ticks."""
        server = self._now()
        per_place_s = server.tick_times.seconds_per_place(self._limits.max_batch)
        return server.load.places * per_place_s + server.load.beside_s

    @property
    def tick_time_ratio(self) -> float:
        """How much longer ticks take now than was measured at the start."""
        with self._lock:
            return self._tick_times.correction

    @property
    def longest_tick_s(self) -> float:
        """Predicted seconds of a full tick."""
        with self._lock:
            return self._tick_times.seconds(self._limits.max_batch)

    @property
    def rows(self) -> int:
        """Rows accepted and not yet delivered."""
        return self._now().load.rows

    # --- from the worker's thread ---

    def calibrate(self, points: Sequence[tuple[int, float]], decode_s: float = 0.0, encode_s: float = 0.0) -> None:
        """Set how long ticks take from the warm-up's measurement: (places, seconds), places ascending.

        decode_s and encode_s: how long one image of a latent model takes.
        """
        times = TickTimes(tuple(points))
        with self._lock:
            self._tick_times = times
            self._decode_s, self._encode_s = decode_s, encode_s

    def stepped(self, places_by_job: Mapping[str, int], places: int, seconds: float) -> None:
        """Take a tick's work off the ledger, and learn how fast the machine is now."""
        with self._lock:
            for job_id, count in places_by_job.items():
                job = self._jobs.get(job_id)
                if job is not None:
                    self._jobs[job_id] = replace(job, places_left=max(0, job.places_left - count))
            if places > 0:
                self._tick_times = self._tick_times.observe(places, seconds)

    def decoded(self, job_id: str) -> None:
        """Take one image of a latent model off the ledger."""
        with self._lock:
            if (job := self._jobs.get(job_id)) is not None:
                self._jobs[job_id] = replace(job, beside_s=max(0.0, job.beside_s - self._decode_s))

    def leave(self, job_id: str) -> None:
        """Take a job off that is done or given up, with all it had left. Nothing happens if it is not here."""
        with self._lock:
            self._jobs.pop(job_id, None)

    # --- the limits ---

    def _check_room(self, job: Pending, now_s: float, server: _Moment) -> None:
        """Refuse a job that would pass a limit."""
        if not server.jobs:
            self._line.end()
        excess = find_excess(server.load, job.work, self._limits, server.tick_times)
        if excess is None:
            return
        if self._drain is None or now_s > self._drain_made_s + RENEW_S:
            fluid = self._fluid(server.jobs, server.tick_times.slower(MARGIN))
            self._drain, self._drain_made_s = Drain(fluid, now_s, self._limits, server.tick_times), now_s
        due_s = self._line.next_s(max(now_s, self._drain.room_s(job.work)), self._drain.share_s(excess, job.work))
        raise _overloaded(excess, max(1, math.ceil(due_s - now_s - ROUNDING)))

    def _with_beside(self, work: Work, *, has_picture: bool) -> Work:
        return replace(work, beside_s=work.rows * self._decode_s + (self._encode_s if has_picture else 0.0))

    def _take(self, job: Pending) -> None:
        with self._lock:
            assert job.job_id not in self._jobs
            self._jobs[job.job_id] = job
        self._drain = None

    # --- deadlines ---

    def _check_alone(self, job: Pending, deadline_s: float, server: _Moment) -> None:
        """Refuse for good a job that would be late even on an idle server."""
        alone_s = self._forecast([job], server.tick_times)[job.job_id].eta_s
        if not deadline_s >= alone_s:  # not `<`, so that NaN is refused
            least_s = math.ceil(alone_s * 1000) / 1000
            raise InvalidField.of("deadline_s", f"at least {least_s:g} s for this work", deadline_s)

    # --- the forecast ---

    def _foresee(self, outlook: Outlook, job: Pending, now_s: float, tick_times: TickTimes) -> Outlook:
        """Count on as much work as has come lately, where it overtakes a job."""
        if self._sharing.policy != "srpt" or not tick_times.points:
            return outlook
        place_s = tick_times.seconds_per_place(self._limits.max_batch)
        stretch = self._arrivals.stretch(job.places_left, now_s, place_s, RESERVED_SHARE)
        return replace(outlook, eta_s=stretch * outlook.eta_s)

    def _read(self) -> tuple[tuple[Pending, ...], TickTimes]:
        with self._lock:
            return tuple(self._jobs.values()), self._tick_times

    def _now(self) -> _Moment:
        jobs, tick_times = self._read()
        rows, places = sum(job.work.rows for job in jobs), sum(job.places_left for job in jobs)
        load = Load(len(jobs), rows, places, sum(job.beside_s for job in jobs))
        return _Moment(jobs, load, tick_times)

    def _fluid(self, jobs: Sequence[Pending], times: TickTimes) -> Fluid:
        return Fluid(jobs, self._sharing, times)

    def _forecast(self, jobs: Sequence[Pending], times: TickTimes, until: str | None = None) -> dict[str, Outlook]:
        return forecast(jobs, self._sharing, times, until)


def _unmeetable(deadline_s: float, eta_s: float) -> DeadlineUnmeetable:
    least_s = math.ceil(eta_s * 10) / 10
    return DeadlineUnmeetable(
        f"this job would be done in {eta_s:.1f} s, its deadline_s is {deadline_s:g}",
        value=deadline_s,
        bound=f"at least {least_s:g} s at this load",
    )


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
