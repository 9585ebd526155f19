"""Admission of jobs. A job's cost is known when it arrives, so a refusal can say when to retry. No torch.

Any thread may admit a job. The worker's thread removes finished work. Callers pass the time, in seconds of a monotonic
clock.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from tminus.service.errors import DeadlineUnmeetable, InvalidField, Overloaded
from tminus.service.model_info import Limits
from tminus.service.scheduling.forecast import Arrivals, Pending, Speed, forecast, stretch
from tminus.service.scheduling.owners import OwnerTimes
from tminus.service.scheduling.room import (
    BacklogForecast,
    ClusterLoad,
    Intake,
    Load,
    Overload,
    RetryQueue,
    find_overload,
    load_of,
)
from tminus.service.scheduling.scheduler import RESERVED_SHARE
from tminus.service.work import JobRows, Outlook, Work

RENEW_S = 5.0  # maximum age of a BacklogForecast; jobs that have ended since then only make the retry times later
ROUNDING = 1e-6  # tolerance in seconds
# The recent load decides how much of its deadline an adaptive job may use at a setting that is not the fastest. The
# rest is left for jobs that arrive later and overtake it. Measurements: docs/adaptive-quality.md.
LOAD_S = 2.0  # time constant of the recent load
SPARE_LOAD = 0.4  # up to this load, a job may use its whole deadline
LEAST_SHARE = 0.12  # smallest share of the deadline that a job may use
# An accepted job that a new one delays counts as late if its forecast uses more than this share of the time to its
# deadline. Forecasts may be too early.
MARGIN = 0.9


@dataclass(frozen=True, slots=True)
class _Moment:
    """A copy of the ledger: the accepted jobs in order of arrival, their load, and the models' speeds."""

    jobs: Sequence[Pending]
    load: Load
    speeds: Mapping[int, Speed]
    service_time_s: Mapping[str, float]  # keyed by owner


