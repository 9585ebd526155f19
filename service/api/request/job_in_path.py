"""The job that a path names: by its own id, or by the UUID that its client chose."""

from collections.abc import Awaitable, Callable

from fastapi import Request

from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.models import Models
from tminus.service.api.request.job_ids import CHOSEN


def job_in_path(models: Models) -> Callable[[Request, str], Awaitable[str]]:
    """Make what finds the job's own id, by whichever a path has. It raises JobNotFound for an unknown UUID."""

    async def own_id(request: Request, job_id: str) -> str:
        if not CHOSEN.fullmatch(job_id):
            return job_id
        return await models.default.jobs.id_of_chosen(job_id, caller_of(request).name)

    return own_id
