"""How long a job that is being watched has left: a forecast now and then, counted down in between."""

import asyncio

from service.worker import Worker

FORECAST_S = 5.0  # how old a forecast may be


class Countdown:
    """One viewer's. In the event loop's thread."""

    def __init__(self, worker: Worker, job_id: str, eta_s: float | None = None) -> None:
        """eta_s: what was foreseen just now, where that is known."""
        self._worker, self._job_id, self._eta_s = worker, job_id, eta_s or 0.0
        self._loop = asyncio.get_running_loop()
        self._told_s = self._loop.time() if eta_s is not None else float("-inf")

    async def left_s(self) -> float:
        """Seconds until the job should be done."""
        if self._loop.time() - self._told_s > FORECAST_S:
            status = await self._loop.run_in_executor(None, self._worker.status, self._job_id)
            self._told_s, self._eta_s = self._loop.time(), status.eta_s if status is not None else 0.0
        return max(0.0, self._eta_s - (self._loop.time() - self._told_s))
