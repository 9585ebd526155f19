"""The arguments and results of a job store's calls, and the options of these calls."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tminus.service.jobs.webhooks.webhook import Webhook
from tminus.service.spec import SampleSpec

Outcome = Literal["done", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("done", "failed", "cancelled")
Place = tuple[int, str]  # created_us and id: sorts jobs in order of creation
MOST_LISTED = 20  # maximum number of job ids in a message
Thread = Literal["store", "reads", "pixels"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Call:
    """How AsyncStore runs a method of the store. Decorates the method; without it, the defaults apply."""

    thread: Thread = "store"  # thread in a shared store; except in "store", the call is dropped if the client leaves
    writes: bool = False  # success or failure of the call shows whether jobs can be stored
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
    """A stored durable job. Times are Unix times in microseconds, because all databases sort integers alike."""

    id: str
    spec: SampleSpec
    created_us: int
    deadline_us: int | None = None
    outcome: Outcome | None = None  # None while the job is unfinished
    finished_us: int | None = None
    fingerprint: str | None = None  # build that made the images
    problem: Mapping[str, Any] | None = None  # details of the error if the job failed
    owner: str = ""  # name of the API key
    crashes: int = 0  # crashes of the worker or of the whole process that count against this job
    webhook: Webhook | None = None  # receiver of the job's events
    # A live replica held the job when this record was read. Set only by a shared store.
    held: bool = field(default=False, compare=False)
    suspect: bool = field(default=False, compare=False)  # set by a claim: a replica was lost while it held this job
    ahead_us: int = field(default=0, compare=False)  # the store's clock minus this machine's, in microseconds

    @property
    def place(self) -> Place:
        return self.created_us, self.id

    @property
    def age_s(self) -> float:
        """Seconds since the job was accepted."""
        return max(0, now_us() + self.ahead_us - self.created_us) / 1e6


@dataclass(frozen=True, slots=True)
class Key:
    """The client's Idempotency-Key and a hash of the request, which make it safe to retry the request."""

    name: str
    request_hash: str
    owner: str = ""  # different owners may use the same name

    @property
    def kept_as(self) -> str:
        """The name under which the store keeps the key. No client can send the separator."""
        return f"{self.owner}\x1f{self.name}" if self.owner else self.name


def now_us() -> int:
    """Return the Unix time in microseconds."""
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class ReplicaPace:
    """The speed and load that a replica reports to the other replicas of a store."""

    places_per_s: float
    backlog_s: float  # seconds of work in this replica, including non-durable jobs


@dataclass(frozen=True, slots=True)
class Claimed:
    """The result of a claim: claimed jobs, and the number of jobs that failed because of a damaged record."""

    jobs: Sequence[JobRecord] = ()
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A reference to a job's images in an object store."""

    key: str
    bytes: int
    sha256: str


class ObjectGone(Exception):
    """Raised when an object was given up before its job's outcome was stored. Write the object again."""


class LeaseLost(Exception):
    """Raised when a job was deleted, or another replica holds or ended it. Discard the job's results."""


def listed(job_ids: Sequence[str]) -> str:
    """Join at most MOST_LISTED job ids for a message."""
    return ", ".join(job_ids[:MOST_LISTED]) + (", …" if len(job_ids) > MOST_LISTED else "")
