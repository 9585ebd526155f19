"""Which rows step next. Pure: no torch, no asyncio, no clock.

Shortest remaining work first, so a short job does not wait behind a long one. A tick that a short job shares with much
longer ones has fewer rows, so that it ends sooner. A share of the places is kept for the oldest job, so that a long one
is never starved. A row that is not picked just waits: preemption costs nothing.
"""

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from tminus.service.work import Batch, JobRows, Work

Policy = Literal["srpt", "fcfs"]  # shortest remaining work first with a reserve for the oldest; order of arrival

RESERVED_SHARE = 0.25  # of the places, for the oldest job
MUCH_LONGER = 8  # a job is much longer than another if its total work is so many times as much


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the places of a tick are shared out. The oldest job gets its reserve first, whatever short_batch is."""

    max_batch: int  # places in a tick, at least 2, as a guided row takes two
    short_batch: int  # in a tick with a short job, much longer jobs fill up only to a multiple of this
    reserved: int  # places kept for the oldest job
    policy: Policy
    place_s: float = 1.0  # what a place of a full tick takes, by which jobs of several models are compared

    @classmethod
    def of(
        cls, max_batch: int, policy: Policy = "srpt", short_batch: int | None = None, place_s: float = 1.0
    ) -> "Sharing":
        """Reserve a share for the oldest job, at least two places: with one, a guided job could never use it."""
        assert max_batch >= 2
        assert policy in ("srpt", "fcfs")
        reserved = max(2, int(max_batch * RESERVED_SHARE)) if policy == "srpt" else 0
        return cls(max_batch, min(short_batch or max_batch, max_batch), reserved, policy, place_s)

    def much_longer(self, works: Collection[int]) -> float:
        """The total work, in places, from which a job is much longer than the shortest. works: the total of every job.

        Infinite where there are more jobs than places: then all of them wait for throughput, which full ticks give.
        The total work of a job never changes, so the answer changes only when a job comes or goes.
        """
        if self.policy == "fcfs" or self.short_batch == self.max_batch or len(works) > self.max_batch:
            return math.inf
        return MUCH_LONGER * min(works, default=0)

    def room(self, free: int, *, held_back: bool) -> int:
        """How many of the free places a job may take; a job that is held back fills up to a multiple of short_batch."""
        if not held_back:
            return free
        used = self.max_batch - free
        return min(max(1, math.ceil(used / self.short_batch)) * self.short_batch, self.max_batch) - used


@dataclass(slots=True)
class _Job:
    """A job and the rows of it that have steps left, in two sorted lists: the least advanced row is the first."""

    id: str
    arrival: int
    work: Work
    rows: tuple[int, ...]
    singles: list[tuple[int, int]] = field(default_factory=list)  # (next step, index in rows); it takes one place
    doubles: list[tuple[int, int]] = field(default_factory=list)  # the same; it takes two, being guided
    places_left: int = 0
    started: bool = False

    def put(self, step: int, index: int) -> None:
        """List a row by its next step, unless it has taken its last one."""
        if step < self.work.steps:
            insort(self.singles if self.work.places_per_row(step) == 1 else self.doubles, (step, index))

    def first(self, singles: int, doubles: int) -> tuple[tuple[int, int], ...]:
        """The least advanced rows of each list."""
        return (*self.singles[:singles], *self.doubles[:doubles])

    def step(self, picked: JobRows) -> None:
        """Move its rows in a batch on by a step."""
        doubles = picked.places - len(picked.steps)
        singles = len(picked.steps) - doubles
        assert self.first(singles, doubles) == picked.steps, f"job {self.id} has changed since the batch was chosen"
        del self.singles[:singles], self.doubles[:doubles]
        self.places_left -= picked.places
        for step, index in picked.steps:
            self.put(step + 1, index)


class _Pick:
    """A batch being built. A job's rows are the least advanced of each list, so two counts per job identify them."""

    def __init__(self, max_batch: int) -> None:
        self.free = max_batch
        self._rows: list[int] = []
        self._steps: list[int] = []
        self._guided: list[int] = []
        self._taken: dict[str, tuple[_Job, int, int]] = {}  # how many singles and doubles; the order is of first rows

    def take(self, job: _Job, budget: int) -> bool:
        """Put rows of a job that fit the budget into the batch, the least advanced first; says whether any did."""
        _, single, double = self._taken.get(job.id, (job, 0, 0))
        singles, doubles, before = job.singles, job.doubles, self.free
        while budget > 0:
            fits_single = single < len(singles)
            if budget >= 2 and double < len(doubles) and not (fits_single and singles[single] < doubles[double]):
                step, index = doubles[double]
                self._guided.append(len(self._rows))
                double += 1
                places = 2
            elif fits_single:
                step, index = singles[single]
                single += 1
                places = 1
            else:
                break
            self._rows.append(job.rows[index])
            self._steps.append(step)
            budget -= places
            self.free -= places
        if self.free == before:
            return False
        self._taken[job.id] = (job, single, double)
        return True

    def batch(self) -> Batch:
        """The rows as they were picked, and by job."""
        jobs = [
            JobRows(job.id, job.first(single, double), single + 2 * double)
            for job, single, double in self._taken.values()
        ]
        return Batch(tuple(self._rows), tuple(self._steps), tuple(self._guided), tuple(jobs))


