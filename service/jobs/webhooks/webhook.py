"""What a job's webhook is, and a delivery of it. Plain values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Event = Literal["start", "output", "completed"]
EVENTS: tuple[Event, ...] = get_args(Event)  # in the order in which they happen

DeliveryState = Literal["pending", "delivered", "given_up"]
Whose = tuple[str, str]  # an owner and a receiver of its jobs
ORIGIN = re.compile(r"([A-Za-z]+://)(?:[^/?#\\]*@)?([^/?#\\@\s]*)")
ORIGIN_CHARACTERS = 100
AT_ONCE_EACH = 4  # attempts of one owner's jobs to one receiver


@dataclass(frozen=True, slots=True)
class Webhook:
    """Who is told of a job's events, and of which. The URL may have secrets in its path and query."""

    url: str
    events: tuple[Event, ...] = EVENTS

    @property
    def receiver(self) -> str:
        """What of the URL may be shown."""
        return origin_of(self.url)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they are kept."""
        return {"url": self.url, "events": list(self.events)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Webhook":
        """Read what was kept. Raises KeyError, TypeError or ValueError for what is none."""
        events = tuple(event for event in EVENTS if event in fields["events"])
        if not isinstance(fields["url"], str) or len(events) != len(fields["events"]):
            raise ValueError("it is no webhook")
        return cls(fields["url"], events)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event of a job that its receiver is to be told, or was."""

    id: str  # the same in each attempt: webhook-id
    job_id: str
    event: Event
    receiver: str  # scheme, host and port
    state: DeliveryState
    attempts: int  # how many were begun; also the fence of the newest
    since_us: int  # when the event happened, by the store's clock
    error: str | None = None  # why the last attempt failed
    owner: str = ""  # of the job, where it was claimed

    @property
    def whose(self) -> Whose:
        """The owner, and whom it tells: what one owner's receiver does is nothing to another's."""
        return self.owner, self.receiver


@dataclass(frozen=True, slots=True)
class Room:
    """Which deliveries may be claimed: how many, and of which owners and receivers none."""

    most: int  # in all
    most_failing: int  # of receivers that failed last
    each: int = AT_ONCE_EACH  # of one owner to one receiver
    busy: frozenset[Whose] = frozenset()  # of which nothing
    failing: frozenset[Whose] = frozenset()  # which failed last, beside those of deliveries that did
    full: frozenset[str] = frozenset()  # owners of which nothing
    full_of_failing: frozenset[str] = frozenset()  # and those of which nothing to receivers that failed last


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL, or of what should be one; no user, path or query, which may be secret."""
    found = ORIGIN.match(url)
    return (found[1] + found[2]).lower()[:ORIGIN_CHARACTERS] if found else "no URL"
