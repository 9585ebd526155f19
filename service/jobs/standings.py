"""Status of waiting and running jobs: current state and step, forecast position and ETA.

State and step are read from the worker each time, which is cheap. A forecast among many jobs takes a while, so there is
one of all jobs a second, in another thread, however many ask.
"""

import asyncio
from collections.abc import Mapping

from tminus.service.work import JobStatus
from tminus.service.worker.worker import Worker

FORECAST_S = 1.0  # how old a forecast may be


class Standings:
    """Owns the last forecast. In the event loop's thread only."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._forecasting = asyncio.Lock()
        self._forecast: dict[str, JobStatus] = {}
        self._forecast_s = float("-inf")  # when it was made, by the event loop's clock

    async def of(self, job_id: str) -> JobStatus | None:
        """Where one job stands; None if the worker does not have it (any more)."""
        if self._worker.jobs.quick_status(job_id, self._forecast) is None:  # needs no forecast
            return None
        return self._worker.jobs.quick_status(job_id, await self._recent_forecast())

    async def all(self) -> list[JobStatus]:
        """Where every job stands, in order of arrival."""
        return self._worker.jobs.quick_statuses(await self._recent_forecast())

    async def _recent_forecast(self) -> Mapping[str, JobStatus]:
        loop = asyncio.get_running_loop()
        async with self._forecasting:
            if loop.time() - self._forecast_s > FORECAST_S:
                statuses = await loop.run_in_executor(None, self._worker.jobs.statuses)
                self._forecast, self._forecast_s = {status.id: status for status in statuses}, loop.time()
        return self._forecast
