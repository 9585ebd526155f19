"""The jobs of one owner that have rows left to step, and which goes next. Pure: no torch, no asyncio, no clock."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tminus.service.scheduling.sharing import Sharing
from tminus.service.work import JobRows, Work


@dataclass(slots=True)
class QueuedJob:
    """A job and the rows of it that have steps left, in two sorted lists: the least advanced row is the first."""

    id: str
    owner: str
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

    @property
    def places_now(self) -> int:
        """What a step of all its rows takes."""
        return len(self.singles) + 2 * len(self.doubles)


class OwnerQueue:
    """Owns the jobs of one owner."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing
        # In order of arrival. Not a dict: finding the first entry of one walks over all that were deleted before it.
        self._jobs: OrderedDict[str, QueuedJob] = OrderedDict()
        self._works: dict[str, int] = {}  # job id -> its total work, in places
        self._much_longer: float | None = None  # None: a job came or went since it was found
        # Sorted, the next job last: the jobs that go next change all the time, and changing a list's end is cheap.
        self._queue: list[tuple[int, int, str]] = []
        self._singles: list[tuple[int, int, str]] = []  # the jobs in the queue with a row that fits a single place
        self.places_now = 0  # what a step of all rows takes
        self.ticks = 0  # in which it had places

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, job: QueuedJob) -> None:
        """Take on a job, with rows that have steps left."""
        self._jobs[job.id] = job
        self._works[job.id], self._much_longer = job.work.places, None
        self.put_back(job)

    def forget(self, job: QueuedJob) -> None:
        """Forget a job that was taken out."""
        del self._jobs[job.id], self._works[job.id]
        self._much_longer = None

    def put_back(self, job: QueuedJob) -> None:
        """Put a job into the queue, by what it has left."""
        key = self._key(job)
        insort(self._queue, key)
        if job.singles:
            insort(self._singles, key)
        self.places_now += job.places_now

    def take_out(self, job: QueuedJob) -> None:
        """Take a job out of the queue, before its rows step."""
        key = self._key(job)
        del self._queue[bisect_left(self._queue, key)]
        if job.singles:
            del self._singles[bisect_left(self._singles, key)]
        self.places_now -= job.places_now

    @property
    def oldest(self) -> QueuedJob:
        """The job that came first."""
        return next(iter(self._jobs.values()))

    @property
    def next(self) -> QueuedJob:
        """The job that goes first."""
        return self._jobs[self._queue[-1][2]]

    @property
    def much_longer(self) -> float:
        """The total work, in places, from which a job is much longer than the shortest."""
        if self._much_longer is None:
            self._much_longer = self._sharing.much_longer(self._works.values())
        return self._much_longer

    def in_turn(self) -> Iterator[QueuedJob]:
        """All jobs, the one that goes first before the others."""
        return (self._jobs[job_id] for *_, job_id in reversed(self._queue))

    def single_in_turn(self) -> Iterator[QueuedJob]:
        """The same, of those that have a row for a single place."""
        return (self._jobs[job_id] for *_, job_id in reversed(self._singles))

    def _key(self, job: QueuedJob) -> tuple[int, int, str]:
        return (-job.places_left if self._sharing.policy == "srpt" else 0, -job.arrival, job.id)
