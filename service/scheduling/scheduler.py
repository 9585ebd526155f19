"""Picks the model and the rows of each tick. Pure: no torch, no asyncio, no clock.

A tick is one batched step of some rows. A row is one image. A place is one slot of a forward pass: a row takes one
place, and a guided row takes two.

The job with the least work left goes first, so a short job does not wait behind a long one. A job that is much longer
than another job is held back: its rows do not fill up the ticks of the shorter job, so those ticks take less time. To
avoid starvation, the oldest job always gets a share. This is a share of the places of each tick or, if the job is held
back, a share of the time. A row that is not picked simply waits: preemption costs nothing. Two ticks are in flight only
while more rows wait than fit into one tick; see `Scheduler.overlaps`.

These rules order the jobs of one owner. If several owners have jobs, the places of a tick are first divided among the
owners (owners.py). A tick runs only one model. The model is picked by the same rules, with seconds instead of places.
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

RESERVED_SHARE = 0.25  # share of the oldest job: of the places or, if the job is held back, of the time
# An owner leads if its service time is far below that of every other owner. "Far" is the smaller of two limits: the
# duration of LEAD_TICKS full ticks, and MOST_LEAD_S seconds.
LEAD_TICKS, MOST_LEAD_S = 2.0, BURST_S / 2
LONGER = 1.25  # rows of other owners may make a leader's tick at most this many times longer
MOST_IN_FLIGHT = 2  # one tick is prepared or evaluated in Python while the device computes the other
MUCH_LONGER = 8  # a job is much longer than another if its total work is at least this many times larger
LEVEL_S = 0.5  # owners whose service times differ by at most this many seconds count as equal

Model = TypeVar("Model")


@dataclass(frozen=True, slots=True)
class TickTimes:
    """Measured durations of ticks by number of places, with linear interpolation.

    Without measured points, every tick is predicted to take 0 s.
    """

    points: tuple[tuple[int, float], ...] = ()  # (places, seconds), in ascending order of places
    # Duration of a full tick that overlaps another tick, divided by the duration of a full tick alone. None if ticks
    # never overlap.
    overlapped: float | None = None

    def __post_init__(self) -> None:
        assert all(a < b for a, b in pairwise([0, *(places for places, _ in self.points)])), self.points
        assert all(0 <= seconds < math.inf for _, seconds in self.points), self.points

    def seconds(self, places: int) -> float:
        """Predict the duration of a tick: constant before the first point, and extrapolated after the last."""
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
            # Noise in the measurements can make the last line fall. Do not extrapolate a falling line.
            return t1 + max(0.0, slope) * (places - b1)
        return t0 + slope * (places - b0)

    def seconds_per_place(self, max_batch: int) -> float:
        return self.seconds(max_batch) / max_batch


UNMEASURED = TickTimes()


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """Divides the places of a tick. The oldest job gets its reserved places first, unless it is held back."""

    max_batch: int  # places of a tick; at least 2, because a guided row takes two
    short_batch: int  # held-back jobs fill a tick only up to the next multiple of this number of places
    reserved: int  # places reserved for the oldest job unless it is held back; 0 also removes its share of the time
    times: TickTimes = UNMEASURED
    place_s: float = 1.0  # duration of a full tick divided by its places; makes jobs of several models comparable

    @classmethod
    def of(cls, max_batch: int, short_batch: int | None = None, times: TickTimes = UNMEASURED) -> "BatchPolicy":
        """Make a policy that reserves at least two places for the oldest job, because a guided row needs two."""
        assert max_batch >= 2
        reserved = max(2, int(max_batch * RESERVED_SHARE))
        place_s = times.seconds_per_place(max_batch) or 1.0
        return cls(max_batch, min(short_batch or max_batch, max_batch), reserved, times, place_s)

    @property
    def full_batch(self) -> int:
        """Places of each tick if two ticks are in flight and enough rows wait to fill both."""
        if self.times.overlapped is None:
            return self.max_batch
        return max(self.max_batch, min(2 * self.max_batch, self.times.points[-1][0]))

    def is_leader(self, ahead_s: float) -> bool:
        """Return True if the owner with the least service time leads. Others may lengthen its ticks only a little.

        ahead_s: the service time of the next owner minus that of this owner.
        """
        return ahead_s > min(LEAD_TICKS * self.max_batch * self.place_s, MOST_LEAD_S)

    def places_for_others(self, places: int) -> int:
        """Return how many places other owners may use in a leader's tick. places: the leader's own places."""
        return _places_for_others(self.times, self.max_batch, places)

    def tick_s(self, places: int) -> float:
        """Predict the duration of a tick. If no ticks were measured, each place takes `place_s`."""
        return self.times.seconds(places) or places * self.place_s

    def charge(self, places: Mapping[str, int], leader: str | None, *, only_owner: bool) -> dict[str, float]:
        """Return the seconds to charge each owner for its places in a tick.

        The leader also pays for the places that other owners could not get. only_owner: no other owner has a job. Such
        an owner pays only for the time beyond half of the machine; this matters once another owner arrives.
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
        """Return the number of places that an owner's oldest job gets before the owner's other jobs.

        places: the owner's places in this tick. needed: the places that one row of the job takes. turn: number of
        the owner's ticks so far. If the job's share is less than one row, the job gets a row only in some ticks.
        """
        if places >= self.max_batch:
            return places * self.reserved // self.max_batch
        kept = places * self.reserved / self.max_batch
        if kept >= needed:
            return int(kept)
        share = kept / needed
        return needed if turn * share % 1 < share and needed <= places else 0

    def short_room(self, size: int, free: int) -> int:
        """Return how many places held-back jobs may still fill, up to the next multiple of short_batch."""
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
    """A job and its unfinished rows. The rows are in two sorted lists, the least advanced row first."""

    id: str
    owner: str
    arrival: int
    work: Work
    total: int  # total work of the job, in places
    rows: tuple[int, ...]
    singles: list[tuple[int, int]] = field(default_factory=list)  # (next step, index in `rows`) of the one-place rows
    doubles: list[tuple[int, int]] = field(default_factory=list)  # the same for guided rows, which take two places
    places_left: int = 0
    started: bool = False
    in_flight: tuple[JobRows, ...] = ()  # the rows that are in a tick now; they are in neither list
    key: tuple[int, int, str] = (0, 0, "")  # sort key in the owner's queue

    def put(self, rows: Iterable[tuple[int, int]], ticks: int = 0) -> None:
        """Advance rows by `ticks` steps, and add the unfinished ones to the lists."""
        guided, steps = self.work.guided, self.work.steps
        for before, index in rows:
            if (step := before + ticks) < steps:
                (self.doubles if step in guided else self.singles).append((step, index))
        self.singles.sort()
        self.doubles.sort()

    def begin(self, picked: JobRows) -> None:
        """Move the rows of a batch from the two lists to `in_flight`."""
        doubles = picked.places - len(picked.steps)
        singles = len(picked.steps) - doubles
        first = (*self.singles[:singles], *self.doubles[:doubles])
        assert first == picked.steps, f"job {self.id} has changed since the batch was chosen"
        del self.singles[:singles], self.doubles[:doubles]
        self.in_flight += (picked,)

    def end(self, picked: JobRows, ticks: int) -> int:
        """Advance the rows of a batch by `ticks` steps, but not beyond the last step. Returns the places used."""
        self.in_flight = tuple(each for each in self.in_flight if each is not picked)
        taken, left = picked.places, self.work.places_left
        if ticks > 1:
            taken = sum(left(step) - left(min(step + ticks, self.work.steps)) for step, _ in picked.steps)
        self.places_left -= taken
        self.put(picked.steps, ticks)
        return taken

    @property
    def places_now(self) -> int:
        """Number of places that one step of all rows takes, except the rows in flight."""
        return len(self.singles) + 2 * len(self.doubles)