@dataclass(frozen=True, slots=True)
class Advance:
    """What a tick changed: jobs that took their first step in it, and jobs that are done."""

    started: tuple[str, ...]
    finished: tuple[str, ...]


class Scheduler:
    """Owns which rows exist and which step each is at. It never sees a latent.

    However many jobs wait, a tick looks at those in its batch and two more, or at no more than it has places.
    """

    def __init__(self, sharing: Sharing, arrivals: Iterator[int] | None = None) -> None:
        """arrivals: numbers the jobs in order of arrival, over all the schedulers that have the same one."""
        self._sharing = sharing
        # In order of arrival. Not a dict: finding the first entry of one walks over all that were deleted before it.
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._works: dict[str, int] = {}  # job id -> its total work, in places
        self._much_longer: float | None = None  # None: a job came or went since it was found
        # Sorted, the next job last: the jobs that go next change all the time, and changing a list's end is cheap.
        self._queue: list[tuple[int, int, str]] = []
        self._singles: list[tuple[int, int, str]] = []  # the jobs in the queue with a row that fits a single place
        self._arrivals = count() if arrivals is None else arrivals

    def add(self, job_id: str, rows: Sequence[int], work: Work, steps: Sequence[int] | None = None) -> None:
        """Take on a job of these rows; they may step from the next tick on.

        steps: for a job that goes on where it was, each row's next step; at least one row has steps left.
        """
        steps = (work.start,) * work.rows if steps is None else steps
        assert job_id not in self._jobs
        assert len(rows) == len(steps) == work.rows > 0
        assert min(steps) < work.steps
        job = _Job(job_id, next(self._arrivals), work, tuple(rows), places_left=sum(map(work.places_left, steps)))
        for index, step in enumerate(steps):
            job.put(step, index)
        self._jobs[job_id] = job
        self._works[job_id], self._much_longer = work.places, None
        self._enqueue(job)

    def cancel(self, job_id: str) -> None:
        """Remove a job at once. Nothing happens if it is not here (any more)."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._dequeue(job)
            del self._works[job_id]
            self._much_longer = None

    def next_batch(self) -> Batch | None:
        """Choose the rows of the next tick, or None when there is nothing to do."""
        if not self._jobs:
            return None
        pick = _Pick(self._sharing.max_batch)
        pick.take(next(iter(self._jobs.values())), self._sharing.reserved)
        if self._much_longer is None:
            self._much_longer = self._sharing.much_longer(self._works.values())

        def room(job_id: str) -> int:
            return self._sharing.room(pick.free, held_back=self._works[job_id] >= much_longer)

        much_longer = self._much_longer
        for *_, job_id in reversed(self._queue):
            if pick.free < 2:
                break
            pick.take(self._jobs[job_id], room(job_id))
        if pick.free == 1:  # a list of its own, so as not to search all the guided jobs for a row that fits
            for *_, job_id in reversed(self._singles):
                if pick.take(self._jobs[job_id], min(1, room(job_id))):
                    break
        return pick.batch()

    def advance(self, batch: Batch) -> Advance:
        """Record that the batch which was chosen last has stepped."""
        assert sum(len(picked.steps) for picked in batch.jobs) == len(batch.rows), "it is not of next_batch"
        started: list[str] = []
        finished: list[str] = []
        for picked in batch.jobs:
            job = self._jobs[picked.job_id]
            self._dequeue(job)
            job.step(picked)
            if not job.started:
                job.started = True
                started.append(job.id)
            if job.singles or job.doubles:
                self._enqueue(job)
            else:
                del self._jobs[job.id], self._works[job.id]
                self._much_longer = None
                finished.append(job.id)
        return Advance(tuple(started), tuple(finished))

    def steps(self, job_id: str) -> tuple[int, ...]:
        """The step that each row of a job takes next."""
        job = self._jobs[job_id]
        steps = [job.work.steps] * job.work.rows
        for step, index in (*job.singles, *job.doubles):
            steps[index] = step
        return tuple(steps)

    @property
    def has_work(self) -> bool:
        """Whether there is a next batch."""
        return bool(self._jobs)

    @property
    def next_rank(self) -> tuple[float, int]:
        """Of the job that goes next: the seconds of work it has left (0 in order of arrival), and its number."""
        places, arrival, _ = self._queue[-1]
        return -places * self._sharing.place_s, -arrival

    @property
    def oldest(self) -> int:
        """The number of the oldest job."""
        return next(iter(self._jobs.values())).arrival

    @property
    def reserves(self) -> bool:
        """Whether places are kept for the oldest job."""
        return self._sharing.reserved > 0

    def _key(self, job: _Job) -> tuple[int, int, str]:
        return (-job.places_left if self._sharing.policy == "srpt" else 0, -job.arrival, job.id)

    def _enqueue(self, job: _Job) -> None:
        insort(self._queue, self._key(job))
        if job.singles:
            insort(self._singles, self._key(job))

    def _dequeue(self, job: _Job) -> None:
        key = self._key(job)
        del self._queue[bisect_left(self._queue, key)]
        if job.singles:
            del self._singles[bisect_left(self._singles, key)]
