"""The job that a path names: by its own id, or by the UUID that its client chose."""

from typing import Annotated

from fastapi import Depends, Request

from tminus.service.api.authentication import caller_of
from tminus.service.api.job_ids import CHOSEN, own_id


def id_in_path(request: Request, job_id: str) -> str:
    """The job's own id, by whichever a path has."""
    return own_id(job_id, caller_of(request).name) if CHOSEN.fullmatch(job_id) else job_id


JobId = Annotated[str, Depends(id_in_path)]
