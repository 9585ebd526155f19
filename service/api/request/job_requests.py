"""The parameters of durable jobs beside their spec: a UUID that a client chooses, a webhook, a page of the list.

A chosen UUID is the name by which its job is found, as an Idempotency-Key is, and not the job's id. So the same UUID of
two keys is two jobs, and nobody learns from an answer that another has used it.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tminus.service.api.request.fields import Int, RequestSchema
from tminus.service.api.request.schemas import MAX_INDEX
from tminus.service.errors import InvalidField
from tminus.service.jobs.store.records import Place
from tminus.service.jobs.views import STATES
from tminus.service.jobs.webhooks.receivers import Allowed, Receiver, refused
from tminus.service.jobs.webhooks.webhook import EVENTS, Webhook

CHOSEN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
CHOSEN_BOUND = "a UUID, as 6f9619ff-8b86-4011-b42d-00c04fc964ff, in small letters"
MAX_PAGE = 200
EVENTS_BOUND = f"a list of {', '.join(EVENTS)}, each at most once"
MOST_EVENTS = 16  # in a list that is looked at
OFF = "absent: this server sends no webhooks, as it has no --webhook-secret-file"
NOT_DURABLE = "absent without Prefer: respond-async: only a durable job has one"


def check_chosen(chosen: str) -> None:
    """Raise InvalidField for what is no UUID in its usual spelling."""
    if not CHOSEN.fullmatch(chosen):
        raise InvalidField.of("job_id", CHOSEN_BOUND, chosen)


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
        """The states that are asked for; all states if none is."""
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


class WebhookRequest(RequestSchema):
    """Who is told of a job, and of what: Cog's names."""

    webhook: str | None = Field(
        None, description="URL that is sent the job when something happens to it; in the body, not in the query"
    )
    webhook_events_filter: str | list[str] | None = Field(
        None, description=f"which events it is told: {', '.join(EVENTS)}; default: all of them"
    )

    @classmethod
    def take_from(cls, parameters: dict[str, Any], allowed: Allowed | None) -> Webhook | None:
        """Take and check the parameters of a webhook; None where there are none. Raises InvalidField.

        allowed: who may be told beside public receivers; None: nobody may.
        """
        own = {name: value for name, value in cls.own_of(parameters).items() if value is not None}
        if not own:
            return None
        url = own.get("webhook")
        if url is None:
            raise InvalidField.of("webhook", "given where webhook_events_filter is", None)
        if not isinstance(url, str):
            raise refused("a text", "")  # it may have a URL somewhere, and errors are logged
        if allowed is None:
            raise refused(OFF, url)
        asked = cls.from_parameters(
            own, {"webhook": "a text", "webhook_events_filter": EVENTS_BOUND}.__getitem__, MOST_EVENTS
        )
        Receiver.parse(url, allowed)
        return Webhook(url, _events(asked.webhook_events_filter))


def _events(given: str | list[str] | None) -> tuple[Any, ...]:
    if given is None:
        return EVENTS
    names = [given] if isinstance(given, str) else given
    if not names or len({*names}) < len(names) or not {*names} <= {*EVENTS}:
        raise InvalidField.of("webhook_events_filter", EVENTS_BOUND, given)
    return tuple(event for event in EVENTS if event in names)
