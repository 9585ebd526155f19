"""Which rows step next. Pure: no torch, no asyncio, no clock.

Shortest remaining work first, so a short request does not wait behind a long one; a share of the places is kept for the
oldest job, so a long one is never starved. A row that is not picked just waits: preemption costs nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from service.job import Batch


@dataclass(slots=True)
class _Job:
    arrival: int
    steps: int
    places_per_row: int
    next_step: dict[int, int]  # row id -> the step it takes next; finished rows leave
    started: bool = False
    remaining_work: int = field(init=False)

    def __post_init__(self) -> None:
        self.remaining_work = len(self.next_step) * self.steps * self.places_per_row


@dataclass(frozen=True, slots=True)
class Advance:
    """What a tick brought: jobs that took their first step in it, and jobs that are done."""

    started: tuple[str, ...]
    finished: tuple[str, ...]


class Scheduler:
    """Owns which rows exist and which step each is at. It never sees a latent."""

    def __init__(self, max_batch: int, reserved_share: float = 0.25) -> None:
        """max_batch: places in a tick, at least 2, as a guided row takes two; below 4 the reserve is all there is."""
        assert max_batch >= 2
        assert 0 <= reserved_share <= 1
        self._max_batch = max_batch
        # At least two places, or a guided job could never use the reserve.
        self._reserved = max(2, int(max_batch * reserved_share)) if reserved_share else 0
        self._jobs: dict[str, _Job] = {}  # in order of arrival
        self._job_of: dict[int, str] = {}
        self._arrivals = 0

    def add(self, job_id: str, rows: Sequence[int], steps: int, places_per_row: int) -> None:
        """Take on a job of these rows; they may step from the next tick on."""
        assert job_id not in self._jobs
        assert rows
        self._jobs[job_id] = _Job(self._arrivals, steps, places_per_row, dict.fromkeys(rows, 0))
        self._job_of |= dict.fromkeys(rows, job_id)
        self._arrivals += 1

    def cancel(self, job_id: str) -> int:
        """Forget a job at once; returns the work it had left, 0 if it is not here (any more)."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return 0
        for row in job.next_step:
            del self._job_of[row]
        return job.remaining_work

    def next_batch(self) -> Batch | None:
        """Choose the rows of the next tick, or None when there is nothing to do."""
        if not self._jobs:
            return None
        rows: list[int] = []
        steps: list[int] = []
        guided: list[int] = []
        free = self._max_batch

        def take(job: _Job, budget: int, skip: frozenset[int] = frozenset()) -> int:
            """Put rows of a job into the batch, the least advanced first; returns the places they took."""
            used = 0
            for row, step in sorted(job.next_step.items(), key=lambda item: item[1]):
                if used + job.places_per_row > budget:
                    break
                if row in skip:
                    continue
                if job.places_per_row == 2:
                    guided.append(len(rows))
                rows.append(row)
                steps.append(step)
                used += job.places_per_row
            return used

        oldest = next(iter(self._jobs.values()))
        free -= take(oldest, min(free, self._reserved))
        reserved_rows = frozenset(rows)
        for job in sorted(self._jobs.values(), key=lambda job: (job.remaining_work, job.arrival)):
            if free == 0:
                break
            free -= take(job, free, skip=reserved_rows if job is oldest else frozenset())
        return Batch(tuple(rows), tuple(steps), tuple(guided))

    def advance(self, batch: Batch) -> Advance:
        """Record that a batch has stepped."""
        started: list[str] = []
        finished: list[str] = []
        for row, step in zip(batch.rows, batch.steps, strict=True):
            job_id = self._job_of[row]
            job = self._jobs[job_id]
            assert job.next_step[row] == step
            if not job.started:
                job.started = True
                started.append(job_id)
            job.remaining_work -= job.places_per_row
            job.next_step[row] = step + 1
            if step + 1 == job.steps:
                del job.next_step[row], self._job_of[row]
                if not job.next_step:
                    del self._jobs[job_id]
                    finished.append(job_id)
        return Advance(tuple(started), tuple(finished))

    def rows_by_job(self, batch: Batch) -> dict[str, int]:
        """How many rows each job has in a batch."""
        return dict(Counter(self._job_of[row] for row in batch.rows))

    @property
    def num_rows(self) -> int:
        """Rows that have steps left."""
        return len(self._job_of)
