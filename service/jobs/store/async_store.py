"""The job store for asyncio: each call runs in a thread of the store's, so that the event loop waits for no disk.

A shared store runs READS in a second thread, so that they never delay the renewal of leases. A third thread unpacks
pixels, and reads them too if the store is shared. A file is locked for one connection, so the thread of that connection
reads the packed pixels. That takes milliseconds.
"""

import asyncio
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import arrays
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import Claimed, JobRecord, Key, ReplicaPace, StoredObject
from tminus.service.scheduling.cluster import Intake
from tminus.service.spec import Inputs, Pixels, Snapshot
from tminus.service.threads import started_pool
from tminus.service.tracing import traced

CALL_S = 30.0  # a call that takes longer is not waited for
QUICK_S = 1.0  # the same, of one without which a request can be answered
P = ParamSpec("P")
R = TypeVar("R")
Calls = frozenset[Callable[..., Any]]
# What clients read.
READS: Calls = frozenset(
    {
        *(JobStore.find, JobStore.open_jobs, JobStore.get, JobStore.holder, JobStore.page),
        *(JobStore.number_owed, JobStore.deliveries, JobStore.images),
    }
)
# Whether the last of these could be done is known as `failure`.
WRITES: Calls = frozenset(
    {
        *(JobStore.check, JobStore.add, JobStore.renew, JobStore.release, JobStore.cancel, JobStore.crashed),
        *(JobStore.finish, JobStore.started, JobStore.settle, JobStore.delete),
        *(JobStore.note_object, JobStore.give_up_object),
    }
)
QUICK: Calls = frozenset({JobStore.open_jobs})
OWES: Calls = frozenset({JobStore.cancel, JobStore.started})  # after which a webhook may be to be told something


