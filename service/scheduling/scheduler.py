"""Which rows step next. Pure: no torch, no asyncio, no clock.

Shortest remaining work first, so a short job does not wait behind a long one. A tick that a short job shares with much
longer ones has fewer rows, so that it ends sooner. A share of the places is kept for the oldest job, so that a long one
is never starved. A row that is not picked just waits: preemption costs nothing.

That is so among the jobs of one owner. Where several owners have jobs, the places of a tick are shared out among these
first (owners.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from tminus.service.scheduling.owner_queue import OwnerQueue, QueuedJob
from tminus.service.scheduling.owners import Served, allot
from tminus.service.scheduling.sharing import Sharing
from tminus.service.work import Batch, JobRows, Work

Rank = tuple[float, float, int]  # what its owner has had, in seconds; the seconds of work it has left; its number


class _Pick:
    """A batch being built. A job's rows are the least advanced of each list, so two counts per job identify them."""

    def __init__(self, max_batch: int) -> None:
        self.free = max_batch
        self._rows: list[int] = []
        self._steps: list[int] = []
        self._guided: list[int] = []
        self._taken: dict[
            str, tuple[QueuedJob, int, int]
        ] = {}  # how many singles and doubles; the order is of first rows

    def take(self, job: QueuedJob, budget: int) -> bool:
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

    However many jobs of an owner wait, a tick looks at those in its batch and two more, or at no more than it has
    places. Where there are several owners it looks at each of these.
    """

    def __init__(self, sharing: Sharing, arrivals: Iterator[int] | None = None, served: Served | None = None) -> None:
        """arrivals: numbers the jobs in order of arrival, over all the schedulers that have the same one; so served."""
        self._sharing = sharing
        self._jobs: dict[str, QueuedJob] = {}
        self._owners: dict[str, OwnerQueue] = {}  # those that have jobs
        self._arrivals = count() if arrivals is None else arrivals
        self._served = Served() if served is None else served
        self._leader: str | None = None  # the owner that goes before all others in the tick that was chosen last

    def beside(self) -> "Scheduler":
        """Make one for more jobs of the same model and owners, in the same order of arrival, in ticks of their own."""
        return Scheduler(self._sharing, self._arrivals, self._served)

    def add(
        self, job_id: str, rows: Sequence[int], work: Work, steps: Sequence[int] | None = None, owner: str = ""
    ) -> None:
        """Take on a job of these rows; they may step from the next tick on.

        steps: for a job that goes on where it was, each row's next step; at least one row has steps left.
        """
        steps = (work.start,) * work.rows if steps is None else steps
        assert job_id not in self._jobs
        assert len(rows) == len(steps) == work.rows > 0
        assert min(steps) < work.steps
        places_left = sum(map(work.places_left, steps))
        job = QueuedJob(job_id, owner, next(self._arrivals), work, tuple(rows), places_left=places_left)
        for index, step in enumerate(steps):
            job.put(step, index)
        self._jobs[job_id] = job
        self._owners.setdefault(owner, OwnerQueue(self._sharing)).add(job)
        self._served.join(owner)

    def cancel(self, job_id: str) -> None:
        """Remove a job at once. Nothing happens if it is not here (any more)."""
        job = self._jobs.get(job_id)
        if job is not None:
            self._owners[job.owner].take_out(job)
            self._forget(job)

    def next_batch(self) -> Batch | None:
        """Choose the rows of the next tick, or None when there is nothing to do."""
        if not self._jobs:
            return None
        pick, self._leader = _Pick(self._sharing.max_batch), None
        if len(self._owners) == 1:  # nearly always
            (queue,) = self._owners.values()
            self._take(pick, queue, pick.free, queue.much_longer)
            return pick.batch()
        self._share_out(pick)
        return pick.batch()

    def _share_out(self, pick: "_Pick") -> None:
        """Give each of several owners its places."""
        owners, sharing = self._in_turn(), self._sharing
        had_s = {owner: self._served.had_s(owner) for owner in owners}
        wants = {owner: self._owners[owner].places_now for owner in owners}
        if sharing.leads(had_s[owners[1]] - had_s[owners[0]]):
            self._leader = owners[0]
            queue = self._owners[self._leader]
            self._take(pick, queue, pick.free, queue.much_longer)
            pick.free = min(pick.free, sharing.beside(sharing.max_batch - pick.free))
            del wants[self._leader]
        allotted = allot(pick.free, sharing.place_s, wants, had_s)
        for owner, places in allotted.items():
            if places:
                self._take(pick, self._owners[owner], places, math.inf)
        for owner in wants:  # of two single places a guided row could use neither
            if not pick.free:
                break
            self._take(pick, self._owners[owner], pick.free, math.inf)

    def _in_turn(self) -> list[str]:
        return sorted(self._owners, key=lambda owner: (self._served.had_s(owner), self._owners[owner].oldest.arrival))

    def _take(self, pick: "_Pick", queue: OwnerQueue, places: int, much_longer: float) -> None:
        """Put an owner's rows into the batch, in no more than so many places of it."""
        end = pick.free - places  # how many are to stay free
        pick.take(queue.oldest, self._sharing.reserve(places, 1 if queue.oldest.singles else 2, queue.ticks))

        def room(job: QueuedJob) -> int:
            held_back = job.work.places >= much_longer
            return int(min(pick.free - end, self._sharing.room(pick.free, held_back=held_back)))

        for job in queue.in_turn():
            if pick.free - end < 2:
                break
            pick.take(job, room(job))
        if pick.free - end == 1:  # a list of its own, so as not to search all the guided jobs for a row that fits
            for job in queue.single_in_turn():
                if pick.take(job, min(1, room(job))):
                    break

    def advance(self, batch: Batch) -> Advance:
        """Record that the batch which was chosen last has stepped."""
        assert sum(len(picked.steps) for picked in batch.jobs) == len(batch.rows), "it is not of next_batch"
        started: list[str] = []
        finished: list[str] = []
        places: dict[str, int] = {}
        for picked in batch.jobs:
            job = self._jobs[picked.job_id]
            queue = self._owners[job.owner]
            queue.take_out(job)
            job.step(picked)
            places[job.owner] = places.get(job.owner, 0) + picked.places
            if not job.started:
                job.started = True
                started.append(job.id)
            if job.singles or job.doubles:
                queue.put_back(job)
            else:
                finished.append(job.id)
        for owner in places:
            self._owners[owner].ticks += 1
        self._served.stepped(self._sharing.seconds(places, self._leader, alone=self._served.one_alone))
        for job_id in finished:
            self._forget(self._jobs[job_id])
        return Advance(tuple(started), tuple(finished))

    def _forget(self, job: QueuedJob) -> None:
        """Forget a job that was taken out of its owner's queue."""
        del self._jobs[job.id]
        self._owners[job.owner].forget(job)
        if not self._owners[job.owner]:
            del self._owners[job.owner]
        self._served.leave(job.owner)

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
    def next_rank(self) -> Rank:
        """Of the job that goes next; in order of arrival what is left counts as nothing."""
        owner = self.owners[0]
        job = self._owners[owner].next
        left_s = job.places_left * self._sharing.place_s if self._sharing.policy == "srpt" else 0.0
        return self._served.had_s(owner), left_s, job.arrival

    @property
    def oldest(self) -> int:
        """The number of the oldest job of that owner."""
        return self._owners[self.owners[0]].oldest.arrival

    @property
    def reserves(self) -> bool:
        """Whether places are kept for the oldest job."""
        return self._sharing.reserved > 0

    @property
    def owners(self) -> list[str]:
        """Those that have jobs here, the one that has had least first."""
        return list(self._owners) if len(self._owners) == 1 else self._in_turn()

    def has_jobs_of(self, owner: str) -> bool:
        """Whether an owner has a job here."""
        return owner in self._owners
