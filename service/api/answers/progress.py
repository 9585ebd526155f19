"""One job as its client waits for it, in the event loop: its result, how long it has left, what it took."""

import asyncio

from fastapi import Request

from tminus.service.api.request.reading import while_connected
from tminus.service.errors import DeadlinePassed
from tminus.service.jobs.standings import Standings
from tminus.service.model_info import ModelInfo
from tminus.service.work import JobResult, Ticket
from tminus.service.worker.worker import Worker

LATE_S = 2.0  # after a deadline, for the worker to say that it has passed
RECOUNT_S = 5.0  # until a job's forecast is asked for again


class Countdown:
    """How long one job has left: asked for now and then, and counted down in between."""

    def __init__(self, standings: Standings, job_id: str, eta_s: float | None) -> None:
        """eta_s: the forecast that was made just now, if there was one."""
        self._standings, self._job_id, self._eta_s = standings, job_id, eta_s or 0.0
        self._loop = asyncio.get_running_loop()
        self._asked_s = self._loop.time() if eta_s is not None else float("-inf")

    async def left_s(self) -> float:
        """Seconds until it should be done."""
        if self._loop.time() - self._asked_s > RECOUNT_S:
            status = await self._standings.of(self._job_id)
            if status is not None:  # otherwise it came after all jobs were last asked for, or has just ended
                self._asked_s, self._eta_s = self._loop.time(), status.eta_s
        return max(0.0, self._eta_s - (self._loop.time() - self._asked_s))


def result_of(ticket: Ticket, deadline_s: float | None) -> "asyncio.Future[JobResult]":
    """The result of an accepted job. Its error may go unread: a client that has gone does not wait for it.

    The worker ends a job whose deadline passes; where it hangs in a step, this does, a little later.
    """
    result = asyncio.ensure_future(_result(ticket, deadline_s))
    result.add_done_callback(_retrieve)
    return result


async def finished_or_gone(
    request: Request, worker: Worker, job_id: str, done: "asyncio.Future[JobResult]"
) -> JobResult:
    """Wait for a job; a client that goes away frees its rows at the next tick."""
    try:
        return await while_connected(request, asyncio.shield(done))
    finally:
        if not done.done():
            worker.cancel(job_id, "client_gone")


def server_timing(result: JobResult, encode_s: float, model: ModelInfo) -> str:
    """Make the header Server-Timing: what a job's time was spent on, in milliseconds."""
    seconds = {"queue": result.queue_s, "first_step": result.first_step_s, "denoise": result.denoise_s}
    seconds |= {"decode": result.decode_s} if model.latent is not None else {}
    return ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in (seconds | {"encode": encode_s}).items())


async def _result(ticket: Ticket, deadline_s: float | None) -> JobResult:
    try:
        async with asyncio.timeout(None if deadline_s is None else deadline_s + LATE_S):
            return await asyncio.wrap_future(ticket.future)
    except TimeoutError:
        assert deadline_s is not None
        raise DeadlinePassed.of(deadline_s) from None


def _retrieve(result: "asyncio.Future[JobResult]") -> None:
    # asyncio complains about an error that was never retrieved.
    if not result.cancelled():
        result.exception()
