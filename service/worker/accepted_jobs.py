"""The jobs that were accepted and have not ended, as every thread may see them."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping

from tminus.service.scheduling.admission import Admission
from tminus.service.work import JobStatus
from tminus.service.worker.running_job import RunningJob


class AcceptedJobs:
    """Owns the list. The loop owns the jobs of which an engine holds rows; here are also those that are queued.

    Any thread may call. `gate` is held by whoever adds a job, so that others can add or refuse under it.
    """

    def __init__(self, admission: Admission, clock: Callable[[], float]) -> None:
        self.gate = threading.Lock()
        self._admission, self._clock = admission, clock
        self._jobs: dict[str, RunningJob] = {}
        self._owners: Counter[tuple[str, bool]] = Counter()  # of those: the name of their key, and if they are durable

    def add(self, job: RunningJob) -> None:
        """Note a job. Call it with the gate held."""
        self._jobs[job.id] = job
        self._owners[job.new.owner, job.new.durable] += 1

    def remove(self, job_id: str) -> None:
        """Forget a job. It is not here if its client was answered while the worker hung."""
        with self.gate:
            if (job := self._jobs.pop(job_id, None)) is not None:
                self._owners[job.new.owner, job.new.durable] -= 1

    def remove_all(self) -> list[RunningJob]:
        """Forget all jobs, and return them."""
        with self.gate:
            jobs, self._jobs = self._jobs, {}
            self._owners.clear()
        return list(jobs.values())

    def number_of(self, owner: str, *, durable: bool | None = None) -> int:
        """How many of them came with a key of this name. durable: only those that are, or that are not."""
        with self.gate:
            return sum(self._owners[owner, each] for each in (True, False) if durable in (None, each))

    def __len__(self) -> int:
        with self.gate:
            return len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        with self.gate:
            return job_id in self._jobs

    def statuses(self) -> list[JobStatus]:
        """Every job that is waiting or running, in order of arrival, with its position and when it should be done."""
        outlooks = self._admission.outlooks(self._clock())
        with self.gate:
            jobs, now_s = list(self._jobs.values()), self._clock()
        return [job.status(outlooks[job.id], now_s) for job in jobs if job.id in outlooks]

    def quick_statuses(self, forecast: Mapping[str, JobStatus]) -> list[JobStatus]:
        """Like `statuses`, with position and ETA from an earlier forecast, or from acceptance for newer jobs."""
        with self.gate:
            jobs, now_s = list(self._jobs.values()), self._clock()
        return [job.quick_status(forecast, now_s) for job in jobs]

    def quick_status(self, job_id: str, forecast: Mapping[str, JobStatus]) -> JobStatus | None:
        """One of them; None if it is not here (any more)."""
        with self.gate:
            job = self._jobs.get(job_id)
        return job.quick_status(forecast, self._clock()) if job is not None else None
