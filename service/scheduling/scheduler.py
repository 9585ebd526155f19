"""Which rows step next. Pure: no torch, no asyncio, no clock.

Shortest remaining work first, so a short request does not wait behind a long one; a tick that it shares with much
longer ones is a short tick; and a share of the places is kept for the oldest job, so a long one is never starved. A row
that is not picked just waits: preemption costs nothing.
"""

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from service.work import Batch, Work

Policy = Literal["srpt", "fcfs"]  # shortest remaining work first with a reserve for the oldest; order of arrival

MUCH_LONGER = 8  # times the whole work of another


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the places of a tick are given out: the oldest job's reserve first, whatever short_batch is."""

    max_batch: int  # places in a tick, at least 2, as a guided row takes two
    short_batch: int  # what much longer jobs may fill a tick up to that they share with a shorter one, or a multiple
    reserved: int  # those of the oldest job, whatever else is there
    policy: Policy

    @classmethod
    def of(
        cls, max_batch: int, reserved_share: float = 0.25, policy: Policy = "srpt", short_batch: int | None = None
    ) -> "Sharing":
        """The oldest job gets a share, at least two places, or if guided it could never use them."""
        assert max_batch >= 2
        assert 0 <= reserved_share <= 1
        assert policy in ("srpt", "fcfs")
        reserved = max(2, int(max_batch * reserved_share)) if reserved_share and policy == "srpt" else 0
        return cls(max_batch, min(short_batch or max_batch, max_batch), reserved, policy)

    def much_longer(self, works: Collection[int]) -> float:
        """From how much work on, of its own whole work, a job must leave a tick short, among jobs of these works.

        No job must where there are more of them than places: throughput is what all wait for then. Whole works do not
        change, so the answer does only when a job comes or goes.
        """
        if self.policy == "fcfs" or self.short_batch == self.max_batch or len(works) > self.max_batch:
            return math.inf
        return MUCH_LONGER * min(works, default=0)

    def room(self, free: int, *, held_back: bool) -> int:
        """How many of the free places a job may take; one that is held back fills up to a multiple of short_batch."""
        if not held_back:
            return free
        used = self.max_batch - free
        return min(max(1, math.ceil(used / self.short_batch)) * self.short_batch, self.max_batch) - used


@dataclass(slots=True)
class _Job:
    """A job's rows by how many places their next step takes, each list sorted: the least advanced first."""

    id: str
    arrival: int
    work: Work
    rows: tuple[int, ...]
    singles: list[tuple[int, int]] = field(default_factory=list)  # (next step, index in rows)
    doubles: list[tuple[int, int]] = field(default_factory=list)
    places_left: int = 0
    started: bool = False

    def put(self, step: int, index: int) -> None:
        """Let a row wait for a step, unless it has taken its last one."""
        if step < self.work.steps:
            insort(self.singles if self.work.places_per_row(step) == 1 else self.doubles, (step, index))

    def take_out(self, step: int, index: int) -> int:
        """Take a row that waits for a step out; returns the places the step costs."""
        places = self.work.places_per_row(step)
        lane = self.singles if places == 1 else self.doubles
        at = bisect_left(lane, (step, index))
        assert at < len(lane)
        assert lane[at] == (step, index), f"row {self.rows[index]} does not wait for step {step}"
        del lane[at]
        return places

    @property
    def rows_left(self) -> list[int]:
        """The rows that have steps left."""
        return [self.rows[index] for lane in (self.singles, self.doubles) for _, index in lane]


class _Pick:
    """A batch in the making. From each job it takes the first so many of each list, so two counts say which."""

    def __init__(self, max_batch: int) -> None:
        self.free = max_batch
        self._rows: list[int] = []
        self._steps: list[int] = []
        self._guided: list[int] = []
        self._taken: dict[str, tuple[int, int]] = {}

    def take(self, job: _Job, budget: int) -> bool:
        """Put rows of a job that fit the budget into the batch, the least advanced first; says whether it had any."""
        single, double = before = self._taken.get(job.id, (0, 0))
        while budget > 0:
            heads = job.singles[single : single + 1]
            if budget >= 2:
                heads += job.doubles[double : double + 1]
            if not heads:
                break
            step, index = min(heads)
            if job.work.places_per_row(step) == 2:
                self._guided.append(len(self._rows))
                double += 1
                places = 2
            else:
                single += 1
                places = 1
            self._rows.append(job.rows[index])
            self._steps.append(step)
            budget -= places
            self.free -= places
        self._taken[job.id] = (single, double)
        return (single, double) != before

    def batch(self) -> Batch:
        return Batch(tuple(self._rows), tuple(self._steps), tuple(self._guided))


