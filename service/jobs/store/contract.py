"""What a store of durable jobs must do, and what it is given. No SQL here."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tminus.service.jobs.webhooks.slots import Room
from tminus.service.jobs.webhooks.webhook import Delivery, Webhook
from tminus.service.scheduling.cluster import ClusterLoad
from tminus.service.scheduling.intake import Intake
from tminus.service.spec import Images, Inputs, SampleSpec, Snapshot

Outcome = Literal["done", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("done", "failed", "cancelled")
Place = tuple[int, str]  # in the order of creation: created_us and id
MOST_LISTED = 20  # jobs, in a message


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
    left_behind: bool = field(default=False, compare=False)  # when it was claimed: its holder had gone without a word
    ahead_us: int = field(default=0, compare=False)  # the clock of its times, over this machine's

    @property
    def place(self) -> Place:
        """Its place in the order of creation."""
        return self.created_us, self.id

    @property
    def age_s(self) -> float:
        """Seconds since it was accepted."""
        return max(0, now_us() + self.ahead_us - self.created_us) / 1e6


@dataclass(frozen=True, slots=True)
class Key:
    """What makes a retry safe: the client's Idempotency-Key, or the UUID it chose, and a hash of the request."""

    name: str
    request_hash: str
    owner: str = ""  # whose it is: each has keys of its own
    is_chosen: bool = False  # the name is a UUID that was chosen

    @property
    def kept_as(self) -> str:
        """Under which name it is kept. No client can send the characters that part its parts."""
        name = f"\x1e{self.name}" if self.is_chosen else self.name
        return f"{self.owner}\x1f{name}" if self.owner else name


def now_us() -> int:
    """The Unix time in microseconds."""
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class Pace:
    """What the replicas that share a store tell each other of themselves."""

    places_per_s: float
    backlog_s: float  # of all that it has to do, durable or not


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


