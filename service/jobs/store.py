"""What a store of durable jobs must do, and what it is given. No SQL here."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tminus.service.spec import Images, Inputs, SampleSpec, Snapshot

Outcome = Literal["done", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("done", "failed", "cancelled")
Place = tuple[int, str]  # in the order of creation: created_us and id


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
    crashes: int = 0  # of the worker while it worked on this job

    @property
    def place(self) -> Place:
        """Its place in the order of creation."""
        return self.created_us, self.id


@dataclass(frozen=True, slots=True)
class Key:
    """What makes a retry safe: the client's Idempotency-Key, and a hash of the request it came with."""

    name: str
    request_hash: str
    owner: str = ""  # whose it is: each has keys of its own

    @property
    def kept_as(self) -> str:
        """Under which name it is kept. No client can send the character that parts the two."""
        return f"{self.owner}\x1f{self.name}" if self.owner else self.name


def now_us() -> int:
    """The Unix time in microseconds."""
    return time.time_ns() // 1000


class JobStore(Protocol):
    """Keeps jobs. Each call is one transaction, durable when it returns; calls come from one thread at a time.

    A call that cannot be done, or that meets kept data that cannot be read, raises StorageFailed and changes nothing.
    """

    def add(self, job: JobRecord, key: Key | None = None, inputs: Inputs | None = None) -> bool:
        """Keep a new job. False if another has the key, which `find` finds; then nothing is kept."""

    def find(self, key: Key) -> tuple[JobRecord, bool] | None:
        """Find the job that was added with this key, and say whether the request was the same."""

    def get(self, job_id: str) -> JobRecord | None:
        """Look up one job."""

    def unfinished(self) -> list[JobRecord]:
        """List the jobs that have not ended, in order of arrival. One whose record is damaged is ended as failed."""

    def finished(
        self, before: Place | None, outcomes: Collection[Outcome], limit: int, owner: str | None = None
    ) -> list[JobRecord]:
        """List jobs that have ended, the newest first, from the first that is older than `before`.

        owner: only those of this one.

        Those whose record is damaged are left out.
        """

    def save(self, snapshots: Mapping[str, Snapshot], fingerprint: str) -> None:
        """Replace the jobs' snapshots by these. Those of jobs that have ended, or do not exist, are ignored."""

    def snapshot(self, job_id: str, fingerprint: str) -> Snapshot | None:
        """Read a job's last snapshot, if it was taken by the same build and can be read."""

    def inputs(self, job_id: str) -> Inputs | None:
        """Read the inputs of an edit that has not ended."""

    def crashed(self, job_id: str) -> None:
        """Count a crash of the worker on a job."""

    def finish(self, job: JobRecord, images: Images | None = None) -> None:
        """Keep how a job ended, and its images, in place of its snapshot and inputs."""

    def images(self, job_id: str) -> Images | None:
        """Read the images of a job that is done."""

    def delete(self, job_id: str, owner: str | None = None) -> bool:
        """Delete a job with all that belongs to it, whatever can be read of it; False if there is none of the owner."""

    def sweep(self, before_us: int, max_bytes: int) -> bool:
        """Delete jobs that ended before a time, and then the oldest that ended until those left take at most max_bytes.

        The newest stays, whatever its size. The room of deleted jobs is given back to the disk.
        One call does a part of this, so that other calls need not wait long; returns whether to call again.
        """

    def check(self, *, write: bool) -> None:
        """See whether jobs can be kept, if need be by writing something small. Raises StorageFailed."""

    def close(self) -> None:
        """Close the store; no call may follow."""
