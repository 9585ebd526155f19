"""A thread that encodes pictures and decodes latents for jobs of latent models, while ticks run.

The thread runs one task at a time, for the owner with the least service time. It usually picks this owner's job with
the fewest tasks left, so short jobs do not wait for long ones.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from tminus.service.errors import Draining, EngineFailed, ServiceError
from tminus.service.scheduling.owners import OwnerTimes
from tminus.service.threads import Pulse
from tminus.service.worker.running_job import RunningJob

log = logging.getLogger(__name__)

Task = Callable[[], Any]
Result = TypeVar("Result")
OLDEST_EVERY = 4  # every fourth task of an owner belongs to the owner's oldest job, so that job always makes progress
JOIN_S = 10.0  # maximum seconds that `close` waits for the running task


class Turnstile:
    """Lets ticks and autoencoder tasks run at the same time. An isolated job runs alone.

    Callers enter in order of arrival, so ticks and autoencoder tasks cannot starve each other.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._inside: list[bool] = []  # one entry per caller inside; True if the caller is isolated

    @property
    def is_open(self) -> bool:
        """True if a caller that is not isolated could enter without waiting."""
        with self._changed:
            return not self._waiting and not any(self._inside)

    @contextmanager
    def enter(
        self, *, isolated: bool, again: bool = False, before_wait: Callable[[], object] = lambda: None
    ) -> Iterator[None]:
        """Wait until no isolated caller is inside, then enter. An isolated caller waits until nobody is inside.

        again: the caller is already inside and not isolated. It enters at once, because callers in the queue may be
        waiting for it to leave. before_wait: called if the caller must wait.
        """
        me = object()

        def may_go() -> bool:
            return self._waiting[0] is me and not (self._inside if isolated else any(self._inside))

        with self._changed:
            if not again:
                self._waiting.append(me)
                if not may_go():
                    before_wait()
                    self._changed.wait_for(may_go)
                self._waiting.popleft()
            self._inside.append(isolated)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(isolated)
                self._changed.notify_all()


class TaskDone(NamedTuple):
    """A task that finished or failed. If a task fails, its job fails too."""

    kind: str
    seconds: float
    job: RunningJob | None  # None if the task belongs to no job
    results: Sequence[Any] | None  # results of all tasks of the job; None while tasks remain
    error: Exception | None


@dataclass(slots=True, eq=False)
class _Tasks:
    """The tasks of one job, or a single task that resolves a future."""

    name: str
    kind: str
    tasks: deque[Task]
    owner: str = ""
    isolated: bool = False  # True if no tick may run at the same time
    job: RunningJob | None = None
    future: "Future[Any] | None" = None
    results: list[Any] = field(default_factory=list)


class AutoencoderThread:
    """Runs autoencoder tasks in a separate thread. The first task starts the thread.

    Any thread may call `run`. Only the worker's thread may call the other methods.
    """

    def __init__(self, on_task_done: Callable[[TaskDone], None], report: Callable[[Collection[str]], None]) -> None:
        """on_task_done: called after each task.

        report: called before each task of a durable job, with the job's id in a list, and after the task with an empty
        list. Both callbacks run in the autoencoder's thread.
        """
        self._on_task_done, self._report = on_task_done, report
        self.turnstile = Turnstile()  # the thread is inside while it runs a task
        self._changed = threading.Condition()
        self._waiting: dict[str, _Tasks] = {}  # keyed by name, in order of arrival
        self._owner_times = OwnerTimes()
        self._tasks_begun: Counter[str] = Counter()  # number of tasks begun, keyed by owner
        self._closed = False
        self._thread: threading.Thread | None = None
        # Jobs that were put and not dropped yet. Only the worker's thread uses this dict, so it needs no lock.
        self.jobs: dict[str, RunningJob] = {}
        self.pulse = Pulse("the autoencoder")

    def put(self, job: RunningJob, kind: str, tasks: Sequence[Task]) -> None:
        """Queue the tasks of a job. The job's last `TaskDone` has the results of all tasks, or an error."""
        self.jobs[job.id] = job
        if job.span is not None:
            job.span.span.add_event(f"{kind} begins")
        self._put(_Tasks(job.id, kind, deque(tasks), job.new.owner, job.new.isolated, job))

    def run(self, kind: str, task: Callable[[], Result]) -> "Future[Result]":
        """Queue a task that belongs to no job. If the thread is closed, the future fails with Draining."""
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()  # else `set_result` would raise after the client has cancelled the future
        if not self._put(_Tasks(f"{kind} {id(future)}", kind, deque([task]), future=future)):
            future.set_exception(Draining())
        return future

    def _put(self, tasks: _Tasks) -> bool:
        with self._changed:
            if self._closed:
                return False
            self._waiting[tasks.name] = tasks
            self._owner_times.join(tasks.owner)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tminus-coding", daemon=True)
                self._thread.start()
            self._changed.notify()
            return True

    def drop(self, job_id: str) -> None:
        """Forget a job. If one of its tasks is running, the task still runs to its end and is reported."""
        self.jobs.pop(job_id, None)
        with self._changed:
            self._forget(job_id)

    def close(self) -> bool:
        """End the thread after the running task. Futures of queued tasks fail with Draining.

        Returns False if the thread still runs after JOIN_S.
        """
        with self._changed:
            self._closed = True
            left, self._waiting = list(self._waiting.values()), {}
            self._changed.notify()
        for tasks in left:
            if tasks.future is not None:
                tasks.future.set_exception(Draining())
        if self._thread is not None:
            self._thread.join(JOIN_S)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        while (picked := self._next()) is not None:
            tasks, task = picked
            error: Exception | None = None
            durable = tasks.job is not None and tasks.job.new.durable
            with self.turnstile.enter(isolated=tasks.isolated):
                if durable:
                    self._report([tasks.name])
                self.pulse.begin()
                began_s = time.perf_counter()
                try:
                    tasks.results.append(task())
                except Exception as raised:  # an error ends only the job, not the thread
                    error = raised
                self.pulse.rest()
                if durable:
                    self._report([])
            took_s = time.perf_counter() - began_s
            over = error is not None or not tasks.tasks
            with self._changed:
                self._owner_times.stepped({tasks.owner: took_s})
                wanted = self._waiting.get(tasks.name) is tasks
                if over and wanted:
                    self._forget(tasks.name)
            self._on_task_done(TaskDone(tasks.kind, took_s, tasks.job, tasks.results if over else None, error))
            if tasks.future is not None and wanted:
                _answer(tasks.future, tasks.results, error)

    def _next(self) -> tuple[_Tasks, Task] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            owner = min((tasks.owner for tasks in self._waiting.values()), key=self._owner_times.service_time_s)
            of_owner = [tasks for tasks in self._waiting.values() if tasks.owner == owner]
            picked = of_owner[0]  # the oldest job
            if self._tasks_begun[owner] % OLDEST_EVERY:
                picked = min(of_owner, key=lambda tasks: len(tasks.tasks))
            self._tasks_begun[owner] += 1
            return picked, picked.tasks.popleft()

    def _forget(self, name: str) -> None:
        if (tasks := self._waiting.pop(name, None)) is not None:
            self._owner_times.leave(tasks.owner)
            if not self._waiting:
                self._tasks_begun.clear()


def _answer(future: "Future[Any]", results: Sequence[Any], error: Exception | None) -> None:
    if error is None:
        future.set_result(results[0])
    elif isinstance(error, ServiceError):
        future.set_exception(error)
    else:
        log.error("an image could not be encoded or decoded", exc_info=error)
        future.set_exception(EngineFailed(f"the image could not be made: {type(error).__name__}"))