class JobStore(Protocol):
    """Keeps jobs. Each call is one transaction, durable when it returns; calls come from one thread at a time.

    A shared store's `find`, `id_of`, `get`, `holder`, `page`, `open_jobs`, `number_owed`, `deliveries` and `images` may
    come from a second one beside it.

    A call that cannot be done, or that meets kept data that cannot be read, raises StorageFailed and changes nothing.

    A store is one replica's hand on the jobs: it holds those that it has added or claimed until they end, or until
    they are another's because it has not renewed its lease in time. It alone may write their snapshots and their end.
    """

    lease_s: float  # how long a job is held without a renewal
    shared: bool  # whether other replicas may have the same jobs; else what is claimed once is held until the end

    def now_us(self) -> int:
        """The Unix time by the store's clock, in microseconds: one for all replicas."""

    def add(self, job: JobRecord, key: Key | None = None, inputs: Inputs | None = None, *, held: bool = True) -> bool:
        """Keep a new job, and hold it, or leave it to whoever claims it.

        False if another has the key, which `find` finds; then nothing is kept.
        """

    def find(self, key: Key) -> tuple[JobRecord, bool] | None:
        """Find the job that was added with this key, and say whether the request was the same."""

    def id_of(self, key: Key) -> str | None:
        """The id of the job that was added with this key, whatever the request was."""

    def open_jobs(self, owner: str) -> frozenset[str]:
        """The ids of an owner's jobs that have not ended."""

    def get(self, job_id: str) -> JobRecord | None:
        """Look up one job."""

    def claim(
        self, fingerprint: str, intake: Intake, begun_places: float, rows: int, tables: Collection[str] = ()
    ) -> list[JobRecord]:
        """Hold jobs that have not ended and that nobody holds; none of more than so many rows.

        First those that were held before, in order of arrival, until they make up begun_places: their clients wait for
        the next step. Then the new ones that the intake takes, the shortest first; and where it does not take all, the
        oldest if it takes that. One that was begun by another build is left to a replica of that build while one
        lives, and one with a table that is none of `tables`, hashes, to other builds while one lives or may be starting
        again. One whose record is damaged is ended as failed.
        """

    def take_damaged(self) -> int:
        """How many jobs were ended, since this was asked last, because their records are damaged."""

    def holder(self, job_id: str) -> str | None:
        """The address of the replica that holds a job, if it lives and has one."""

    def renew(self, fingerprint: str, pace: Pace, known: Collection[str]) -> frozenset[str]:
        """Hold what is held for one more lease, and return which jobs that are. Others learn the pace by it.

        known: the jobs that are worked on; what is held beside them, since an answer was lost, is left to others.
        """

    def left_behind(self, served: Collection[str]) -> Mapping[str, list[str]]:
        """The ids of unfinished jobs by their weights, for weights that neither this server nor a living one serves.

        served: hashes of weights that this server serves.
        """

    def load(self) -> ClusterLoad:
        """What all replicas have to do."""

    def release(self, job_id: str) -> None:
        """Leave a job to whoever claims it; until then its snapshot can still be kept."""

    def cancel(self, job_id: str) -> bool:
        """End a job as cancelled, whoever holds it; False if it has ended. Its holder learns it when it renews."""

    def page(
        self,
        before: Place | None,
        outcomes: Collection[Outcome | None],
        limit: int,
        owner: str | None = None,
        *,
        held: bool | None = None,
    ) -> list[JobRecord]:
        """List jobs of these outcomes, the newest first, from the first that is older than `before`.

        outcomes: None is of those that have not ended. owner: only those of this one. held: of those that have not
        ended, only those that a replica holds, or that none does.

        Those whose record is damaged are left out.
        """

    def save(self, snapshots: Mapping[str, Snapshot], fingerprint: str) -> None:
        """Replace the jobs' snapshots by these. Those of jobs that have ended, or are not held, are ignored."""

    def snapshot(self, job_id: str, fingerprint: str) -> Snapshot | None:
        """Read a job's last snapshot, if it was taken by the same build and can be read."""

    def inputs(self, job_id: str) -> Inputs | None:
        """Read the inputs of an edit that has not ended."""

    def crashed(self, job_ids: Collection[str]) -> None:
        """Count an end of the server against these jobs, whoever holds them now.

        If there are several, only those without a count get one, as another may be the cause; a single job gets one
        each time.
        """

    def finish(self, job: JobRecord, images: Images | StoredObject | None = None) -> None:
        """Keep how a job ended, and its images, in place of its snapshot and inputs. Raises LeaseLost.

        What its webhook is to be told is owed from the same moment on.

        images: an object was noted before it was written. Raises ObjectGone, and keeps nothing, if it was given up.
        """

    def images(self, job_id: str) -> Images | StoredObject | None:
        """Read the images of a job that is done, or say which object they are."""

    def delete(self, job_id: str, owner: str | None = None) -> bool:
        """Delete a job with all that belongs to it, whatever can be read of it; False if there is none of the owner."""

    def note_object(self, job_id: str, key: str) -> None:
        """Note that an object is about to be written for a job that is held. Raises LeaseLost and ObjectGone.

        From then on it is known: if no job comes to refer to it within an hour, nobody needs it.
        """

    def give_up_object(self, key: str) -> None:
        """Note that no job will refer to an object."""

    def take_unneeded_objects(self) -> list[str]:
        """The keys of some objects that no job refers to, to be deleted now. Others are told the same after a minute.

        From then on no job can come to refer to them.
        """

    def forget_objects(self, keys: Sequence[str]) -> None:
        """Know no more of objects that were deleted."""

    def sweep(self, before_us: int, max_bytes: int, owed_after_us: int = 0) -> bool:
        """Delete jobs that ended before a time, and then the oldest that ended until those left take at most max_bytes.

        The newest stays, whatever its size. One of which deliveries are pending is not too old, but may be too much;
        those of events before owed_after_us are not waited for: nobody tries them, as without a secret to sign them.
        The room of deleted jobs is given back to the disk.
        One call does a part of this, so that other calls need not wait long; returns whether to call again.
        """

    def started(self, job: JobRecord) -> None:
        """Owe it to a job's webhook that the job has begun, if it is held and has not ended, and that is wanted."""

    def claim_deliveries(self, room: Room, held_s: float) -> list[Delivery]:
        """Hold deliveries that are due, for so long, and count an attempt of each; nobody else has them meanwhile.

        Of each owner, and of each of its receivers, in turn. None of jobs that a newer version made.
        """

    def settle(self, delivery: Delivery, again_in_s: float = 0.0, *, counts: bool = True) -> bool:
        """Keep how an attempt of a delivery that is held ended; False if it is another's by now, or its job is gone.

        again_in_s: until the next one, if it is still pending. counts: False where nothing was attempted after all.
        """

    def number_owed(self, owner: str, receiver: str, most: int) -> int:
        """How many deliveries of an owner's jobs to a receiver are pending, counted up to this number."""

    def deliveries(self, job_ids: Collection[str]) -> dict[str, list[Delivery]]:
        """All that was owed of jobs so far, by job."""

    def check(self, *, write: bool) -> None:
        """See whether jobs can be kept, if need be by writing something small. Raises StorageFailed."""

    def close(self) -> None:
        """Hold nothing any more, and close the store; no call may follow."""


def listed(job_ids: Sequence[str]) -> str:
    """Name jobs in a message, though not very many."""
    return ", ".join(job_ids[:MOST_LISTED]) + (", …" if len(job_ids) > MOST_LISTED else "")
