"""Pictures to latents and latents to pixels for jobs of a latent model: a thread of its own, beside the ticks.

It does one thing at a time, for the owner that has had least; of its jobs mostly for the one that has the fewest left,
so that short jobs do not wait for long ones.
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

    @property
    def is_open(self) -> bool:
        """Whether a caller that need not be alone can enter at once."""
        with self._changed:
            return not self._waiting and not any(self._inside)

    @contextmanager
    def enter(
        self, *, alone: bool, again: bool = False, before_wait: Callable[[], object] = lambda: None
    ) -> Iterator[None]:
        """Wait until nobody is inside, or if not alone nobody who is.

        again: the caller is inside already, and not alone. It does not wait, because others may wait for it to leave.
        before_wait: is called if it has to wait.
        """
        me = object()

        def may_go() -> bool:
            return self._waiting[0] is me and not (self._inside if alone else any(self._inside))

        with self._changed:
            if not again:
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


class Coded(NamedTuple):
    """A task is done, or has failed, which ends its job."""

    kind: str
    seconds: float
    job: RunningJob | None  # None for what is no job's
    results: Sequence[Any] | None  # of all tasks of the job; None while some are left
    error: Exception | None


@dataclass(slots=True, eq=False)
class _Tasks:
    """What is to be done for a job, or for somebody who waits."""

    name: str
    kind: str
    tasks: deque[Task]
    owner: str = ""
    alone: bool = False  # nothing steps while one of the tasks runs
    job: RunningJob | None = None
    future: "Future[Any] | None" = None
    results: list[Any] = field(default_factory=list)


class Coding:
    """Owns a thread, which starts with the first task. Any thread may call."""

    def __init__(self, tell: Callable[[Coded], None], note: Callable[[Collection[str]], None]) -> None:
        """Both are called in the coding thread: tell after each task, note before and after one of a durable job."""
        self._tell, self._note = tell, note
        self.turnstile = Turnstile()  # a task is done inside
        self._changed = threading.Condition()
        self._waiting: dict[str, _Tasks] = {}  # by name, in order of arrival
        self._owner_times = OwnerTimes()
        self._tasks_begun: Counter[str] = Counter()  # by owner
        self._closed = False
        self._thread: threading.Thread | None = None
        self.pulse = Pulse("the autoencoder")

    def put(self, job: RunningJob, kind: str, tasks: Sequence[Task]) -> None:
        """Do a job's tasks. The last thing that is told of it comes with their results, or with what one raised."""
        self._put(_Tasks(job.id, kind, deque(tasks), job.new.owner, job.new.alone, job))

    def run(self, kind: str, task: Callable[[], Result]) -> "Future[Result]":
        """Do something that is no job's."""
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()  # or setting the result raises once whoever waits is gone
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
        """Forget what is to be done for a job. A task of it that runs goes on, and is told of when it ends."""
        with self._changed:
            self._forget(job_id)

    def close(self) -> bool:
        """End the thread after the task that runs; who waits for something is told Draining. False if it hangs."""
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
            with self.turnstile.enter(alone=tasks.alone):
                if durable:
                    self._note([tasks.name])
                self.pulse.begin()
                began_s = time.perf_counter()
                try:
                    tasks.results.append(task())
                except Exception as raised:  # it ends the job, not the thread
                    error = raised
                self.pulse.rest()
                if durable:
                    self._note([])
            took_s = time.perf_counter() - began_s
            over = error is not None or not tasks.tasks
            with self._changed:
                self._owner_times.stepped({tasks.owner: took_s})
                wanted = self._waiting.get(tasks.name) is tasks
                if over and wanted:
                    self._forget(tasks.name)
            self._tell(Coded(tasks.kind, took_s, tasks.job, tasks.results if over else None, error))
            if tasks.future is not None and wanted:
                _answer(tasks.future, tasks.results, error)

    def _next(self) -> tuple[_Tasks, Task] | None:
        """Wait for a task; None once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            owner = min((tasks.owner for tasks in self._waiting.values()), key=self._owner_times.had_s)
            of_owner = [tasks for tasks in self._waiting.values() if tasks.owner == owner]
            picked = of_owner[0]  # the oldest
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