@dataclass(frozen=True, slots=True)
class Advance:
    """What a tick brought: jobs that took their first step in it, and jobs that are done."""

    started: tuple[str, ...]
    finished: tuple[str, ...]


class Scheduler:
    """Owns which rows exist and which step each is at. It never sees a latent.

    However many wait, a tick looks at the jobs in its batch and two more, or at no more than it has places.
    """

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing
        # In order of arrival. Not a dict: to find the first entry of one walks over all that were deleted before it.
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._at: dict[int, tuple[_Job, int]] = {}  # row id -> its job and its index there
        self._works: dict[str, int] = {}  # job id -> its whole work, in places
        self._much_longer: float | None = None  # None: to be found anew, as a job came or went
        # Sorted, the next job last: those at the front of the queue change all the time, and at the end that is cheap.
        self._queue: list[tuple[int, int, str]] = []
        self._singles: list[tuple[int, int, str]] = []  # those of the queue with a row that fits a single place
        self._arrivals = 0

    def add(self, job_id: str, rows: Sequence[int], work: Work, steps: Sequence[int] | None = None) -> None:
        """Take on a job of these rows; they may step from the next tick on.

        steps: the next one of each row, of a job that goes on where it was; one of them at least has some left.
        """
        steps = (work.start,) * work.rows if steps is None else steps
        assert job_id not in self._jobs
        assert len(rows) == len(steps) == work.rows > 0
        assert min(steps) < work.steps
        job = _Job(job_id, self._arrivals, work, tuple(rows), places_left=sum(map(work.places_left, steps)))
        self._arrivals += 1
        for index, (row, step) in enumerate(zip(job.rows, steps, strict=True)):
            assert row not in self._at
            job.put(step, index)
            if step < work.steps:
                self._at[row] = (job, index)
        self._jobs[job_id] = job
        self._works[job_id], self._much_longer = work.places, None
        self._enqueue(job)

    def cancel(self, job_id: str) -> int:
        """Forget a job at once; returns the places it had left, 0 if it is not here (any more)."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return 0
        self._dequeue(job)
        del self._works[job_id]
        self._much_longer = None
        for row in job.rows_left:
            del self._at[row]
        return job.places_left

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
        if pick.free == 1:  # no walk over all the guided jobs in search of a row that fits
            for *_, job_id in reversed(self._singles):
                if pick.take(self._jobs[job_id], min(1, room(job_id))):
                    break
        return pick.batch()

    def advance(self, batch: Batch) -> Advance:
        """Record that a batch has stepped."""
        started: list[str] = []
        finished: list[str] = []
        by_job: dict[str, list[tuple[int, int]]] = {}
        for row, step in zip(batch.rows, batch.steps, strict=True):
            job, index = self._at[row]
            by_job.setdefault(job.id, []).append((step, index))
        for job_id, rows in by_job.items():
            job = self._jobs[job_id]
            self._dequeue(job)
            for step, index in rows:
                job.places_left -= job.take_out(step, index)
                job.put(step + 1, index)
                if step + 1 == job.work.steps:
                    del self._at[job.rows[index]]
            if not job.started:
                job.started = True
                started.append(job_id)
            if job.singles or job.doubles:
                self._enqueue(job)
            else:
                del self._jobs[job_id], self._works[job_id]
                self._much_longer = None
                finished.append(job_id)
        return Advance(tuple(started), tuple(finished))

    def steps(self, job_id: str) -> tuple[int, ...]:
        """The step that each row of a job takes next."""
        job = self._jobs[job_id]
        steps = [job.work.steps] * job.work.rows
        for step, index in (*job.singles, *job.doubles):
            steps[index] = step
        return tuple(steps)

    def rows_by_job(self, batch: Batch) -> dict[str, int]:
        """How many rows each job has in a batch that has not been advanced yet."""
        counts: dict[str, int] = {}
        for row in batch.rows:
            job_id = self._at[row][0].id
            counts[job_id] = counts.get(job_id, 0) + 1
        return counts

    def places_by_job(self, batch: Batch) -> dict[str, int]:
        """How many places each job has in a batch that has not been advanced yet."""
        counts = self.rows_by_job(batch)
        for position in batch.guided:
            counts[self._at[batch.rows[position]][0].id] += 1
        return counts

    @property
    def num_rows(self) -> int:
        """Rows that have steps left."""
        return len(self._at)

    @property
    def has_work(self) -> bool:
        """Whether there is a next batch."""
        return bool(self._jobs)

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
