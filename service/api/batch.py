"""GET /batch: lists the waiting and running jobs, each with its current timestep.

The id and seed of a job are null if the caller may not see that job.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from tminus.service.access.access import Caller
from tminus.service.api.answers.openapi import failures
from tminus.service.api.answers.operations import described
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.models import Models
from tminus.service.api.request.reading import BARE
from tminus.service.errors import ModelUnloaded
from tminus.service.work import JobStatus, timesteps_of

MOST_JOBS = 64  # maximum number of jobs in a response
FRESH_S = 0.1  # seconds until the jobs are read again; all callers share one read


@dataclass(frozen=True, slots=True)
class _Known:
    """Fixed values of a listed job: its number in GET /batch, its model's T, and the timestep of each pass."""

    number: int
    num_timesteps: int
    timesteps: Sequence[float]


class BatchJob(BaseModel):
    """A job, with the step and timestep that its rows have reached."""

    number: int = Field(description="A number that stays the same for as long as the job runs.")
    id: str | None = Field(description="Null where the caller may not see the job.")
    yours: bool = Field(description="Whether the job came with the caller's key. Without keys always true.")
    model: str
    state: str = Field(json_schema_extra={"enum": ["waiting", "running"]})
    n: int = Field(description="The number of rows, one for each image.")
    position: int = Field(description="How many jobs go before it. 0 where it runs.")
    eta_s: float = Field(description="Seconds until it should be done.")
    step: int = Field(description="How many steps the rows have taken, on average.")
    steps: int
    t: float = Field(description="The timestep of the next step.")
    num_timesteps: int = Field(description="T of the job's model.")
    seed: int | None = Field(description="Null where the caller may not see the job.")


class BatchAnswer(BaseModel):
    """The worker's waiting and running jobs."""

    max_batch: int = Field(description="The places in a forward pass of the default model.")
    rows_active: int = Field(description="The rows in the last forward pass. 0 when idle.")
    jobs: list[BatchJob] = Field(description=f"In order of arrival, at most {MOST_JOBS}.")
    more: int = Field(description="How many more jobs there are.")


class RunningJobs:
    """Holds the jobs that the worker last reported. Use only in the event loop's thread."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._known: dict[str, _Known] = {}
        self._numbers = count(1)
        self._statuses: list[JobStatus] = []  # at most MOST_JOBS jobs
        self._more = 0
        self._looked_s = float("-inf")  # when the jobs were last read, on the event loop's clock

    async def seen_by(self, caller: Caller) -> BatchAnswer:
        """Return the jobs, hiding the ids and seeds that the caller may not see."""
        await self._look()
        services = self._models.default
        return BatchAnswer(
            max_batch=services.limits.max_batch,
            rows_active=services.worker.rows_active,
            jobs=[self._told(status, caller) for status in self._statuses],
            more=self._more,
        )

    async def _look(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._looked_s < FRESH_S:
            return
        statuses = await self._models.default.statuses.all()  # of all models, which share one worker
        self._looked_s = now_s
        known, self._known = self._known, {}
        for status in statuses[:MOST_JOBS]:
            entry = known.get(status.id) or self._first_seen(status)
            if entry is not None:
                self._known[status.id] = entry
        self._statuses = [status for status in statuses[:MOST_JOBS] if status.id in self._known]
        self._more = len(statuses) - len(self._statuses)

    def _first_seen(self, status: JobStatus) -> _Known | None:
        try:
            model = self._models.numbered(status.model).model
            timesteps = timesteps_of(status.spec, model)
        except (ModelUnloaded, ValueError):  # the job's model or sampler table no longer exists
            return None
        return _Known(next(self._numbers), model.num_timesteps, timesteps)

    def _told(self, status: JobStatus, caller: Caller) -> BatchJob:
        known, visible = self._known[status.id], caller.sees in (None, status.owner)
        return BatchJob(
            number=known.number,
            id=status.id if visible else None,
            yours=status.owner == caller.name,
            model=status.model_name,
            state=status.state,
            n=status.spec.n,
            position=0 if status.state == "running" else status.position,
            eta_s=round(max(0.0, status.eta_s), 3),
            step=status.step,
            steps=status.spec.num_passes,
            t=round(known.timesteps[min(status.step, len(known.timesteps) - 1)], 3),
            num_timesteps=known.num_timesteps,
            seed=status.spec.seed if visible else None,
        )


def batch_routes(models: Models) -> APIRouter:
    """Return a router with GET /batch."""
    router, batch = APIRouter(tags=["jobs"]), RunningJobs(models)

    @router.get("/batch", **described("get_batch"), dependencies=BARE, responses=failures(422))
    async def get_batch(request: Request) -> BatchAnswer:
        return await batch.seen_by(caller_of(request))

    return router