class OwnerQueue:
    """One owner's unfinished jobs, in order of their remaining work."""

    def __init__(self, policy: BatchPolicy) -> None:
        self._policy = policy
        # In order of arrival. An OrderedDict finds its first entry at once; a dict would first walk over deleted ones.
        self._jobs: OrderedDict[str, QueuedJob] = OrderedDict()
        self._much_longer: float | None = None  # cached value of `much_longer`; None after a job was added or removed
        # Sort keys of the jobs, except jobs with all rows in flight. The job that goes first is at the end of the list,
        # where adding and removing is cheap.
        self._queue: list[tuple[int, int, str]] = []
        self.ticks = 0  # number of ticks so far in which the owner had places
        self._owed_seconds = 0.0  # time that the oldest job is still owed because it was held back

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, job: QueuedJob) -> None:
        self._jobs[job.id] = job
        self._much_longer = None
        self.put_back(job)

    def forget(self, job: QueuedJob) -> None:
        """Remove a job. The caller must first call `take_out`."""
        if job is self.oldest:
            self._owed_seconds = 0.0
        del self._jobs[job.id]
        self._much_longer = None

    def put_back(self, job: QueuedJob) -> None:
        """Add a job to the queue, unless all its rows are in flight."""
        if not job.singles and not job.doubles:
            return
        job.key = (-job.places_left, -job.arrival, job.id)
        insort(self._queue, job.key)

    def take_out(self, job: QueuedJob) -> None:
        """Remove a job from the queue. This must happen before the job's rows change."""
        if job.singles or job.doubles:
            del self._queue[bisect_left(self._queue, job.key)]

    @property
    def oldest(self) -> QueuedJob:
        return next(iter(self._jobs.values()))

    @property
    def next(self) -> QueuedJob:
        """The job that goes first, or the oldest job if every unfinished row is in flight."""
        return self._jobs[self._queue[-1][2]] if self._queue else self.oldest

    @property
    def much_longer(self) -> float:
        """A job is held back if its total work, in places, is at least this value.

        Infinite if a short batch is as large as a full one, or if there are more jobs than places in a tick. In the
        second case, throughput matters most, and full ticks give the highest throughput. A job's total work never
        changes, so this value changes only when a job is added or removed.
        """
        if self._much_longer is None:
            policy = self._policy
            full = len(self._jobs) > policy.max_batch or policy.short_batch == policy.max_batch
            jobs = () if full else self._jobs.values()
            self._much_longer = MUCH_LONGER * min((job.total for job in jobs), default=math.inf)
        return self._much_longer

    @property
    def places_now(self) -> int:
        """Number of places that one step of all rows takes, except the rows in flight. At most max_batch."""
        places = 0
        for job in self._jobs.values():
            places += job.places_now
            if places >= self._policy.max_batch:
                return self._policy.max_batch
        return places

    def fill(self, pick: "_Pick", places: int, much_longer: float = math.inf) -> None:
        """Add rows of this owner to a batch. places: the maximum number of places.

        much_longer: jobs with at least this much total work are held back.
        """
        end, jobs, policy = pick.free - places, self._jobs, self._policy  # end: how many places must stay free
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
        """True if the oldest job is held back because another job is much shorter."""
        return len(self._jobs) > 1 and self.oldest.total >= self.much_longer

    def stepped(self, seconds: float, shares: Mapping[str, float] | None) -> None:
        """Record that a tick took this many seconds.

        shares: each job's share of this owner's places; 1.0 if the tick contained all unfinished rows of the job. None
        if other owners have jobs and this owner did not lead the tick, because then none of its jobs was held back.
        """
        self.ticks += 1
        if shares is not None and self.holds_back_oldest:
            share = shares.get(self.oldest.id, 0.0)
            self._owed_seconds = max(0.0, self._owed_seconds + seconds * (RESERVED_SHARE - share))
        else:
            self._owed_seconds = 0.0

    def turn_ticks(self, batch: Batch) -> int | None:
        """Return how many more ticks like this one the oldest job is owed: 0 if the tick has no row of that job.

        None if the oldest job is not held back.
        """
        if not self.holds_back_oldest:
            return None
        is_its = any(picked.job_id == self.oldest.id for picked in batch.jobs)
        return int(self._owed_ticks(self._policy.tick_s(batch.places))) if is_its else 0

    def _owed_ticks(self, tick_s: float) -> float:
        return self._owed_seconds / (tick_s * (1 - RESERVED_SHARE)) if tick_s else 0.0


