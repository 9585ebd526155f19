"""Accept or refuse jobs. A job's cost is known on arrival, so a refusal can say when to try again. No torch.

Any thread may ask; the worker's takes work off. Time is an argument: seconds of any clock that does not go back.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tminus.service.errors import DeadlineUnmeetable, InvalidField, Overloaded
from tminus.service.model_info import Limits
from tminus.service.scheduling.cluster import ClusterLoad, Intake
from tminus.service.scheduling.forecast import Arrivals, Pending, Speed, forecast, stretch
from tminus.service.scheduling.owners import OwnerTimes
from tminus.service.scheduling.room import Drain, Excess, Line, Load, find_excess, load_of
from tminus.service.scheduling.scheduler import RESERVED_SHARE
from tminus.service.work import JobRows, Outlook, Work

RENEW_S = 5.0  # how old a forecast of room may get: jobs that left early since only make it too careful
ROUNDING = 1e-6  # of a second


@dataclass(frozen=True, slots=True)
class _Moment:
    """The accepted jobs at a time, in order of arrival, and how long ticks take."""

    jobs: Sequence[Pending]
    load: Load  # what they come to
    speeds: Mapping[int, Speed]
    had_s: Mapping[str, float]  # by owner, the time of the machine that it has had


class Admission:
    """Owns the ledger of accepted work and how long ticks take; refuses what is over the limits or would be late.

    The jobs are of all models, and so are the limits of jobs and backlog; each model has slots for rows of its own.
    """

    def __init__(self, limits: Limits, times: OwnerTimes | None = None, *, shared: bool = False) -> None:
        """limits: of which those of jobs and max_backlog_s hold here. times: those of the schedulers.

        shared: several owners may come.
        """
        self._limits, self._times, self._shared = limits, times or OwnerTimes(), shared
        # Guards the ledger and the speeds. The worker must not wait for a forecast, so none is made under this lock.
        self._lock = threading.Lock()
        # The ledger, in order of arrival. The schedulers count the same work, but only in the worker's thread, and only
        # once that has taken a job up; requests are admitted in other threads, and a job counts from then on.
        self._jobs: dict[str, Pending] = {}
        self._speeds: dict[int, Speed] = {}  # by model
        # Held while a request is being admitted, one at a time; guards what follows. Taken before _lock.
        self._admitting = threading.Lock()
        self._lines: defaultdict[str | None, Line] = defaultdict(Line)  # by owner, and that of all
        self._arrivals: defaultdict[str, Arrivals] = defaultdict(Arrivals)  # by owner
        self._drains: dict[str | None, tuple[Drain, float]] = {}  # with when each was made; none since a job came in

    # --- from any thread ---

    def enter(
        self,
        job_id: str,
        work: Work,
        owner: str = "",
        *,
        now_s: float,
        deadline_s: float | None = None,
        has_picture: bool = False,
    ) -> Outlook:
        """Accept a job and count it, or raise Overloaded, DeadlineUnmeetable or InvalidField.

        has_picture: it starts from one. owner: whose job it is.

        An idle server takes any job within the bounds. Overloaded tells when there should be room, each client another
        time; none is kept for it.
        """
        with self._admitting:
            server = self._now(owner)
            job = _pending(job_id, work, owner, server, deadline_s, has_picture=has_picture)
            self._check_room(job, now_s, server)
            outlook = forecast([*server.jobs, job], server.speeds, job_id, server.had_s)[job_id]
            if deadline_s is not None and outlook.eta_s > deadline_s:
                raise _unmeetable(deadline_s, outlook.eta_s)
            speed = server.speeds[work.model]
            self._arrivals[owner].add(job.places_left * speed.place_s, now_s)
            self._forget_gone(now_s)
            self._take(job)
            return self._foresee(outlook, job, now_s, speed)

    def leave_to_any(
        self,
        work: Work,
        load: ClusterLoad,
        *,
        now_s: float,
        deadline_s: float | None = None,
        has_picture: bool = False,
    ) -> Outlook:
        """Whether a job can be left to whichever replica has room first. Nothing is counted here. Raises as `enter`."""
        with self._admitting:
            server = self._now()
            job = _pending("", work, "", server, deadline_s, has_picture=has_picture)
            if (excess := load.excess(work, self._limits)) is not None:
                room_s = now_s + load.room_in_s(excess)
                due_s = self._lines[None].next_s(room_s, work.places / (load.places_per_s or math.inf))
                raise _overloaded(excess, max(1, math.ceil(due_s - now_s - ROUNDING)))
            eta_s = load.backlog_s + forecast([job], server.speeds)[""].eta_s
            if deadline_s is not None and eta_s > deadline_s:
                raise _unmeetable(deadline_s, eta_s)
            return Outlook(load.jobs, eta_s)

    def readmit(self, job_id: str, work: Work, owner: str = "", *, places_left: int) -> Outlook:
        """Count a job that an earlier process accepted: neither backlog nor deadline refuses it any more.

        Raises Overloaded while there are no slots for it; its Retry-After is no forecast.
        """
        with self._admitting:
            slots = replace(self._limits, max_backlog_s=math.inf)
            server = self._now()
            speed = server.speeds[work.model]
            work = speed.with_beside(work, has_picture=False)
            excess = find_excess(server.load, work, slots, speed)
            if excess is not None:
                raise _overloaded(excess, 1)
            self._take(Pending(job_id, work, places_left, work.beside_s, owner))
        server = self._now()
        return forecast(server.jobs, server.speeds, job_id, server.had_s)[job_id]

    def outlooks(self, now_s: float) -> dict[str, Outlook]:
        """Predict the end of every job, by its id."""
        server = self._now()
        outlooks = forecast(server.jobs, server.speeds, had_s=server.had_s)
        with self._admitting:
            return {
                job.job_id: self._foresee(outlooks[job.job_id], job, now_s, server.speeds[job.work.model])
                for job in server.jobs
            }

    @property
    def backlog_s(self) -> float:
        """Predicted seconds of accepted work that is not done, at the rate of full ticks."""
        load = self._now().load
        return load.ticks_s + load.beside_s

    def places_per_s(self, model: int) -> float:
        """How many places of a model full ticks take in a second."""
        with self._lock:
            place_s = self._speeds[model].place_s
        return 1 / place_s if place_s else math.inf

    def work_left_s(self, model: int) -> float:
        """Return the seconds that full ticks take for what a model has to do."""
        jobs, speeds = self._read()
        return sum(job.places_left * speeds[model].place_s for job in jobs if job.work.model == model)

    def intake(self, model: int, ahead_s: float, oldest_us: int | None = None) -> Intake:
        """What jobs of a model can be taken on, so that at most so much work goes before each of them.

        oldest_us: see Intake.
        """
        jobs, speeds = self._read()
        if not (place_s := speeds[model].place_s):
            return Intake(math.inf, oldest_us=oldest_us)
        held = ((job.places_left * speeds[job.work.model].place_s + job.beside_s) / place_s for job in jobs)
        return Intake(ahead_s / place_s, held, oldest_us=oldest_us)

    @property
    def tick_time_ratio(self) -> float:
        """How much longer ticks take now than was measured at the start, of the model of which that is most."""
        with self._lock:
            return max((speed.correction for speed in self._speeds.values()), default=1.0)

    @property
    def longest_tick_s(self) -> float:
        """Predicted seconds of a full tick, of the slowest model."""
        with self._lock:
            return max((speed.longest_tick_s for speed in self._speeds.values()), default=0.0)

    @property
    def rows(self) -> int:
        """Rows accepted and not yet delivered."""
        return sum(job.work.rows for job in self._read()[0])

    # --- of models ---

    def put(self, model: int, speed: Speed) -> None:
        """Take on a model, or know its speed better."""
        with self._lock:
            self._speeds[model] = speed

    def remove(self, model: int) -> None:
        """Forget a model, which has no jobs any more and gets none."""
        with self._lock:
            assert all(job.work.model != model for job in self._jobs.values())
            self._speeds.pop(model, None)

    # --- from the worker's thread ---

    def stepped(
        self, model: int, jobs: Iterable[JobRows], places: int, seconds: float, *, overlaps: bool = False
    ) -> None:
        """Take a tick's work off the ledger, and learn how fast the machine is now.

        overlaps: whether it began while another tick was in flight.
        """
        with self._lock:
            for job_id, _, count in jobs:
                job = self._jobs.get(job_id)
                if job is not None:
                    self._jobs[job_id] = replace(job, places_left=max(0, job.places_left - count))
            if places > 0:
                self._speeds[model] = self._speeds[model].observe(places, seconds, overlaps=overlaps)

    def decoded(self, job_id: str) -> None:
        """Take one image of a latent model off the ledger."""
        with self._lock:
            if (job := self._jobs.get(job_id)) is not None:
                decode_s = self._speeds[job.work.model].decode_s
                self._jobs[job_id] = replace(job, beside_s=max(0.0, job.beside_s - decode_s))

    def leave(self, job_id: str) -> None:
        """Take a job off that is done or given up, with all it had left. Nothing happens if it is not here."""
        with self._lock:
            self._jobs.pop(job_id, None)

    # --- the limits ---

    def _check_room(self, job: Pending, now_s: float, server: _Moment) -> None:
        """Refuse a job that would pass a limit."""
        if not server.load.jobs:  # whoever was told a time may be gone, and the next need not come after them
            self._lines.clear()
        speed = server.speeds[job.work.model]
        excess = find_excess(server.load, job.work, self._limits, speed)
        if excess is None:
            return
        owner = job.owner if self._shared else None
        drain, made_s = self._drains.get(owner, (None, 0.0))
        if drain is None or now_s > made_s + RENEW_S:
            drain = Drain(server.jobs, now_s, self._limits, server.speeds, server.had_s, owner)
            self._drains[owner] = drain, now_s
        room_s = max(now_s, drain.room_s(job.work, speed))
        line = self._lines[job.owner if excess.of_owner else None]
        due_s = line.next_s(room_s, drain.share_s(excess, job.work, speed))
        raise _overloaded(excess, max(1, math.ceil(due_s - now_s - ROUNDING)))

    def _take(self, job: Pending) -> None:
        with self._lock:
            assert job.job_id not in self._jobs
            self._jobs[job.job_id] = job
        self._drains.clear()

    def _forget_gone(self, now_s: float) -> None:
        """Forget what is kept of owners that are gone, once these are most."""
        owners = {None, *(job.owner for job in self._read()[0])}
        if len(self._lines) + len(self._arrivals) > 8 * len(owners) + 16:
            self._lines = defaultdict(Line, {key: line for key, line in self._lines.items() if key in owners})
            kept = {key: own for key, own in self._arrivals.items() if key in owners or not own.are_over(now_s)}
            self._arrivals = defaultdict(Arrivals, kept)

    # --- the forecast ---

    def _foresee(self, outlook: Outlook, job: Pending, now_s: float, speed: Speed) -> Outlook:
        """Count on as much work as has come lately, where it overtakes a job."""
        if not speed.sharing.times.points:
            return outlook
        shorter = self._arrivals[job.owner].share(job.places_left * speed.place_s, now_s)
        return replace(outlook, eta_s=stretch(shorter, RESERVED_SHARE) * outlook.eta_s)

    def _read(self) -> tuple[tuple[Pending, ...], Mapping[int, Speed]]:
        with self._lock:
            return tuple(self._jobs.values()), dict(self._speeds)

    def _now(self, owner: str = "") -> _Moment:
        """Look at the accepted jobs as they are now. owner: who asks."""
        jobs, speeds = self._read()
        load = load_of(jobs, speeds, owner if self._shared else None)
        return _Moment(jobs, load, speeds, self._times.of({owner, *(job.owner for job in jobs)}))


def _pending(
    job_id: str, work: Work, owner: str, server: _Moment, deadline_s: float | None, *, has_picture: bool
) -> Pending:
    """Return a new job as the ledger has it. Raises InvalidField if even an idle server could not do it, or in time."""
    speed = server.speeds[work.model]
    if work.rows > speed.max_rows:
        raise InvalidField.of("n", f"at most {speed.max_rows}", work.rows)
    work = speed.with_beside(work, has_picture=has_picture)
    job = Pending(job_id, work, work.places, work.beside_s, owner)
    if deadline_s is not None:
        alone_s = forecast([job], server.speeds)[job_id].eta_s
        if not deadline_s >= alone_s:  # not `<`, so that NaN is refused
            least_s = math.ceil(alone_s * 1000) / 1000
            raise InvalidField.of("deadline_s", f"at least {least_s:g} s for this work", deadline_s)
    return job


def _unmeetable(deadline_s: float, eta_s: float) -> DeadlineUnmeetable:
    least_s = math.ceil(eta_s * 10) / 10
    return DeadlineUnmeetable(
        f"this job would be done in {eta_s:.1f} s, its deadline_s is {deadline_s:g}",
        value=deadline_s,
        bound=f"at least {least_s:g} s at this load",
    )


def _overloaded(excess: Excess, wait_s: int) -> Overloaded:
    whose, limit = ("of this key ", "limit of a key now") if excess.of_owner else ("", "limit")
    if excess.field == "backlog_s":
        detail = f"{excess.value:.1f} s of work {whose}would be waiting; the {limit} is {excess.limit:g} s"
    else:
        detail = f"{excess.value} {excess.field} {whose}would be held at once; the {limit} is {excess.limit:g}"
    return Overloaded(
        detail,
        retry_after_s=wait_s,
        field=excess.field,
        value=round(excess.value, 1),
        bound=f"at most {excess.limit:g}",
        of_owner=excess.of_owner,
    )
