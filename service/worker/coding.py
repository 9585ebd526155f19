"""Pictures to latents and latents to pixels for jobs of a latent model: a thread of its own, beside the ticks.

It does one thing at a time, for the job that has the fewest left, so that a short job never waits for a long one.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)

Task = Callable[[], Any]
Done = Callable[[Sequence[Any], Exception | None], None]


@dataclass(slots=True)
class _Job:
    arrival: int
    kind: str
    tasks: deque[Task]
    done: Done
    results: list[Any] = field(default_factory=list)


class Coding:
    """Owns a thread, which starts with the first job. Any thread may call."""

    def __init__(self, observe: Callable[[str, float], None]) -> None:
        """observe: is told the kind of each task that was done, and how long it took."""
        self._observe = observe
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}
        self._arrivals = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, job_id: str, kind: str, tasks: Sequence[Task], done: Done) -> None:
        """Do a job's tasks; `done` is called in the coding thread, with their results, or with what one raised."""
        with self._changed:
            self._jobs[job_id] = _Job(self._arrivals, kind, deque(tasks), done)
            self._arrivals += 1
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="tminus-coding", daemon=True)
                self._thread.start()
            self._changed.notify()

    def drop(self, job_id: str) -> None:
        """Forget a job; its `done` is not called, unless it is being called now."""
        with self._changed:
            self._jobs.pop(job_id, None)

    @property
    def waiting(self) -> int:
        """How many tasks are to be done."""
        with self._changed:
            return sum(len(job.tasks) for job in self._jobs.values())

    def close(self) -> None:
        """Do no more than the task that runs."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify()

    def _run(self) -> None:
        while (picked := self._next()) is not None:
            job_id, job, task = picked
            began_s = time.perf_counter()
            error: Exception | None = None
            try:
                job.results.append(task())
            except Exception as raised:  # it ends the job, not the thread
                error = raised
            self._observe(job.kind, time.perf_counter() - began_s)
            if error is None and job.tasks:
                continue
            with self._changed:
                wanted = self._jobs.get(job_id) is job
                if wanted:
                    del self._jobs[job_id]
            if wanted:
                job.done(job.results, error)

    def _next(self) -> tuple[str, _Job, Task] | None:
        """Wait for a task; None once it is closed."""
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            job_id = min(self._jobs, key=lambda each: (len(self._jobs[each].tasks), self._jobs[each].arrival))
            return job_id, self._jobs[job_id], self._jobs[job_id].tasks.popleft()