class _Pick:
    """A batch under construction.

    Rows are always taken from the front of a job's two lists, so two counts per job say which rows were taken.
    """

    def __init__(self, max_batch: int) -> None:
        self.size = self.free = max_batch
        self._rows: list[int] = []
        self._steps: list[int] = []
        self._guided: list[int] = []
        # (job, number of one-place rows taken, number of guided rows taken), in the order in which the jobs joined the
        # batch.
        self._taken: dict[str, tuple[QueuedJob, int, int]] = {}

    def take(self, job: QueuedJob, places: int) -> None:
        """Add the least advanced rows of a job to the batch. places: the maximum number of places."""
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
    """The effects of a tick."""

    started: tuple[str, ...]  # jobs that took their first step
    finished: tuple[str, ...]
    places: Mapping[str, int]  # number of places used, keyed by job id


class Scheduler:
    """Chooses the rows of each tick for one model's jobs. Knows the step of each row, but not its latent.

    To choose a batch, the scheduler looks at every owner, but only at as many jobs of each owner as a tick has places.
    """

    def __init__(
        self, policy: BatchPolicy, arrivals: Iterator[int] | None = None, owner_times: OwnerTimes | None = None
    ) -> None:
        """arrivals: numbers the jobs in order of arrival.

        All schedulers of a server must share the same `arrivals` and `owner_times`.
        """
        self._policy = policy
        self._arrivals = count() if arrivals is None else arrivals
        self._jobs: dict[str, QueuedJob] = {}
        self._owners: dict[str, OwnerQueue] = {}  # only owners with jobs
        self._owner_times = OwnerTimes() if owner_times is None else owner_times
        self._leader: str | None = None  # leader of the batch that was chosen last
        self._in_flight: list[Batch] = []  # ticks that have begun and not ended
        self._leaders: list[str | None] = []  # leader of each tick in `_in_flight`
        self._totals: tuple[int, int] | None = None  # cache: smallest and largest total work of any job

    def isolated_scheduler(self) -> "Scheduler":
        """Return a second scheduler for the same model. Its jobs step in ticks of their own."""
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
        """Remove a job at once. Unknown job ids are ignored."""
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
        """True if a second tick may begin while one is in flight, so the device always has work.

        This requires more rows than fit into one tick. It also requires that no job is much longer than another,
        because a short job would have to wait for two ticks. The second condition is dropped if there are more jobs
        than places.
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
        """Return True if one step of every unfinished row would take at least this many places."""
        wanted = 0
        for job in self._jobs.values():
            wanted += job.places_now + sum(picked.places for picked in job.in_flight)
            if wanted >= places:
                return True
        return False

    def begin(self, batch: Batch) -> bool:
        """Begin the batch that was chosen last. Returns True if another tick may begin.

        The rows of the batch cannot be chosen again until the batch ends.
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
        """Call `OwnerQueue.turn_ticks` of the only owner."""
        (queue,) = self._owners.values()
        return queue.turn_ticks(batch)

    def _share_out(self, pick: "_Pick") -> None:
        """Divide the places of a batch among several owners."""
        policy = self._policy
        # Each owner needs at least one place, so a tick cannot hold more owners than places.
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
        for owner in wants:  # give away unused places: a single place is too small for a guided row
            if not pick.free:
                break
            self._owners[owner].fill(pick, pick.free)

    def _owners_by_service_time(self) -> list[str]:
        owners = self._owners
        return sorted(owners, key=lambda owner: (self._owner_times.service_time_s(owner), owners[owner].oldest.arrival))

    def advance(self, batch: Batch, ticks: int = 1) -> Advance:
        """Record that a batch has stepped. The batch must be in flight, or be the last one chosen.

        Jobs that were cancelled since are skipped. ticks: how many times the batch has stepped; only forecasts set
        this.
        """
        assert batch.jobs, "it does not come from next_batch"
        if batch not in self._in_flight:
            self.begin(batch)
        at = self._in_flight.index(batch)
        batch, leader = self._in_flight.pop(at), self._leaders.pop(at)
        started: list[str] = []
        finished: list[str] = []
        places: dict[str, int] = {}  # places used in each tick, keyed by owner
        taken: dict[str, int] = {}  # places used in all ticks, keyed by job id
        whole: set[str] = set()  # ids of jobs with all their unfinished rows in this batch
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
        """Rank of the job that goes first. Lower ranks go first."""
        owner = self.owners[0]
        job = self._owners[owner].next
        return self._owner_times.service_time_s(owner), job.places_left * self._policy.place_s, job.arrival

    @property
    def oldest(self) -> int:
        """Arrival number of the oldest job of the owner that goes first."""
        return self._owners[self.owners[0]].oldest.arrival

    @property
    def owners(self) -> list[str]:
        """Owners with jobs in this scheduler, in ascending order of service time."""
        return list(self._owners) if len(self._owners) == 1 else self._owners_by_service_time()

    def has_jobs_of(self, owner: str) -> bool:
        return owner in self._owners


