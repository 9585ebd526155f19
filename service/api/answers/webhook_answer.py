"""What clients are told of a job's webhook, as a part of the job's document."""

from collections.abc import Sequence
from typing import get_args

from pydantic import BaseModel, Field

from tminus.service.jobs.webhooks.webhook import EVENTS, Delivery, DeliveryState, Webhook


class DeliveryAnswer(BaseModel):
    """An event of a job that its webhook is told."""

    id: str = Field(description="the webhook-id of each attempt")
    event: str = Field(json_schema_extra={"enum": list(EVENTS)})
    state: str = Field(json_schema_extra={"enum": list(get_args(DeliveryState))})
    attempts: int = Field(description="how many were begun")
    error: str | None = Field(description="why the last one failed")


class WebhookAnswer(BaseModel):
    """Who is told of a job, and how far that has come."""

    receiver: str = Field(description="scheme, host and port; path and query may be secret")
    events: list[str] = Field(description="those that it is told")
    deliveries: list[DeliveryAnswer] = Field(description="those that have happened")

    @classmethod
    def of(cls, webhook: Webhook, deliveries: Sequence[Delivery]) -> "WebhookAnswer":
        """Say what is known of it now."""
        return cls(
            receiver=webhook.receiver,
            events=list(webhook.events),
            deliveries=[
                DeliveryAnswer(id=each.id, event=each.event, state=each.state, attempts=each.attempts, error=each.error)
                for each in deliveries
            ],
        )