class Admission:
    """Keeps the ledger of accepted work. Refuses jobs that exceed a limit or end too late.

    The limits on jobs and on backlog apply to all models together. The limit on rows applies to each model separately.
    """

    def __init__(self, limits: Limits, times: OwnerTimes | None = None, *, shared: bool = False) -> None:
        """limits: only max_jobs and max_backlog_s are used. times: the OwnerTimes that the schedulers use too.

        shared: the server may have several owners of jobs.
        """
        self._limits, self._times, self._shared = limits, times or OwnerTimes(), shared
        # Guards the ledger and the speeds. Make no forecast while holding this lock, because the worker may need it.
        self._lock = threading.Lock()
        # The ledger, keyed by job id, in order of arrival. The schedulers keep the same counts, but they know a job
        # only after the worker's thread has begun it, and only that thread may use them.
        self._jobs: dict[str, Pending] = {}
        self._speeds: dict[int, Speed] = {}  # keyed by model number
        # Held during the admission of one request. Guards the attributes below. Acquire it before _lock.
        self._admitting = threading.Lock()
        # Keyed by owner. The queue under None is for the limits of the whole server.
        self._retry_queues: defaultdict[str | None, RetryQueue] = defaultdict(RetryQueue)
        self._arrivals: defaultdict[str, Arrivals] = defaultdict(Arrivals)  # keyed by owner
        # (forecast, time when it was made), keyed by owner. Cleared when a job is accepted.
        self._forecasts: dict[str | None, tuple[BacklogForecast, float]] = {}
        # How busy the accepted adaptive jobs would keep the server if each had its best setting, and when that was
        # computed. 1 is full. Chosen settings do not count, or the choice would swing.
        self._load, self._load_at_s = 0.0, 0.0

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
        best: Work | None = None,
    ) -> Outlook:
        """Accept a job and add it to the ledger. Raises Overloaded, DeadlineUnmeetable or InvalidField.

        has_picture: the job starts from a picture. best: an adaptive job's cost at its best setting.

        An idle server accepts any valid job. Each refused client gets a different Retry-After, but a refusal reserves
        no capacity.
        """
        with self._admitting:
            server = self._now(owner)
            job = _pending(job_id, work, owner, server, now_s, deadline_s, has_picture=has_picture)
            self._check_room(job, now_s, server)
            outlook = forecast([*server.jobs, job], server.speeds, job_id, server.service_time_s)[job_id]
            if deadline_s is not None and outlook.eta_s > deadline_s:
                raise _unmeetable(deadline_s, outlook.eta_s)
            speed = server.speeds[work.model]
            self._arrivals[owner].add(job.places_left * speed.place_s, now_s)
            if best is not None:
                best_s = best.places * server.speeds[best.model].place_s
                self._load, self._load_at_s = self._load_at(now_s) + best_s / LOAD_S, now_s
            self._forget_gone(now_s)
            self._take(job)
            return self._foresee(outlook, job, now_s, speed)

    def best_in_time(
        self,
        works: Sequence[Work],
        owner: str = "",
        *,
        now_s: float,
        deadline_s: float,
        has_picture: bool = False,
    ) -> int:
        """Return the index of the best setting at which a job meets its deadline. The job is not added to the ledger.

        works: the job's cost at each setting, from the best to the fastest.

        The job must not make an accepted job miss its deadline. At the fastest setting the job may end at its deadline.
        At the others it must end earlier if the recent load is high. Raises DeadlineUnmeetable with the forecast of the
        fastest setting, or InvalidField. If no setting fits the limits, the index of the fastest is returned, which
        `enter` refuses.
        """
        with self._admitting:
            server, last = self._now(owner), len(works) - 1
            share = max(LEAST_SHARE, SPARE_LOAD / max(self._load_at(now_s), SPARE_LOAD))
            ends_without = cache(lambda: _ends_s(server.jobs, server, now_s))
            for k, work in enumerate(works):
                try:
                    job = _pending("", work, owner, server, now_s, deadline_s, has_picture=has_picture)
                except InvalidField:
                    if k == last:
                        raise
                    continue
                if find_overload(server.load, job.work, self._limits, server.speeds[work.model]) is not None:
                    continue
                jobs, ready_s = [*server.jobs, job], deadline_s * (share if k < last else 1.0)
                outlook = forecast(jobs, server.speeds, "", server.service_time_s, math.inf if k == last else ready_s)
                if "" not in outlook or outlook[""].eta_s > ready_s:
                    if k == last:
                        raise _unmeetable(deadline_s, outlook[""].eta_s)
                    continue
                if not _makes_late(server, now_s, _ends_s(jobs, server, now_s), ends_without):
                    return k
                if k == last:
                    raise _makes_others_late(deadline_s, outlook[""].eta_s)
            return last

    def leave_to_any(
        self,
        work: Work,
        load: ClusterLoad,
        *,
        now_s: float,
        deadline_s: float | None = None,
        has_picture: bool = False,
    ) -> Outlook:
        """Return the outlook of a job that any replica may run. Raises like `enter`.

        The job is not added to this server's ledger.
        """
        with self._admitting:
            server = self._now()
            job = _pending("", work, "", server, now_s, deadline_s, has_picture=has_picture)
            if (overload := load.overload(work, self._limits)) is not None:
                room_s = now_s + load.room_in_s(overload)
                due_s = self._retry_queues[None].next_s(room_s, work.places / (load.places_per_s or math.inf))
                raise _overloaded(overload, max(1, math.ceil(due_s - now_s - ROUNDING)))
            eta_s = load.backlog_s + forecast([job], server.speeds)[""].eta_s
            if deadline_s is not None and eta_s > deadline_s:
                raise _unmeetable(deadline_s, eta_s)
            return Outlook(load.jobs, eta_s)

    def readmit(self, job_id: str, work: Work, owner: str = "", *, places_left: int) -> Outlook:
        """Add a job that an earlier process accepted, without checking the backlog or the job's deadline.

        Raises Overloaded if the job would exceed the limit on jobs or rows. The Retry-After is then always 1 s.
        """
        with self._admitting:
            slots = replace(self._limits, max_backlog_s=math.inf)
            server = self._now()
            speed = server.speeds[work.model]
            work = speed.with_autoencoder_s(work, has_picture=False)
            overload = find_overload(server.load, work, slots, speed)
            if overload is not None:
                raise _overloaded(overload, 1)
            self._take(Pending(job_id, work, places_left, work.autoencoder_s, owner))
        server = self._now()
        return forecast(server.jobs, server.speeds, job_id, server.service_time_s)[job_id]

    def outlooks(self, now_s: float) -> dict[str, Outlook]:
        """Forecast each accepted job. Returns the outlooks, keyed by job id."""
        server = self._now()
        outlooks = forecast(server.jobs, server.speeds, service_time_s=server.service_time_s)
        with self._admitting:
            return {
                job.job_id: self._foresee(outlooks[job.job_id], job, now_s, server.speeds[job.work.model])
                for job in server.jobs
            }

    @property
    def backlog_s(self) -> float:
        """Predicted duration of all remaining work, if every tick is full."""
        load = self._now().load
        return load.ticks_s + load.autoencoder_s

    def places_per_s(self, model: int) -> float:
        """Return a model's throughput in places per second; infinity if its speed was not measured."""
        with self._lock:
            place_s = self._speeds[model].place_s
        return 1 / place_s if place_s else math.inf

    def holds(self, model: int) -> bool:
        """Return True if the ledger has a job of this model."""
        return any(job.work.model == model for job in self._read()[0])

    def work_left_s(self, model: int) -> float:
        """Predict the duration of a model's remaining work, if every tick is full."""
        jobs, speeds = self._read()
        return sum(job.places_left * speeds[model].place_s for job in jobs if job.work.model == model)

    def intake(self, model: int, ahead_s: float, oldest_us: int | None = None) -> Intake:
        """Return a model's Intake. It takes a job if less than `ahead_s` seconds of work go before it."""
        jobs, speeds = self._read()
        if not (place_s := speeds[model].place_s):
            return Intake(math.inf, oldest_us=oldest_us)
        held = ((job.places_left * speeds[job.work.model].place_s + job.autoencoder_s) / place_s for job in jobs)
        return Intake(ahead_s / place_s, held, oldest_us=oldest_us)

    @property
    def tick_time_ratio(self) -> float:
        """How many times longer a tick takes than at the start, for the model that has slowed down most."""
        with self._lock:
            return max((speed.correction for speed in self._speeds.values()), default=1.0)

    @property
    def longest_tick_s(self) -> float:
        """Predicted duration of a full tick of the slowest model."""
        with self._lock:
            return max((speed.longest_tick_s for speed in self._speeds.values()), default=0.0)

    @property
    def rows(self) -> int:
        """Number of rows of all accepted jobs."""
        return sum(job.work.rows for job in self._read()[0])

    # --- models ---

    def put(self, model: int, speed: Speed) -> None:
        """Add a model, or replace its speed."""
        with self._lock:
            self._speeds[model] = speed

    def remove(self, model: int) -> None:
        """Remove a model. No job may use the model now or later."""
        with self._lock:
            assert all(job.work.model != model for job in self._jobs.values())
            self._speeds.pop(model, None)

    # --- from the worker's thread ---

    def stepped(
        self, model: int, jobs: Iterable[JobRows], places: int, seconds: float, *, overlaps: bool = False
    ) -> None:
        """Subtract a tick's work from the ledger, and update the model's speed.

        places: 0 if `seconds` is not a measurement. overlaps: another tick was in flight when this tick began.
        """
        with self._lock:
            for job_id, _, count in jobs:
                job = self._jobs.get(job_id)
                if job is not None:
                    self._jobs[job_id] = replace(job, places_left=max(0, job.places_left - count))
            if places > 0:
                self._speeds[model] = self._speeds[model].observe(places, seconds, overlaps=overlaps)

    def decoded(self, job_id: str) -> None:
        """Subtract the decoding of one image from the ledger."""
        with self._lock:
            if (job := self._jobs.get(job_id)) is not None:
                decode_s = self._speeds[job.work.model].decode_s
                self._jobs[job_id] = replace(job, autoencoder_s=max(0.0, job.autoencoder_s - decode_s))

    def leave(self, job_id: str) -> None:
        """Remove an ended job from the ledger. Unknown job ids are ignored."""
        with self._lock:
            self._jobs.pop(job_id, None)

    # --- limits ---

    def _check_room(self, job: Pending, now_s: float, server: _Moment) -> None:
        """Raise Overloaded for a job that would exceed a limit."""
        if not server.load.jobs:  # clients that were refused earlier may be gone by now
            self._retry_queues.clear()
        speed = server.speeds[job.work.model]
        overload = find_overload(server.load, job.work, self._limits, speed)
        if overload is None:
            return
        owner = job.owner if self._shared else None
        made, made_s = self._forecasts.get(owner, (None, 0.0))
        if made is None or now_s > made_s + RENEW_S:
            made = BacklogForecast(server.jobs, now_s, self._limits, server.speeds, server.service_time_s, owner)
            self._forecasts[owner] = made, now_s
        room_s = max(now_s, made.room_s(job.work, speed))
        queue = self._retry_queues[job.owner if overload.of_owner else None]
        due_s = queue.next_s(room_s, made.share_s(overload, job.work, speed))
        raise _overloaded(overload, max(1, math.ceil(due_s - now_s - ROUNDING)))

    def _take(self, job: Pending) -> None:
        with self._lock:
            assert job.job_id not in self._jobs
            self._jobs[job.job_id] = job
        self._forecasts.clear()

    def _forget_gone(self, now_s: float) -> None:
        """Forget the owners that have no jobs, if they are by far the most."""
        owners = {None, *(job.owner for job in self._read()[0])}
        if len(self._retry_queues) + len(self._arrivals) > 8 * len(owners) + 16:
            queues = {key: queue for key, queue in self._retry_queues.items() if key in owners}
            self._retry_queues = defaultdict(RetryQueue, queues)
            kept = {key: own for key, own in self._arrivals.items() if key in owners or not own.are_over(now_s)}
            self._arrivals = defaultdict(Arrivals, kept)

    # --- forecasts ---

    def _load_at(self, now_s: float) -> float:
        return self._load * math.exp(min(0.0, self._load_at_s - now_s) / LOAD_S)

    def _foresee(self, outlook: Outlook, job: Pending, now_s: float, speed: Speed) -> Outlook:
        """Lengthen a job's ETA, because shorter jobs will probably arrive later and overtake it."""
        if not speed.policy.times.points:
            return outlook
        shorter = self._arrivals[job.owner].share(job.places_left * speed.place_s, now_s)
        return replace(outlook, eta_s=stretch(shorter, RESERVED_SHARE) * outlook.eta_s)

    def _read(self) -> tuple[tuple[Pending, ...], Mapping[int, Speed]]:
        with self._lock:
            return tuple(self._jobs.values()), dict(self._speeds)

    def _now(self, owner: str = "") -> _Moment:
        """Copy the ledger. owner: the owner of the job that is being admitted."""
        jobs, speeds = self._read()
        load = load_of(jobs, speeds, owner if self._shared else None)
        return _Moment(jobs, load, speeds, self._times.of({owner, *(job.owner for job in jobs)}))


