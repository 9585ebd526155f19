"""The parameters by which a durable job names a webhook; beside those of SampleRequest."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tminus.service.api.request.fields import RequestSchema
from tminus.service.errors import InvalidField
from tminus.service.jobs.webhooks.receivers import Allowed, Receiver, refused
from tminus.service.jobs.webhooks.webhook import EVENTS, Webhook

EVENTS_BOUND = f"a list of {', '.join(EVENTS)}, each at most once"
MOST_EVENTS = 16  # in a list that is looked at
OFF = "absent: this server sends no webhooks, as it has no --webhook-secret"
NOT_DURABLE = "absent without Prefer: respond-async: only a durable job has one"


class WebhookRequest(RequestSchema):
    """Who is told of a job, and of what: Cog's names."""

    webhook: str | None = Field(
        None, description="URL that is sent the job when something happens to it; in the body, not in the query"
    )
    webhook_events_filter: str | list[str] | None = Field(
        None, description=f"which events it is told: {', '.join(EVENTS)}; default: all of them"
    )

    @classmethod
    def take_from(cls, parameters: Mapping[str, Any], allowed: Allowed | None) -> tuple[Webhook | None, dict[str, Any]]:
        """Check these parameters, None where there are none, and return the rest. Raises InvalidField.

        allowed: who may be told beside public receivers; None: nobody may.
        """
        given, rest = cls.divide(parameters)
        own = {name: value for name, value in given.items() if value is not None}
        if not own:
            return None, rest
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
        return Webhook(url, _events(asked.webhook_events_filter)), rest


def _events(given: str | list[str] | None) -> tuple[Any, ...]:
    if given is None:
        return EVENTS
    names = [given] if isinstance(given, str) else given
    if not names or len({*names}) < len(names) or not {*names} <= {*EVENTS}:
        raise InvalidField.of("webhook_events_filter", EVENTS_BOUND, given)
    return tuple(event for event in EVENTS if event in names)
