"""What a store of durable jobs takes and returns, and the options of its calls."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tminus.service.jobs.webhooks.webhook import Webhook
from tminus.service.spec import SampleSpec

Outcome = Literal["done", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("done", "failed", "cancelled")
Place = tuple[int, str]  # (created_us, id), which sorts jobs by creation
MOST_LISTED = 20  # maximum number of job ids in a message
Thread = Literal["store", "reads", "pixels"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Call:
    """How AsyncStore calls a method of a store. Used as a decorator; methods without it get the defaults."""

    thread: Thread = "store"  # in a shared store; a waiting call is dropped if its client leaves, except in "store"
    writes: bool = False  # the call's success or failure shows whether jobs can be stored
    owes: bool = False  # a webhook event may be due after the call
    quick: bool = False  # short timeout, because a request can be answered without the result

    def __call__(self, method: F) -> F:
        vars(method)["call"] = self
        return method

    @classmethod
    def of(cls, method: Callable[..., Any]) -> "Call":
        noted: Call = vars(method).get("call", cls())
        return noted


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A durable job as stored. Times are Unix times in microseconds, because all databases sort integers alike."""

    id: str
    spec: SampleSpec
    created_us: int
    deadline_us: int | None = None
    outcome: Outcome | None = None  # None while unfinished
    finished_us: int | None = None
    fingerprint: str | None = None  # identifies the build that made the images
    problem: Mapping[str, Any] | None = None  # the error, if the job failed
    owner: str = ""  # name of the API key that submitted the job
    crashes: int = 0  # times that the worker or the whole process crashed during this job
    webhook: Webhook | None = None  # where to send the job's events
    # True if a live replica held the job when the record was read. Always False in a file.
    held: bool = field(default=False, compare=False)
    suspect: bool = field(default=False, compare=False)  # set by a claim: the job's earlier replica was lost
    ahead_us: int = field(default=0, compare=False)  # the store's clock minus this machine's clock

    @property
    def place(self) -> Place:
        return self.created_us, self.id

    @property
    def age_s(self) -> float:
        """Seconds since the job was accepted."""
        return max(0, now_us() + self.ahead_us - self.created_us) / 1e6


@dataclass(frozen=True, slots=True)
class Key:
    """The client's Idempotency-Key and a hash of the request. With a key, a request can safely be retried."""

    name: str
    request_hash: str
    owner: str = ""  # different owners may use the same key name
    any_model: bool = False  # True if the job may belong to another model than the request's; the hash has that name

    @property
    def kept_as(self) -> str:
        """The key's name in the store. The separator is a character that clients cannot send."""
        return f"{self.owner}\x1f{self.name}" if self.owner else self.name


def now_us() -> int:
    """Return the Unix time in microseconds."""
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class ReplicaPace:
    """The speed and the load that a replica reports to the other replicas of its store."""

    places_per_s: float
    backlog_s: float  # work of the replica, including jobs that are not durable


@dataclass(frozen=True, slots=True)
class Claimed:
    """Claimed jobs, and the number of further jobs that failed because their records are damaged."""

    jobs: Sequence[JobRecord] = ()
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A reference to a job's images in an object store."""

    key: str
    bytes: int
    sha256: str


class ObjectGone(Exception):
    """Raised if an object was given up before its job's outcome was stored. Write the object again."""


class LeaseLost(Exception):
    """Raised if another replica holds or has ended a job, or the job was deleted. Discard the job's results."""


def listed(job_ids: Sequence[str]) -> str:
    """Join at most MOST_LISTED job ids for a message."""
    return ", ".join(job_ids[:MOST_LISTED]) + (", …" if len(job_ids) > MOST_LISTED else "")