@dataclass(frozen=True, slots=True)
class Turn(Generic[Model]):
    """The model chosen for the next tick."""

    model: Model
    creditor: tuple[str, Model] | None  # (owner, model) of the oldest job, if this tick changes its owed time


class ModelScheduler(Generic[Model]):
    """Picks the model of each tick: usually that of the next job, sometimes that of the oldest job.

    An owner's oldest job has a share of the time. This class records how much time the model of that job is owed. Each
    model has a scheduler of its own. An isolated job counts as a separate model.
    """

    def __init__(self) -> None:
        self._schedulers: dict[Model, Scheduler] = {}
        self._tick_s: dict[Model, float] = {}  # duration of the last tick of each model
        self._owed_seconds: dict[tuple[str, Model], float] = {}  # keyed by owner and the model of its oldest job

    def put(self, model: Model, scheduler: Scheduler, tick_s: float = 0.0) -> None:
        """Add a model. tick_s: the assumed duration of a tick until one is measured."""
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
        """Return the models that share the time now: the model of the next job, and that of the oldest job."""
        busy = self.busy()
        if len(busy) < 2:
            return list(busy)
        ranks = {model: scheduler.next_rank for model, scheduler in busy.items()}
        first = min(ranks, key=ranks.__getitem__)
        owners = busy[first].owners
        # Skip a model if its next owner has no job of the model `first`, or has had more service.
        level = [
            model
            for model, scheduler in busy.items()
            if scheduler.owners[0] in owners and ranks[model][0] <= ranks[first][0] + LEVEL_S
        ]
        oldest = min(level, key=lambda model: busy[model].oldest)
        return [first, oldest] if first != oldest else [first]

    def next(self) -> Turn[Model] | None:
        """Choose the model of the next tick. Returns None if no model has work.

        If there is only one model, it is chosen even without work. The chosen model may have no next batch.
        """
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
        """Drop owed time for models that are gone or have no job of the owner."""
        for owner, model in list(self._owed_seconds):
            if model not in self._schedulers or not self._schedulers[model].has_jobs_of(owner):
                del self._owed_seconds[owner, model]
