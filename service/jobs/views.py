"""Views of jobs for clients: the store's record and the worker's status in one."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from tminus.service.jobs.held_job import HeldJob, HeldState
from tminus.service.jobs.store.records import OUTCOMES, JobRecord
from tminus.service.jobs.webhooks.delivery_store import Delivery
from tminus.service.work import JobStatus
from tminus.service.worker.worker import Worker

STATES = ("waiting", "running", *OUTCOMES)
FORECAST_S = 1.0  # how old a forecast may be


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as clients see it. A job that is not durable has no view after its end."""

    record: JobRecord
    model: int  # the number of its model
    model_name: str
    state: str  # one of STATES
    durable: bool
    step: int | None  # how many steps its rows have taken on average, where that is known
    position: int | None = None  # jobs that go before it, where that is known
    eta_s: float | None = None
    deliveries: tuple[Delivery, ...] = ()  # to its webhook, if it has one and they are known


def kept_view(record: JobRecord, model: int, model_name: str) -> JobView:
    """View a durable job of a model by its record alone."""
    # A job without an outcome that is not live here is another replica's, waits for one, or is being accepted now.
    step = record.spec.num_passes if record.outcome == "done" else None if record.outcome or record.held else 0
    state = record.outcome or ("running" if record.held else "waiting")
    return JobView(record, model, model_name, state, True, step)


def held_view(job: HeldJob, status: JobStatus | None) -> JobView:
    """View a durable job that was held here when the worker was asked for its status."""
    record, model = job.record, (job.model, job.model_name)
    if record.outcome is not None:  # it has ended since
        return kept_view(record, *model)
    if status is not None:
        return JobView(record, *model, status.state, True, status.step, status.position, status.eta_s)
    if job.state in (HeldState.IN_WORKER, HeldState.ENDING):  # it has ended, and that is being kept
        step = None if job.ending is not None and job.ending.outcome != "done" else record.spec.num_passes
        return JobView(record, *model, "running", True, step, 0, 0.0)
    return JobView(record, *model, "waiting", True, 0)


def passing_view(status: JobStatus) -> JobView:
    """View a job that only the worker knows."""
    record, model = (
        JobRecord(status.id, status.spec, status.created_us, owner=status.owner),
        status.model_name,
    )
    stands = (status.state, status.durable, status.step, status.position, status.eta_s)
    return JobView(record, status.model, model, *stands)


class JobStatuses:
    """Owns the last forecast of waiting and running jobs. In the event loop's thread only.

    State and step are read from the worker each time, which is cheap. A forecast among many jobs takes a while, so
    there is one of all jobs a second, in another thread, however many ask.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._forecasting = asyncio.Lock()
        self._forecast: dict[str, JobStatus] = {}
        self._forecast_s = float("-inf")  # when it was made, by the event loop's clock

    async def of(self, job_id: str) -> JobStatus | None:
        """Return the status of one job; None if the worker does not have it (any more)."""
        if self._worker.jobs.quick_status(job_id, self._forecast) is None:  # needs no forecast
            return None
        return self._worker.jobs.quick_status(job_id, await self._recent_forecast())

    async def all(self) -> list[JobStatus]:
        """Return the status of every job, in order of arrival."""
        return self._worker.jobs.quick_statuses(await self._recent_forecast())

    async def _recent_forecast(self) -> Mapping[str, JobStatus]:
        loop = asyncio.get_running_loop()
        async with self._forecasting:
            if loop.time() - self._forecast_s > FORECAST_S:
                statuses = await loop.run_in_executor(None, self._worker.jobs.statuses)
                self._forecast, self._forecast_s = {status.id: status for status in statuses}, loop.time()
        return self._forecast
