"""Jobs of a latent model while a picture is encoded or images are decoded: they have no rows, and are not done yet.

The worker's thread owns which jobs these are; a thread of its own, coding.py, does the work.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from tminus.service.errors import EngineFailed, ServiceError
from tminus.service.worker.coding import Coding, Task, Turnstile
from tminus.service.worker.errors_to import errors_to
from tminus.service.worker.job_span import begin_coding
from tminus.service.worker.running_job import RunningJob

log = logging.getLogger(__name__)

Result = TypeVar("Result")
GoOn = Callable[[RunningJob, Sequence[Any]], None]


class CodedJobs:
    """Owns the jobs that are with the coding thread. Only the worker's thread may call."""

    def __init__(
        self,
        observe: Callable[[str, float], None],
        post: Callable[[Callable[[], None]], None],
        fail: Callable[[RunningJob, ServiceError], None],
        one_done: Callable[[RunningJob], None],
        blame: Callable[[Sequence[RunningJob]], None],
        note: Callable[[Collection[str]], None],
    ) -> None:
        """post: has something done in the worker's thread, between two ticks. observe: as Coding has it.

        fail: ends a job of which something could not be encoded or decoded. one_done: is told of every image of a job
        but the last. blame: is told of the jobs that may be the cause if the worker ends now. note: as Coding has it.
        """
        self._jobs: dict[str, RunningJob] = {}
        self._coding, self._post, self._fail, self._one_done = Coding(observe, note), post, fail, one_done
        self._blame = blame

    def __bool__(self) -> bool:
        return bool(self._jobs)

    @property
    def turnstile(self) -> Turnstile:
        """Where ticks go through too."""
        return self._coding.turnstile

    @property
    def ids(self) -> Collection[str]:
        """The ids of the jobs."""
        return self._jobs.keys()

    def durable(self) -> list[RunningJob]:
        """Those that are durable: the next start goes on with them."""
        return [job for job in self._jobs.values() if job.new.durable]

    def get(self, job_id: str) -> RunningJob | None:
        """A job; None if it is not here (any more)."""
        return self._jobs.get(job_id)

    def put(self, job: RunningJob, kind: str, tasks: Sequence[Task], go_on: GoOn) -> None:
        """Do a job's tasks; `go_on` is called with the results in the worker's thread, when the job has left.

        It is not called for a job that is dropped meanwhile, or that fails.
        """

        def take(results: Sequence[Any], error: Exception | None) -> None:
            if self._jobs.get(job.id) is not job:
                return
            del self._jobs[job.id]
            if error is None:
                go_on(job, results)
            elif isinstance(error, ServiceError):
                self._fail(job, error)
            else:
                self._blame([job])
                detail, told = "its images could not be encoded or decoded", "an image of job %s could not be coded"
                with errors_to(partial(self._fail, job), job.model.engine, detail, told, job.id):
                    raise error

        def each() -> None:
            self._post(partial(self._one_done, job))

        self._jobs[job.id] = job
        begin_coding(job, kind)

        def done(results: Sequence[Any], error: Exception | None) -> None:
            self._post(partial(take, results, error))

        self._coding.put(job.id, kind, tasks, done, each, job.new.owner, job.new.alone)

    def run(self, kind: str, task: Callable[[], Result]) -> "Future[Result]":
        """Do something that is no job's; any thread may ask."""
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()  # or setting the result raises once whoever waits is gone

        def done(results: Sequence[Any], error: Exception | None) -> None:
            if error is None:
                future.set_result(results[0])
            elif isinstance(error, ServiceError):
                future.set_exception(error)
            else:
                log.error("an image could not be encoded or decoded", exc_info=error)
                future.set_exception(EngineFailed(f"the image could not be made: {type(error).__name__}"))

        self._coding.put(f"{kind} {id(future)}", kind, [task], done)
        return future

    @property
    def task_began_s(self) -> float | None:
        """When the task that runs began, by `time.perf_counter`; None where none does."""
        return self._coding.task_began_s

    def drop(self, job_id: str) -> RunningJob | None:
        """Forget a job, and return it; None if it is not here (any more)."""
        self._coding.drop(job_id)
        return self._jobs.pop(job_id, None)

    def close(self) -> bool:
        """Forget all jobs, and end the thread after the task that runs; False if it hangs."""
        self._jobs.clear()
        return self._coding.close()
