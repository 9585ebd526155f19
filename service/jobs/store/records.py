"""What a store of durable jobs is given and returns, and how each of its calls is made. Plain values."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tminus.service.jobs.webhooks.webhook import Webhook
from tminus.service.spec import SampleSpec

Outcome = Literal["done", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("done", "failed", "cancelled")
Place = tuple[int, str]  # in the order of creation: created_us and id
MOST_LISTED = 20  # jobs, in a message
Thread = Literal["store", "reads", "pixels"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Call:
    """How AsyncStore makes a call of a store. Decorates the method; one without it is a plain Call()."""

    thread: Thread = "store"  # of a shared store. A call outside "store" is dropped when its client goes away
    writes: bool = False  # its success or failure tells whether jobs can be kept
    owes: bool = False  # a message of a webhook may be due after it
    quick: bool = False  # a request can be answered without it, and does not wait long for it

    def __call__(self, method: F) -> F:
        """Note this at a method."""
        vars(method)["call"] = self
        return method

    @classmethod
    def of(cls, method: Callable[..., Any]) -> "Call":
        """Return what was noted at a method."""
        noted: Call = vars(method).get("call", cls())
        return noted


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A durable job as it is kept. Times are Unix times in microseconds: integers sort the same everywhere."""

    id: str
    spec: SampleSpec
    created_us: int
    deadline_us: int | None = None
    outcome: Outcome | None = None  # None: it has not ended
    finished_us: int | None = None
    fingerprint: str | None = None  # of the build that made the images
    problem: Mapping[str, Any] | None = None  # why it failed
    owner: str = ""  # the name of the key that it came with
    crashes: int = 0  # of the worker, or of the whole process, while it worked on this job
    webhook: Webhook | None = None  # who is told of its events
    held: bool = field(default=False, compare=False)  # by a replica that lives, when it was read; if replicas share it
    suspect: bool = field(default=False, compare=False)  # at the claim: an earlier replica was lost with it
    ahead_us: int = field(default=0, compare=False)  # the clock of its times, over this machine's

    @property
    def place(self) -> Place:
        """The place of this job in the order of creation."""
        return self.created_us, self.id

    @property
    def age_s(self) -> float:
        """Seconds since it was accepted."""
        return max(0, now_us() + self.ahead_us - self.created_us) / 1e6


@dataclass(frozen=True, slots=True)
class Key:
    """What makes a retry safe: the client's Idempotency-Key, and a hash of the request."""

    name: str
    request_hash: str
    owner: str = ""  # whose it is: each has keys of its own

    @property
    def kept_as(self) -> str:
        """Under which name it is kept. No client can send the characters that part its parts."""
        return f"{self.owner}\x1f{self.name}" if self.owner else self.name


def now_us() -> int:
    """The Unix time in microseconds."""
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class ReplicaPace:
    """The pace and load that replicas of one store report to each other."""

    places_per_s: float
    backlog_s: float  # of all that it has to do, durable or not


@dataclass(frozen=True, slots=True)
class Claimed:
    """Jobs that a claim has taken on, and how many it has ended as failed because their records are damaged."""

    jobs: Sequence[JobRecord] = ()
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The images of a job as an object in an object store, and what tells whether it is still that one."""

    key: str
    bytes: int
    sha256: str


class ObjectGone(Exception):
    """An object was given up before the end of its job was kept with it: it has to be written again."""


class LeaseLost(Exception):
    """Another replica works on this job, or has ended it, or it is gone: what was made of it here is nothing."""


def listed(job_ids: Sequence[str]) -> str:
    """Name jobs in a message, though not very many."""
    return ", ".join(job_ids[:MOST_LISTED]) + (", …" if len(job_ids) > MOST_LISTED else "")