def _ends_s(jobs: Sequence[Pending], server: _Moment, now_s: float) -> Mapping[str, float]:
    """Forecast in how many seconds jobs end, keyed by job id. Those that end after the last deadline may be missing."""
    due_s = [job.due_s - now_s for job in server.jobs if job.due_s is not None]
    if not due_s:
        return {}
    outlooks = forecast(jobs, server.speeds, None, server.service_time_s, max(due_s))
    return {job_id: outlook.eta_s for job_id, outlook in outlooks.items()}


def _makes_late(
    server: _Moment, now_s: float, ends_s: Mapping[str, float], ends_without: Callable[[], Mapping[str, float]]
) -> bool:
    """Return True if a new job delays an accepted job so that it will probably miss its deadline.

    ends_s: when jobs end with the new job. ends_without: a function that forecasts when they end without it.
    """
    for job in server.jobs:
        if job.due_s is None:
            continue
        due_s, end_s = job.due_s - now_s, ends_s.get(job.job_id, math.inf)
        if end_s > MARGIN * due_s:
            before_s = ends_without().get(job.job_id, math.inf)
            if before_s < end_s - ROUNDING and before_s <= due_s:
                return True
    return False


def _pending(
    job_id: str,
    work: Work,
    owner: str,
    server: _Moment,
    now_s: float,
    deadline_s: float | None,
    *,
    has_picture: bool,
) -> Pending:
    """Make the ledger entry of a new job.

    Raises InvalidField if the job has too many rows, or if even an idle server would miss the job's deadline.
    """
    speed = server.speeds[work.model]
    if work.rows > speed.max_rows:
        raise InvalidField.of("n", f"at most {speed.max_rows}", work.rows)
    work = speed.with_autoencoder_s(work, has_picture=has_picture)
    due_s = None if deadline_s is None else now_s + deadline_s
    job = Pending(job_id, work, work.places, work.autoencoder_s, owner, due_s)
    if deadline_s is not None:
        alone_s = forecast([job], server.speeds)[job_id].eta_s
        if not deadline_s >= alone_s:  # not `<`, to refuse NaN too
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


def _makes_others_late(deadline_s: float, eta_s: float) -> DeadlineUnmeetable:
    return DeadlineUnmeetable(
        f"at the fastest setting this job would be done in {eta_s:.1f} s, and accepted jobs would miss their deadlines",
        value=deadline_s,
        bound="that of a request at a lower load",
    )


def _overloaded(overload: Overload, wait_s: int) -> Overloaded:
    whose, limit = ("of this key ", "limit of a key now") if overload.of_owner else ("", "limit")
    if overload.field == "backlog_s":
        detail = f"{overload.value:.1f} s of work {whose}would be waiting; the {limit} is {overload.limit:g} s"
    else:
        detail = f"{overload.value} {overload.field} {whose}would be held at once; the {limit} is {overload.limit:g}"
    return Overloaded(
        detail,
        retry_after_s=wait_s,
        field=overload.field,
        value=round(overload.value, 1),
        bound=f"at most {overload.limit:g}",
        of_owner=overload.of_owner,
    )
