"""Where durable jobs are kept: what a store must do, and what it is given. No SQL here."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from service.spec import Images, Inputs, SampleSpec, Snapshot

Outcome = Literal["done", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("done", "failed", "cancelled")
Place = tuple[int, str]  # in the order of creation: created_us and id


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A durable job, as it is kept. Times are Unix times in microseconds, so that they compare alike everywhere."""

    id: str
    spec: SampleSpec
    created_us: int
    deadline_us: int | None = None
    outcome: Outcome | None = None  # None: it is still to be done
    finished_us: int | None = None
    fingerprint: str | None = None  # of the build that made its images
    problem: Mapping[str, Any] | None = None  # why it failed
    crashes: int = 0  # how often the worker crashed while it had this job

    @property
    def place(self) -> Place:
        """Where it stands among all jobs."""
        return self.created_us, self.id


@dataclass(frozen=True, slots=True)
class Key:
    """What makes a retry safe: the client's Idempotency-Key, and a hash of what it was sent with."""

    name: str
    request_hash: str


def now_us() -> int:
    """The Unix time in microseconds."""
    return time.time_ns() // 1000


class JobStore(Protocol):
    """Keeps jobs. Each call is one transaction, durable when it returns; one thread at a time calls.

    Every call raises StorageFailed where the store cannot do it, or cannot make sense of what it has kept; it has then
    changed nothing.
    """

    def add(self, job: JobRecord, key: Key | None = None, inputs: Inputs | None = None) -> JobRecord | None:
        """Keep a new job. Where the key is taken nothing is kept; None is returned, and `find` says by whom."""

    def find(self, key: Key) -> tuple[JobRecord, bool] | None:
        """The job that was added with this key, and whether it was with the same request."""

    def get(self, job_id: str) -> JobRecord | None:
        """One job."""

    def unfinished(self) -> list[JobRecord]:
        """The jobs still to be done, in order of arrival. One whose record is damaged is ended as failed."""

    def finished(self, before: Place | None, outcomes: Collection[Outcome], limit: int) -> list[JobRecord]:
        """Jobs that have ended, the newest first, from the first that is older than `before`.

        Those whose record is damaged are left out.
        """

    def save(self, snapshots: Mapping[str, Snapshot], fingerprint: str) -> None:
        """Keep snapshots in place of older ones. One of a job that has ended, or is not here, is let be."""

    def snapshot(self, job_id: str, fingerprint: str) -> Snapshot | None:
        """A job's last snapshot, if it was taken by the same build and can be read."""

    def inputs(self, job_id: str) -> Inputs | None:
        """What an edit that is still to be done was added with."""

    def crashed(self, job_id: str) -> None:
        """Count a crash of the worker on a job."""

    def finish(self, job: JobRecord, images: Images | None = None) -> None:
        """Keep how a job ended, its images with it, in place of its snapshot and inputs."""

    def images(self, job_id: str) -> Images | None:
        """The images of a job that is done."""

    def delete(self, job_id: str) -> bool:
        """Forget a job with all it has; False if it is not here."""

    def sweep(self, before_us: int, max_bytes: int) -> bool:
        """Forget jobs that ended before a time, and the oldest of all that ended until the rest takes max_bytes.

        The newest stays, whatever it takes. What it took is given back to the disk, and what others took that are gone.
        One call does a part of it, so that others get their turn; returns whether to call again.
        """

    def close(self) -> None:
        """Let go of it."""
