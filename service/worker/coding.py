"""Pictures to latents and latents to pixels for jobs of a latent model: a thread of its own, beside the ticks.

It does one thing at a time, for the owner that has had least; of its jobs mostly for the one that has the fewest left,
so that short jobs do not wait for long ones.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tminus.service.errors import Draining
from tminus.service.scheduling.owners import Served

Task = Callable[[], Any]
Done = Callable[[Sequence[Any], Exception | None], None]
OLDEST_EVERY = 4  # so many tasks, one is of the job that came first, so that it always moves
JOIN_S = 10.0  # for the task that runs to end, when the thread is closed


class Turnstile:
    """Lets the ticks and the coding thread go on beside each other, but a job that is to be alone only by itself.

    Whoever came first goes first, so that neither thread waits for more than one thing that the other does.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._inside: list[bool] = []  # of each who is inside, whether it is to be alone

    @contextmanager
    def enter(self, *, alone: bool, before_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Wait until nobody is inside, or if not alone nobody who is. before_wait: is called if it has to wait."""
        me = object()

        def may_go() -> bool:
            return self._waiting[0] is me and not (self._inside if alone else any(self._inside))

        with self._changed:
            self._waiting.append(me)
            if not may_go():
                before_wait()
                self._changed.wait_for(may_go)
            self._waiting.popleft()
            self._inside.append(alone)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(alone)
                self._changed.notify_all()


@dataclass(slots=True)
class _Job:
    owner: str
    alone: bool
    kind: str
    tasks: deque[Task]
    done: Done
    each: Callable[[], object]
    results: list[Any] = field(default_factory=list)


class Coding:
    """Owns a thread, which starts with the first job. Any thread may call."""

    def __init__(self, observe: Callable[[str, float], None], note: Callable[[Collection[str]], None]) -> None:
        """observe: is told the kind of each task that was done, and how long it took.

        note: is told, in the coding thread, of which job the task is that begins, or of none when it has ended.
        """
        self._observe, self._note = observe, note
        self.turnstile = Turnstile()  # a task is done inside
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}  # in order of arrival
        self._served = Served()
        self._tasks_begun: Counter[str] = Counter()  # by owner
        self._closed = False
        self._thread: threading.Thread | None = None
        self.task_began_s: float | None = None  # while a task runs

    def put(
        self,
        job_id: str,
        kind: str,
        tasks: Sequence[Task],
        done: Done,
        each: Callable[[], object] = lambda: None,
        owner: str = "",
        alone: bool = False,
    ) -> None:
        """Do a job's tasks; `done` is called in the coding thread, with their results, or with what one raised.

        each: is called there after every task but the last. owner: whose job it is. alone: whether nothing steps
        while a task of it runs.
        """
        with self._changed:
            if not self._closed:
                self._jobs[job_id] = _Job(owner, alone, kind, deque(tasks), done, each)
                self._served.join(owner)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="tminus-coding", daemon=True)
                    self._thread.start()
                self._changed.notify()
                return
        done([], Draining())

    def drop(self, job_id: str) -> None:
        """Forget a job; its `done` is not called, unless it is being called now."""
        with self._changed:
            self._forget(job_id)

    def close(self) -> bool:
        """End the thread after the task that runs; the jobs that are left are done with Draining. False if it hangs."""
        with self._changed:
            self._closed = True
            left, self._jobs = list(self._jobs.values()), {}
            self._changed.notify()
        for job in left:
            job.done([], Draining())
        if self._thread is not None:
            self._thread.join(JOIN_S)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        while (picked := self._next()) is not None:
            job_id, job, task = picked
            error: Exception | None = None
            with self.turnstile.enter(alone=job.alone):
                self._note([job_id])
                self.task_began_s = began_s = time.perf_counter()
                try:
                    job.results.append(task())
                except Exception as raised:  # it ends the job, not the thread
                    error = raised
                self.task_began_s = None
                self._note([])
            took_s = time.perf_counter() - began_s
            self._observe(job.kind, took_s)
            with self._changed:
                self._served.stepped({job.owner: took_s})
            if error is None and job.tasks:
                job.each()
                continue
            with self._changed:
                wanted = self._jobs.get(job_id) is job
                if wanted:
                    self._forget(job_id)
            if wanted:
                job.done(job.results, error)

    def _next(self) -> tuple[str, _Job, Task] | None:
        """Wait for a task; None once it is closed."""
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            owner = min(self._jobs.values(), key=lambda job: self._served.had_s(job.owner)).owner
            jobs = {job_id: job for job_id, job in self._jobs.items() if job.owner == owner}
            job_id = next(iter(jobs))  # the oldest
            if self._tasks_begun[owner] % OLDEST_EVERY:
                job_id = min(jobs, key=lambda each: len(jobs[each].tasks))
            self._tasks_begun[owner] += 1
            return job_id, jobs[job_id], jobs[job_id].tasks.popleft()

    def _forget(self, job_id: str) -> None:
        if (job := self._jobs.pop(job_id, None)) is not None:
            self._served.leave(job.owner)
            if not self._jobs:
                self._tasks_begun.clear()
