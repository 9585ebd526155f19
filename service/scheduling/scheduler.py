"""Picks the model and the rows of each tick. Pure: no torch, no asyncio, no clock.

A place is one row's forward pass in a tick. A guided row takes two places.

The job with the least work left goes first, so a short job does not wait behind a long job. A job that is much longer
than another job is held back: it does not fill up the ticks of short jobs, so these ticks are shorter. The oldest job
always has a share, to avoid starvation: a share of the places of each tick, or a share of the time while the job is
held back. A row that is not picked waits; preemption costs nothing. Two ticks are in flight only while more rows wait
than one tick has places, see `Scheduler.overlaps`.

These rules order the jobs of one owner. If several owners have jobs, the places of a tick are first divided among the
owners (owners.py). A tick runs one model. The same rules pick the model, by seconds instead of places.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, count, islice, pairwise
from operator import itemgetter
from typing import Generic, TypeVar

from tminus.service.scheduling.owners import BURST_S, OwnerTimes, allot
from tminus.service.work import Batch, JobRows, Work

Rank = tuple[float, float, int]  # (the owner's service time, seconds of work left, arrival number)

RESERVED_SHARE = 0.25  # the oldest job's share of the places, or of the time
# An owner leads if it is behind the next owner by this many full ticks, or this many seconds, whichever is less.
LEAD_TICKS, MOST_LEAD_S = 2.0, BURST_S / 2
LONGER = 1.25  # other owners' rows may lengthen a leader's tick by at most this factor
MOST_IN_FLIGHT = 2  # Python works on one tick while the processor computes the other
MUCH_LONGER = 8  # a job is much longer than another if its total work is at least this many times as large
LEVEL_S = 0.5  # owners whose service times differ by at most this many seconds count as equal

Model = TypeVar("Model")


@dataclass(frozen=True, slots=True)
class TickTimes:
    """Measured durations of ticks by number of places, interpolated linearly.

    Without measured points, every tick is predicted to take 0 s.
    """

    points: tuple[tuple[int, float], ...] = ()  # (places, seconds), places ascending
    # Duration of a full tick that overlaps another tick, relative to a tick alone. None: ticks do not overlap.
    overlapped: float | None = None

    def __post_init__(self) -> None:
        assert all(a < b for a, b in pairwise([0, *(places for places, _ in self.points)])), self.points
        assert all(0 <= seconds < math.inf for _, seconds in self.points), self.points

    def seconds(self, places: int) -> float:
        """Predict the seconds of a tick: constant below the first point, and extrapolated after the last point."""
        points = self.points
        if not points:
            return 0.0
        if len(points) == 1:
            return points[0][1] * max(1.0, places / points[0][0])
        if places <= points[0][0]:
            return points[0][1]
        right = min(bisect_right(points, places, key=itemgetter(0)), len(points) - 1)
        (b0, t0), (b1, t1) = points[right - 1 : right + 1]
        slope = (t1 - t0) / (b1 - b0)
        if places > b1:
            # Noise can make the last point faster than the one before. A falling line must not be extrapolated.
            return t1 + max(0.0, slope) * (places - b1)
        return t0 + slope * (places - b0)

    def seconds_per_place(self, max_batch: int) -> float:
        return self.seconds(max_batch) / max_batch


UNMEASURED = TickTimes()


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """Divides the places of a tick. The oldest job gets its reserved places first, unless the job is held back."""

    max_batch: int  # places in a tick; at least 2, because a guided row takes two
    short_batch: int  # much longer jobs fill a tick with a short job only up to a multiple of this number
    reserved: int  # places for the oldest job unless it is held back; with 0, it has no share of the time either
    times: TickTimes = UNMEASURED  # measured at the start
    place_s: float = 1.0  # seconds of a place in a full tick, to compare jobs of several models

    @classmethod
    def of(cls, max_batch: int, short_batch: int | None = None, times: TickTimes = UNMEASURED) -> "BatchPolicy":
        """Make a policy that reserves at least two places for the oldest job, because a guided row needs two."""
        assert max_batch >= 2
        reserved = max(2, int(max_batch * RESERVED_SHARE))
        place_s = times.seconds_per_place(max_batch) or 1.0
        return cls(max_batch, min(short_batch or max_batch, max_batch), reserved, times, place_s)

    @property
    def full_batch(self) -> int:
        """Places of each tick while two ticks are in flight and enough rows wait to fill both."""
        if self.times.overlapped is None:
            return self.max_batch
        return max(self.max_batch, min(2 * self.max_batch, self.times.points[-1][0]))

    def is_leader(self, ahead_s: float) -> bool:
        """Return True if the owner with the least service time leads.

        ahead_s: the next owner's service time minus the least. Rows of other owners may lengthen a leader's ticks only
        a little.
        """
        return ahead_s > min(LEAD_TICKS * self.max_batch * self.place_s, MOST_LEAD_S)

    def places_for_others(self, places: int) -> int:
        """Return the places that other owners may have in a leader's tick. places: the leader's places."""
        return _places_for_others(self.times, self.max_batch, places)

    def tick_s(self, places: int) -> float:
        """Predict the seconds of a tick. Without measurements, each place takes `place_s`."""
        return self.times.seconds(places) or places * self.place_s

    def charge(self, places: Mapping[str, int], leader: str | None, *, only_owner: bool) -> dict[str, float]:
        """Return the seconds to charge each owner for its places in a tick.

        The leader is also charged for the places that other owners could not get. only_owner: no other owner has a
        job. Then only the time beyond half of the machine is charged. This charge counts when another owner arrives.
        """
        total = sum(places.values())
        tick_s = self.tick_s(total)
        if only_owner:
            return dict.fromkeys(places, max(0.0, total * self.place_s - tick_s / 2))
        if leader is not None and leader in places:
            taken_s = {owner: count * self.place_s for owner, count in places.items()}
            taken_s[leader] += max(0.0, tick_s - sum(taken_s.values()))
            return taken_s
        return {owner: count / total * tick_s for owner, count in places.items()}

    def reserve(self, places: int, needed: int, turn: int) -> int:
        """Return the places in a tick that an owner's oldest job gets first. places: the owner's places.

        needed: places of one row of the job. turn: number of the tick. If the job's share is less than one row, the job
        gets a row in some ticks only.
        """
        if places >= self.max_batch:
            return places * self.reserved // self.max_batch
        kept = places * self.reserved / self.max_batch
        if kept >= needed:
            return int(kept)
        share = kept / needed
        return needed if turn * share % 1 < share and needed <= places else 0

    def short_room(self, size: int, free: int) -> int:
        """Return the free places for held-back jobs, which fill a tick only up to a multiple of short_batch."""
        used = size - free
        return min(max(1, math.ceil(used / self.short_batch)) * self.short_batch, size) - used


@lru_cache(maxsize=4096)
def _places_for_others(times: TickTimes, max_batch: int, places: int) -> int:
    most_s, total = LONGER * times.seconds(places), places
    while total < max_batch and times.seconds(total + 1) <= most_s:
        total += 1
    return max(0, total - places)


@dataclass(slots=True)
class QueuedJob:
    """A job with its unfinished rows in two sorted lists, the least advanced row first."""

    id: str
    owner: str
    arrival: int
    work: Work
    total: int  # total work of the job, in places
    rows: tuple[int, ...]
    singles: list[tuple[int, int]] = field(default_factory=list)  # (next step, index in rows) of one-place rows
    doubles: list[tuple[int, int]] = field(default_factory=list)  # the same for guided rows, which take two places
    places_left: int = 0
    started: bool = False
    in_flight: tuple[JobRows, ...] = ()  # rows in ticks in flight; these rows are in neither list
    key: tuple[int, int, str] = (0, 0, "")  # sort key in the owner's queue

    def put(self, rows: Iterable[tuple[int, int]], ticks: int = 0) -> None:
        """Advance rows by `ticks` steps and add them to the lists. Finished rows are left out."""
        guided, steps = self.work.guided, self.work.steps
        for before, index in rows:
            if (step := before + ticks) < steps:
                (self.doubles if step in guided else self.singles).append((step, index))
        self.singles.sort()
        self.doubles.sort()

    def begin(self, picked: JobRows) -> None:
        """Move the rows of a batch from the lists to `in_flight`."""
        doubles = picked.places - len(picked.steps)
        singles = len(picked.steps) - doubles
        first = (*self.singles[:singles], *self.doubles[:doubles])
        assert first == picked.steps, f"job {self.id} has changed since the batch was chosen"
        del self.singles[:singles], self.doubles[:doubles]
        self.in_flight += (picked,)

    def end(self, picked: JobRows, ticks: int) -> int:
        """Advance the rows of a batch by `ticks` steps, at most to the last step. Return the places that this took."""
        self.in_flight = tuple(each for each in self.in_flight if each is not picked)
        taken, left = picked.places, self.work.places_left
        if ticks > 1:
            taken = sum(left(step) - left(min(step + ticks, self.work.steps)) for step, _ in picked.steps)
        self.places_left -= taken
        self.put(picked.steps, ticks)
        return taken

    @property
    def places_now(self) -> int:
        """Places for one step of all rows that are not in flight."""
        return len(self.singles) + 2 * len(self.doubles)


class OwnerQueue:
    """The unfinished jobs of one owner, ordered by remaining work."""

    def __init__(self, policy: BatchPolicy) -> None:
        self._policy = policy
        # In order of arrival. An OrderedDict finds its first entry at once. A dict first walks over deleted entries.
        self._jobs: OrderedDict[str, QueuedJob] = OrderedDict()
        self._much_longer: float | None = None  # cache; None after a job was added or removed
        # Sort keys of the jobs, with the next job last, because a list changes cheaply at its end. Jobs with all rows
        # in flight are left out.
        self._queue: list[tuple[int, int, str]] = []
        self.ticks = 0  # ticks in which the owner had places
        self._owed_seconds = 0.0  # owed to the oldest job while the job is held back

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, job: QueuedJob) -> None:
        self._jobs[job.id] = job
        self._much_longer = None
        self.put_back(job)

    def forget(self, job: QueuedJob) -> None:
        """Remove a job. Call `take_out` first."""
        if job is self.oldest:
            self._owed_seconds = 0.0
        del self._jobs[job.id]
        self._much_longer = None

    def put_back(self, job: QueuedJob) -> None:
        """Add a job to the queue by its remaining work, unless all its rows are in flight."""
        if not job.singles and not job.doubles:
            return
        job.key = (-job.places_left, -job.arrival, job.id)
        insort(self._queue, job.key)

    def take_out(self, job: QueuedJob) -> None:
        """Remove a job from the queue. Call this before the job's rows change."""
        if job.singles or job.doubles:
            del self._queue[bisect_left(self._queue, job.key)]

    @property
    def oldest(self) -> QueuedJob:
        return next(iter(self._jobs.values()))

    @property
    def next(self) -> QueuedJob:
        """The job that goes first. If all rows are in flight, the oldest job."""
        return self._jobs[self._queue[-1][2]] if self._queue else self.oldest

    @property
    def much_longer(self) -> float:
        """The least total work, in places, of a job that counts as much longer than the shortest job.

        Infinite if there are more jobs than places: throughput then matters most, and full ticks maximize it. The total
        work of a job never changes, so this value changes only when a job is added or removed.
        """
        if self._much_longer is None:
            policy = self._policy
            full = len(self._jobs) > policy.max_batch or policy.short_batch == policy.max_batch
            jobs = () if full else self._jobs.values()
            self._much_longer = MUCH_LONGER * min((job.total for job in jobs), default=math.inf)
        return self._much_longer

    @property
    def places_now(self) -> int:
        """Places for one step of all rows that are not in flight; at most max_batch."""
        places = 0
        for job in self._jobs.values():
            places += job.places_now
            if places >= self._policy.max_batch:
                return self._policy.max_batch
        return places

    def fill(self, pick: "_Pick", places: int, much_longer: float = math.inf) -> None:
        """Add rows to a batch, up to `places` places. Jobs of at least `much_longer` total work are held back."""
        end, jobs, policy = pick.free - places, self._jobs, self._policy  # end: number of places to leave free
        if len(jobs) > 1:
            oldest = self.oldest
            if oldest.total < much_longer:
                pick.take(oldest, policy.reserve(places, 1 if oldest.singles else 2, self.ticks))
            elif policy.reserved and self._owed_ticks(policy.tick_s(min(places, oldest.places_now))) >= 1:
                pick.take(oldest, places)
        for *_, job_id in islice(reversed(self._queue), pick.size + 1):
            room = pick.free - end
            if not room:
                break
            job = jobs[job_id]
            if job.total >= much_longer:
                room = min(room, policy.short_room(pick.size, pick.free))
            pick.take(job, room)

    @property
    def holds_back_oldest(self) -> bool:
        """True if the oldest job is held back for much shorter jobs. It then has a share of the time."""
        return len(self._jobs) > 1 and self.oldest.total >= self.much_longer

    def stepped(self, seconds: float, shares: Mapping[str, float] | None) -> None:
        """Record a tick of this duration.

        shares: each job's share of this owner's places, or 1.0 if all rows of the job were in the tick. None if another
        owner went first, because then no job was held back.
        """
        self.ticks += 1
        if shares is not None and self.holds_back_oldest:
            share = shares.get(self.oldest.id, 0.0)
            self._owed_seconds = max(0.0, self._owed_seconds + seconds * (RESERVED_SHARE - share))
        else:
            self._owed_seconds = 0.0

    def turn_ticks(self, batch: Batch) -> int | None:
        """Return how many such ticks the oldest job is owed; None if the job is not held back."""
        if not self.holds_back_oldest:
            return None
        is_its = any(picked.job_id == self.oldest.id for picked in batch.jobs)
        return int(self._owed_ticks(self._policy.tick_s(batch.places))) if is_its else 0

    def _owed_ticks(self, tick_s: float) -> float:
        return self._owed_seconds / (tick_s * (1 - RESERVED_SHARE)) if tick_s else 0.0


