"""The parameters of GET /jobs and GET /jobs/{id}/image, as pydantic models."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tminus.service.api.request.fields import Int, RequestSchema
from tminus.service.api.request.schemas import MAX_INDEX
from tminus.service.jobs.store.records import Place
from tminus.service.jobs.views import STATES

MAX_PAGE = 200


class JobsRequest(RequestSchema):
    """Which jobs are to be listed; in the query."""

    state: str | None = Field(
        None,
        pattern=f"^({'|'.join(STATES)})(,({'|'.join(STATES)}))*$",
        description=f"only jobs in these states, by commas: {', '.join(STATES)}",
    )
    limit: Int = Field(50, ge=1, le=MAX_PAGE, description="how many at most; default 50")
    before: str | None = Field(
        None, pattern="^[0-9]{1,18}-[0-9a-f]{32}$", description="`next` of an earlier answer: only jobs after those"
    )

    @classmethod
    def parse(cls, parameters: Mapping[str, Any]) -> "JobsRequest":
        """Check names, types and bounds. Raises InvalidField or UnknownField for the first thing wrong."""
        bounds = {
            "state": f"one or more of {', '.join(STATES)}, by commas",
            "limit": f"an integer in 1..{MAX_PAGE}",
            "before": "`next` of an earlier answer",
        }
        return cls.from_parameters(parameters, bounds.__getitem__)

    @property
    def states(self) -> tuple[str, ...]:
        """Those asked for; all if none are."""
        return STATES if self.state is None else tuple(self.state.split(","))

    @property
    def place(self) -> Place | None:
        """Where the page begins, None for the newest job."""
        if self.before is None:
            return None
        created_us, _, job_id = self.before.partition("-")
        return int(created_us), job_id


class JobImageRequest(RequestSchema):
    """Which image of a durable job is wanted; in the query."""

    index: Int | None = Field(None, description="index of one image, which alone is answered; default: all of them")

    @classmethod
    def parse(cls, parameters: Mapping[str, Any]) -> "JobImageRequest":
        """Check names and types. Raises InvalidField or UnknownField."""
        return cls.from_parameters(parameters, lambda _name: f"an integer in 0..{MAX_INDEX}")
