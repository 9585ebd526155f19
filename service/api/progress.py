"""How long a job has left, for those who follow it: forecast now and then, counted down in between."""

import asyncio

from service.jobs.standings import Standings

FORECAST_S = 5.0  # how old the forecast of a job that runs may be


class Countdown:
    """How long one job has left."""

    def __init__(self, standings: Standings, job_id: str, eta_s: float | None = None) -> None:
        """eta_s: what was foreseen just now, where that is known."""
        self._standings, self._job_id, self._eta_s = standings, job_id, eta_s or 0.0
        self._loop = asyncio.get_running_loop()
        self._told_s = self._loop.time() if eta_s is not None else float("-inf")

    async def left_s(self) -> float:
        """Seconds until it should be done."""
        if self._loop.time() - self._told_s > FORECAST_S:
            status = await self._standings.of(self._job_id)
            if status is not None:  # else it has just ended
                self._told_s, self._eta_s = self._loop.time(), status.eta_s
        return max(0.0, self._eta_s - (self._loop.time() - self._told_s))