class _Pick:
    """A batch under construction.

    It takes the least advanced rows of each list, so two counts per job identify the rows.
    """

    def __init__(self, max_batch: int) -> None:
        self.size = self.free = max_batch
        self._rows: list[int] = []
        self._steps: list[int] = []
        self._guided: list[int] = []
        # (job, number of its singles, number of its doubles), in order of the jobs' first rows.
        self._taken: dict[str, tuple[QueuedJob, int, int]] = {}

    def take(self, job: QueuedJob, places: int) -> None:
        """Add a job's least advanced rows to the batch, up to `places` places."""
        _, single, double = self._taken.get(job.id, (job, 0, 0))
        singles, doubles = job.singles[single : single + places], job.doubles[double : double + places // 2]
        if not singles and not doubles:
            return
        for step, index in sorted(singles + doubles) if singles and doubles else singles or doubles:
            if step not in job.work.guided:
                single += 1
                places -= 1
                self.free -= 1
            elif places >= 2:
                self._guided.append(len(self._rows))
                double += 1
                places -= 2
                self.free -= 2
            else:
                continue
            self._rows.append(job.rows[index])
            self._steps.append(step)
            if not places:
                break
        self._taken[job.id] = (job, single, double)

    def batch(self) -> Batch:
        jobs = [
            JobRows(job.id, (*job.singles[:single], *job.doubles[:double]), single + 2 * double)
            for job, single, double in self._taken.values()
        ]
        return Batch(tuple(self._rows), tuple(self._steps), tuple(self._guided), tuple(jobs))


@dataclass(frozen=True, slots=True)
class Advance:
    """The changes made by a tick."""

    started: tuple[str, ...]  # jobs that took their first step
    finished: tuple[str, ...]
    places: Mapping[str, int]  # places used, keyed by job id


class Scheduler:
    """Chooses the rows of each tick for one model's jobs. Knows the step of each row, but no latents.

    Each choice considers all owners. It considers at most as many jobs of an owner as the tick has places.
    """

    def __init__(
        self, policy: BatchPolicy, arrivals: Iterator[int] | None = None, owner_times: OwnerTimes | None = None
    ) -> None:
        """arrivals: yields arrival numbers for jobs. All schedulers of a server share `arrivals` and `owner_times`."""
        self._policy = policy
        self._arrivals = count() if arrivals is None else arrivals
        self._jobs: dict[str, QueuedJob] = {}
        self._owners: dict[str, OwnerQueue] = {}  # owners with jobs
        self._owner_times = OwnerTimes() if owner_times is None else owner_times
        self._leader: str | None = None  # leader of the tick chosen last
        self._in_flight: list[Batch] = []  # ticks that have begun and not ended
        self._leaders: list[str | None] = []  # leader of each tick in flight
        self._totals: tuple[int, int] | None = None  # cache: least and most total work of a job

    def isolated_scheduler(self) -> "Scheduler":
        """Return a scheduler for jobs of the same model that step in separate ticks."""
        return Scheduler(self._policy, self._arrivals, self._owner_times)

    def add(
        self, job_id: str, rows: Sequence[int], work: Work, steps: Sequence[int] | None = None, owner: str = ""
    ) -> None:
        """Add a job. Its rows may step from the next tick on.

        steps: next step of each row, for a resumed job. At least one row must have steps left.
        """
        steps = (work.start,) * work.rows if steps is None else steps
        assert job_id not in self._jobs
        assert len(rows) == len(steps) == work.rows > 0
        assert min(steps) < work.steps
        places_left = sum(map(work.places_left, steps))
        job = QueuedJob(job_id, owner, next(self._arrivals), work, work.places, tuple(rows), places_left=places_left)
        job.put((step, index) for index, step in enumerate(steps))
        self._jobs[job_id] = job
        if owner not in self._owners:
            self._owners[owner] = OwnerQueue(self._policy)
        self._owners[owner].add(job)
        self._owner_times.join(owner)
        self._totals = None

    def cancel(self, job_id: str) -> None:
        """Remove a job at once. An unknown job is ignored."""
        job = self._jobs.get(job_id)
        if job is not None:
            self._owners[job.owner].take_out(job)
            self._forget(job)

    def next_batch(self) -> Batch | None:
        """Choose the rows of the next tick. Return None if no tick can begin now."""
        begun = len(self._in_flight)
        if not self._jobs or begun >= MOST_IN_FLIGHT or (begun and not self.overlaps):
            return None
        is_full = len(self._owners) == 1 and self.overlaps and self._wants(2 * self._policy.full_batch)
        pick, self._leader = _Pick(self._policy.full_batch if is_full else self._policy.max_batch), None
        if len(self._owners) == 1:  # the usual case
            (queue,) = self._owners.values()
            queue.fill(pick, pick.free, queue.much_longer)
        else:
            self._share_out(pick)
        return pick.batch() if pick.free < pick.size else None

    @property
    def overlaps(self) -> bool:
        """True if a second tick begins while a tick is in flight, so the processor always has work.

        This needs more rows than one tick has places. Unless there are more jobs than places, no job may be much longer
        than another, because a short job would wait for two ticks.
        """
        policy = self._policy
        if policy.times.overlapped is None:
            return False
        if len(self._jobs) > policy.max_batch:
            return True
        if self._totals is None:
            totals = [job.total for job in self._jobs.values()]
            self._totals = min(totals), max(totals)
        least, most = self._totals
        if most >= MUCH_LONGER * least:
            return False
        return self._wants(policy.max_batch + 1)

    def _wants(self, places: int) -> bool:
        """Return True if one step of all rows takes at least `places` places."""
        wanted = 0
        for job in self._jobs.values():
            wanted += job.places_now + sum(picked.places for picked in job.in_flight)
            if wanted >= places:
                return True
        return False

    def begin(self, batch: Batch) -> bool:
        """Begin the batch chosen last. Return True if another tick may begin.

        The rows of the batch are not chosen again until the batch ends.
        """
        for picked in batch.jobs:
            job = self._jobs[picked.job_id]
            queue = self._owners[job.owner]
            queue.take_out(job)
            job.begin(picked)
            queue.put_back(job)
        self._in_flight.append(batch)
        self._leaders.append(self._leader)
        return self.overlaps

    def turn_ticks(self, batch: Batch) -> int | None:
        """Return `OwnerQueue.turn_ticks` of the only owner."""
        (queue,) = self._owners.values()
        return queue.turn_ticks(batch)

    def _share_out(self, pick: "_Pick") -> None:
        """Divide the places of a batch among several owners."""
        policy = self._policy
        # Every owner needs at least one place, so there is no need to consider more owners than places.
        owners = [owner for owner in self._owners_by_service_time() if self._owners[owner].places_now][: pick.size + 1]
        if not owners:
            return
        service_time_s = {owner: self._owner_times.service_time_s(owner) for owner in owners}
        wants = {owner: self._owners[owner].places_now for owner in owners}
        if len(owners) > 1 and policy.is_leader(service_time_s[owners[1]] - service_time_s[owners[0]]):
            self._leader = owners[0]
            queue = self._owners[self._leader]
            queue.fill(pick, pick.free, queue.much_longer)
            pick.free = min(pick.free, policy.places_for_others(pick.size - pick.free))
            del wants[self._leader]
        allotted = allot(pick.free, policy.place_s, wants, service_time_s)
        for owner, places in allotted.items():
            if places:
                self._owners[owner].fill(pick, places)
        for owner in wants:  # use the places that an owner could not use, such as a single place for a guided row
            if not pick.free:
                break
            self._owners[owner].fill(pick, pick.free)

    def _owners_by_service_time(self) -> list[str]:
        owners = self._owners
        return sorted(owners, key=lambda owner: (self._owner_times.service_time_s(owner), owners[owner].oldest.arrival))

    def advance(self, batch: Batch, ticks: int = 1) -> Advance:
        """Record that a batch has stepped. The batch must be in flight, or the batch chosen last.

        Cancelled jobs are left out. ticks: number of times the batch stepped; only forecasts set it.
        """
        assert batch.jobs, "it does not come from next_batch"
        if batch not in self._in_flight:
            self.begin(batch)
        at = self._in_flight.index(batch)
        batch, leader = self._in_flight.pop(at), self._leaders.pop(at)
        started: list[str] = []
        finished: list[str] = []
        places: dict[str, int] = {}  # places in one tick, keyed by owner
        taken: dict[str, int] = {}  # places in all ticks, keyed by job id
        whole: set[str] = set()  # jobs with all unfinished rows in the batch
        for picked in batch.jobs:
            job = self._jobs.get(picked.job_id)
            if job is None:
                continue
            queue = self._owners[job.owner]
            queue.take_out(job)
            if not job.singles and not job.doubles and len(job.in_flight) == 1:
                whole.add(job.id)
            taken[job.id] = job.end(picked, ticks)
            places[job.owner] = places.get(job.owner, 0) + picked.places
            if not job.started:
                job.started = True
                started.append(job.id)
            queue.put_back(job)
            if not job.singles and not job.doubles and not job.in_flight:
                finished.append(job.id)
        seconds = ticks * self._policy.tick_s(sum(places.values()))
        for owner in places:
            shares = None
            if len(self._owners) == 1 or owner == leader:
                shares = {
                    job_id: 1.0 if job_id in whole else count / (ticks * places[owner])
                    for job_id, count in taken.items()
                }
            self._owners[owner].stepped(seconds, shares)
        only_owner = self._owner_times.has_one_owner
        self._owner_times.stepped(self._policy.charge(places, leader, only_owner=only_owner), ticks)
        for job_id in finished:
            self._forget(self._jobs[job_id])
        return Advance(tuple(started), tuple(finished), taken)

    def _forget(self, job: QueuedJob) -> None:
        del self._jobs[job.id]
        self._totals = None
        self._owners[job.owner].forget(job)
        if not self._owners[job.owner]:
            del self._owners[job.owner]
        self._owner_times.leave(job.owner)

    def steps(self, job_id: str) -> tuple[int, ...]:
        """Return the next step of each row of a job."""
        job = self._jobs[job_id]
        steps = [job.work.steps] * job.work.rows
        for step, index in chain(job.singles, job.doubles, *(picked.steps for picked in job.in_flight)):
            steps[index] = step
        return tuple(steps)

    def rows_left(self, job_id: str) -> int:
        job = self._jobs[job_id]
        return len(job.singles) + len(job.doubles) + sum(len(picked.steps) for picked in job.in_flight)

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    @property
    def next_rank(self) -> Rank:
        """Rank of the job that goes next."""
        owner = self.owners[0]
        job = self._owners[owner].next
        return self._owner_times.service_time_s(owner), job.places_left * self._policy.place_s, job.arrival

    @property
    def oldest(self) -> int:
        """Arrival number of the next owner's oldest job."""
        return self._owners[self.owners[0]].oldest.arrival

    @property
    def owners(self) -> list[str]:
        """Owners with jobs in this scheduler, the least served first."""
        return list(self._owners) if len(self._owners) == 1 else self._owners_by_service_time()

    def has_jobs_of(self, owner: str) -> bool:
        return owner in self._owners


@dataclass(frozen=True, slots=True)
class Turn(Generic[Model]):
    """The choice of a model for the next tick."""

    model: Model
    creditor: tuple[str, Model] | None  # (owner, model) of the oldest job, if the tick counts toward the job's share


class ModelScheduler(Generic[Model]):
    """Picks the model of each tick: usually the model of the next job, sometimes the model of the oldest job.

    An owner's oldest job has a share of the time. This class records the time owed to the job's model. Each model has
    a separate scheduler. An isolated job counts as a model here.
    """

    def __init__(self) -> None:
        self._schedulers: dict[Model, Scheduler] = {}
        self._tick_s: dict[Model, float] = {}  # duration of each model's last tick
        self._owed_seconds: dict[tuple[str, Model], float] = {}  # keyed by (owner, model of the owner's oldest job)

    def put(self, model: Model, scheduler: Scheduler, tick_s: float = 0.0) -> None:
        """Add a model. tick_s: assumed seconds of a tick until the first tick is measured."""
        assert model not in self._schedulers
        self._schedulers[model], self._tick_s[model] = scheduler, tick_s

    def remove(self, model: Model) -> None:
        assert not self._schedulers[model].has_work
        del self._schedulers[model]
        self._tick_s.pop(model, None)
        self._forget_settled()

    @property
    def has_work(self) -> bool:
        return any(scheduler.has_work for scheduler in self._schedulers.values())

    def busy(self) -> dict[Model, Scheduler]:
        return {model: scheduler for model, scheduler in self._schedulers.items() if scheduler.has_work}

    def shares(self) -> list[Model]:
        """Return the models that share the time now: the models of the next job and of the oldest job."""
        busy = self.busy()
        if len(busy) < 2:
            return list(busy)
        ranks = {model: scheduler.next_rank for model, scheduler in busy.items()}
        first = min(ranks, key=ranks.__getitem__)
        owners = busy[first].owners
        # Leave out models whose next owner has had more service, or has no job of the first model.
        level = [
            model
            for model, scheduler in busy.items()
            if scheduler.owners[0] in owners and ranks[model][0] <= ranks[first][0] + LEVEL_S
        ]
        oldest = min(level, key=lambda model: busy[model].oldest)
        return [first, oldest] if first != oldest else [first]

    def next(self) -> Turn[Model] | None:
        """Return the turn of the next tick. Without work, return None or the turn of a model without a next batch."""
        if len(self._schedulers) == 1:  # the usual case
            (model,) = self._schedulers
            return Turn(model, None)
        models = self.shares()
        if len(models) < 2:
            return Turn(models[0], None) if models else None
        first, oldest = models
        creditor = self._schedulers[oldest].owners[0], oldest
        owed_seconds = self._owed_seconds.setdefault(creditor, 0.0)
        return Turn(first if owed_seconds <= 0 or owed_seconds < self._tick_s[oldest] else oldest, creditor)

    def stepped(self, turn: Turn[Model], seconds: float) -> None:
        self._tick_s[turn.model] = seconds
        if turn.creditor is not None:
            owed_seconds = self._owed_seconds.get(turn.creditor, 0.0)
            if turn.model == turn.creditor[1]:
                self._owed_seconds[turn.creditor] = max(0.0, owed_seconds - seconds)
            else:
                self._owed_seconds[turn.creditor] = owed_seconds + seconds * RESERVED_SHARE / (1 - RESERVED_SHARE)
        if self._owed_seconds:
            self._forget_settled()

    def _forget_settled(self) -> None:
        """Remove the owed time of owners without jobs of the model."""
        for owner, model in list(self._owed_seconds):
            if model not in self._schedulers or not self._schedulers[model].has_jobs_of(owner):
                del self._owed_seconds[owner, model]