class AsyncStore:
    """Owns the store and its threads: `call` makes any call of JobStore, and those that need more have a method."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._pool = started_pool(1, "tminus-store")
        self._reads = started_pool(1, "tminus-store-reads") if store.shared else self._pool
        self._pixels = started_pool(1, "tminus-store-pixels")
        self.shared, self.lease_s = store.shared, store.lease_s
        self.turn = asyncio.Lock()  # of who claims, or renews: what was claimed is known before the next renewal
        self.holders: list[Callable[[], Collection[str]]] = []  # each says which jobs it works on
        self.owes = asyncio.Event()  # set where a webhook may be to be told something
        self._adding: set[str] = set()
        self.now_us = store.now_us  # needs no disk
        self._failure: StorageFailed | None = None

    @property
    def failure(self) -> StorageFailed | None:
        """Why the last attempt to write failed; None after one that did not."""
        return self._failure

    async def call(self, method: Callable[Concatenate[JobStore, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of the store, and wait for it, though not for a disk that does not answer.

        Raises StorageFailed, and what the method does.
        """
        assert method == getattr(JobStore, method.__name__), "by a subclass's own it would be in none of the sets above"
        try:
            result = await self._answer(method, *args, **kwargs)
        except StorageFailed as error:
            if method in WRITES:
                self._failure = error
            raise
        if method in WRITES:
            self._failure = None
        if method in OWES:
            self.owes.set()
        return result

    async def _answer(self, method: Callable[Concatenate[JobStore, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        is_read, limit_s = method in READS, QUICK_S if method in QUICK else CALL_S
        pool = self._reads if is_read else self._pool
        if method == JobStore.images and self.shared:
            pool = self._pixels
        call: Future[R] = _submitted(pool, getattr(self._store, method.__name__), *args, **kwargs)
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.shield(asyncio.wrap_future(call))
        except TimeoutError as error:
            call.cancel()  # at once, if its turn has not come: nobody waits for it, and others wait behind it
            raise StorageFailed(f"the job store has not answered for {limit_s:g} s") from error
        finally:
            if is_read:
                call.cancel()  # if its client has gone before its turn came

    async def check(self) -> None:
        """See whether jobs can be kept. Writes only while the last attempt to write has failed."""
        await self.call(JobStore.check, write=self._failure is not None)

    async def add(self, job: JobRecord, key: Key | None, inputs: Inputs | None, *, held: bool = True) -> bool:
        """Add a job. One whose client is told that it was not kept is not kept later either."""
        self._adding.add(job.id)
        try:
            with traced("store add", {"tminus.job.id": job.id}):
                return await self.call(JobStore.add, job, key, inputs, held=held)
        except StorageFailed as error:
            # One with a key is found by the client's next try.
            if isinstance(error.__cause__, TimeoutError) and not (self.shared and key is not None):
                self._pool.submit(self._store.delete, job.id)  # comes right after, in the same thread
            raise
        finally:
            self._adding.discard(job.id)

    async def claim_all(self) -> Claimed:
        """Hold every job that has not ended, of a store that no other process shares."""
        return await self.call(JobStore.claim, "", Intake(math.inf), math.inf, sys.maxsize)

    async def renew(self, fingerprint: str, pace: ReplicaPace) -> frozenset[str]:
        """Hold the jobs of all `holders` for one more lease, and those that are being added."""
        known = self._adding.union(*(ids() for ids in self.holders))
        return await self.call(JobStore.renew, fingerprint, pace, known)

    async def finish(self, job: JobRecord, images: Pixels | StoredObject | None) -> None:
        """Keep how a job ended."""
        with traced("store finish", {"tminus.job.id": job.id, "tminus.outcome": job.outcome or ""}):
            await self.call(JobStore.finish, job, images)
        if job.webhook is not None:
            self.owes.set()

    async def images(self, job_id: str) -> Pixels | None:
        """Read the images of a job that is done."""
        if (data := await self._packed_images(job_id)) is None:
            return None
        with arrays.reading(f"the images of job {job_id}"):
            return await asyncio.wrap_future(_submitted(self._pixels, arrays.unpack_images, data))

    async def _packed_images(self, job_id: str) -> bytes | None:
        found = await self._found(job_id)
        if isinstance(found, StoredObject):
            raise StorageFailed("the images of this job are in an object store, which this server was not told of")
        return found

    async def _found(self, job_id: str) -> bytes | StoredObject | None:
        with traced("store images", {"tminus.job.id": job_id}):
            return await self.call(JobStore.images, job_id)

    async def delete(self, job_id: str, owner: str | None = None) -> bool:
        """Delete a job."""
        with traced("store delete", {}):
            return await self.call(JobStore.delete, job_id, owner)

    async def sweep(self, before_us: int, max_bytes: int, owed_after_us: int = 0) -> bool:
        """Delete some of the jobs that ended long ago, or of which there are too many."""
        return await self.call(JobStore.sweep, before_us, max_bytes, owed_after_us)

    def save(self, snapshots: Mapping[str, Snapshot], fingerprint: str) -> tuple[Exception | None, float]:
        """Replace the jobs' snapshots by these, and wait for it: for callers outside the event loop.

        Returns the error, if there was one, and the CPU time in seconds.
        """

        def save() -> tuple[Exception | None, float]:
            started_s, error = time.thread_time(), None
            try:
                self._store.save(snapshots, fingerprint)
            except Exception as raised:
                error = raised
            if error is None or isinstance(error, StorageFailed):
                self._failure = error
            return error, time.thread_time() - started_s

        return self._pool.submit(save).result()

    def close(self) -> None:
        """Finish the calls that have been made, and close the store. Blocks until then."""
        self._pixels.shutdown()
        if self._reads is not self._pool:
            self._reads.shutdown()
        self._pool.submit(self._store.close)
        self._pool.shutdown()


def _submitted(pool: ThreadPoolExecutor, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> "Future[R]":
    try:
        return pool.submit(work, *args, **kwargs)
    except RuntimeError as error:  # a request was looking through the stores as this one was closed
        raise StorageFailed("the job store is closed") from error
