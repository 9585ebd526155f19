"""The jobs that the worker works on now. If the process crashes, one of them may be the cause."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from tminus.service.worker.coding import Turnstile
from tminus.service.worker.running_job import RunningJob
from tminus.service.worker.ticks import Ticks

WorkerThread = Literal["steps", "codes"]  # the worker's own thread, or the one that encodes and decodes latents
ReportCurrentJobs = Callable[[WorkerThread, Collection[str]], None]


def report_nothing(_thread: WorkerThread, _jobs: Collection[str]) -> None:
    """Report to nobody: no process takes over what this one worked on."""


class CurrentJobs:
    """Owns the jobs that the worker's thread works on, and reports the durable ones.

    While an isolated job is worked on, nothing else steps, is encoded or decoded, so no other job can cause a crash.
    """

    def __init__(self, ticks: Ticks, turnstile: Turnstile, report: ReportCurrentJobs) -> None:
        self._ticks, self._turnstile, self._report = ticks, turnstile, report
        self._jobs: Sequence[RunningJob] = ()  # those of the last tick, or accepted last
        self._reported = frozenset[str]()

    @property
    def ids(self) -> frozenset[str]:
        """Ids of the jobs that may cause a crash: in flight, in the last tick, or accepted since."""
        return frozenset(job.id for job in (*self._ticks.jobs_on_device, *self._jobs))

    def set(self, jobs: Sequence[RunningJob]) -> None:
        """Work on these jobs now, and on those of the ticks in flight."""
        self._jobs = [*jobs, *self._ticks.jobs_in_flight] if self._ticks else jobs
        self._report_steps(frozenset(job.id for job in self._jobs if job.new.durable))

    def working_on(self, jobs: Sequence[RunningJob], *, autoencoder_may_run: bool) -> AbstractContextManager[None]:
        """Work on jobs of one model. Waits for the autoencoder's thread if either has an isolated job.

        autoencoder_may_run: whether the autoencoder's thread may have tasks.
        """
        if autoencoder_may_run or jobs[0].new.isolated:
            return self._with_turnstile(jobs)
        self.set(jobs)
        return nullcontext()

    @contextmanager
    def _with_turnstile(self, jobs: Sequence[RunningJob]) -> Iterator[None]:
        isolated = jobs[0].new.isolated

        def report_none() -> None:
            self._report_steps(frozenset())

        with self._turnstile.enter(isolated=isolated, again=bool(self._ticks), before_wait=report_none):
            self.set(jobs)
            yield
            if isolated:  # but it may still cause a crash of the worker before the next tick
                report_none()

    def _report_steps(self, jobs: frozenset[str]) -> None:
        if jobs != self._reported:
            self._reported = jobs
            self._report("steps", jobs)
