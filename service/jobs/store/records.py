"""The arguments and results of a store of durable jobs, and the thread of each of its calls. Plain values."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tminus.service.jobs.webhooks.webhook import Webhook
from tminus.service.spec import SampleSpec

Outcome = Literal["done", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("done", "failed", "cancelled")
Place = tuple[int, str]  # created_us and id, which define the order of creation
MOST_LISTED = 20  # the most jobs in a message
Thread = Literal["store", "reads", "pixels"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Call:
    """How AsyncStore makes a call of a store. Decorates the method; a method without it has Call()."""

    thread: Thread = "store"  # for a shared store; a call outside "store" is dropped when its client leaves
    writes: bool = False  # whether its success or failure shows if jobs can be stored
    owes: bool = False  # whether a webhook's message may be due after it
    quick: bool = False  # whether a request can be answered without it and does not wait long for it

    def __call__(self, method: F) -> F:
        """Attach this to a method."""
        vars(method)["call"] = self
        return method

    @classmethod
    def of(cls, method: Callable[..., Any]) -> "Call":
        """Return the Call attached to a method."""
        noted: Call = vars(method).get("call", cls())
        return noted


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A stored durable job. Times are Unix times in microseconds: integers sort the same everywhere."""

    id: str
    spec: SampleSpec
    created_us: int
    deadline_us: int | None = None
    outcome: Outcome | None = None  # None while it is unfinished
    finished_us: int | None = None
    fingerprint: str | None = None  # fingerprint of the build that made the images
    problem: Mapping[str, Any] | None = None  # why it failed
    owner: str = ""  # the name of its API key
    crashes: int = 0  # crashes of the worker, or of the whole process, during this job
    webhook: Webhook | None = None  # the receiver of its events
    # Whether a live replica held it when it was read; only in a shared store.
    held: bool = field(default=False, compare=False)
    suspect: bool = field(default=False, compare=False)  # set by a claim: an earlier replica was lost during this job
    ahead_us: int = field(default=0, compare=False)  # the store's clock minus this machine's

    @property
    def place(self) -> Place:
        """The job's place in the order of creation."""
        return self.created_us, self.id

    @property
    def age_s(self) -> float:
        """Seconds since it was accepted."""
        return max(0, now_us() + self.ahead_us - self.created_us) / 1e6


@dataclass(frozen=True, slots=True)
class Key:
    """Makes a retry safe: the client's Idempotency-Key, and a hash of the request."""

    name: str
    request_hash: str
    owner: str = ""  # each owner has its own keys

    @property
    def kept_as(self) -> str:
        """The key's name in the store. Its separators are characters that no client can send."""
        return f"{self.owner}\x1f{self.name}" if self.owner else self.name


def now_us() -> int:
    """The Unix time in microseconds."""
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class ReplicaPace:
    """The pace and load that replicas of one store report to each other."""

    places_per_s: float
    backlog_s: float  # its whole work, durable or not


@dataclass(frozen=True, slots=True)
class Claimed:
    """Claimed jobs, and the number of jobs that the claim ended as failed because of damaged records."""

    jobs: Sequence[JobRecord] = ()
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A job's images in an object store, with the facts that identify the object."""

    key: str
    bytes: int
    sha256: str


class ObjectGone(Exception):
    """An object was given up before its job's outcome was stored: it must be written again."""


class LeaseLost(Exception):
    """Another replica runs this job, or has ended it, or it was deleted: results made here are worthless."""


def listed(job_ids: Sequence[str]) -> str:
    """List jobs in a message, up to a bound."""
    return ", ".join(job_ids[:MOST_LISTED]) + (", …" if len(job_ids) > MOST_LISTED else "")
