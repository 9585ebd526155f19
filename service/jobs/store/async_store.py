"""The job store for asyncio: each call runs in a thread of the store's, so that the event loop waits for no disk.

A shared store has a second thread for what clients read, so that reading never delays the renewal of leases. A third
thread unpacks pixels, and reads them too if the store is shared. A file is locked for one connection, so the thread of
that connection reads the packed pixels. That takes milliseconds. A method's `Call` says which thread makes it.
"""

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar, cast

from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import arrays
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import Call, JobRecord, Key, ReplicaPace, StoredObject, Thread
from tminus.service.jobs.store.shared_store import SharedStore
from tminus.service.jobs.webhooks.delivery_store import DeliveryStore
from tminus.service.spec import Inputs, Pixels, Snapshot
from tminus.service.threads import started_pool
from tminus.service.tracing import traced

CALL_S = 30.0  # a call that takes longer is not waited for
QUICK_S = 1.0  # the same for a call without which a request can be answered
P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=DeliveryStore)  # the lowest class with calls


class AsyncStore:
    """Owns the store and its threads. `call` makes any call of JobStore; a call that needs more has its own method."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self.shared = isinstance(store, SharedStore)
        self.lease_s = store.lease_s if isinstance(store, SharedStore) else math.inf
        self._pool, self._pixels = started_pool(1, "tminus-store"), started_pool(1, "tminus-store-pixels")
        self._pools: dict[Thread, ThreadPoolExecutor] = {"store": self._pool, "reads": self._pool, "pixels": self._pool}
        if self.shared:
            self._pools |= {"reads": started_pool(1, "tminus-store-reads"), "pixels": self._pixels}
        self.turn = asyncio.Lock()  # claiming and renewing take turns, so that a renewal sees every claim
        self.holders: list[Callable[[], Collection[str]]] = []  # each says which jobs it works on
        self.owes = asyncio.Event()  # set when an event may be owed to a webhook
        self._adding: set[str] = set()
        self.now_us = store.now_us  # needs no disk
        self._failure: StorageFailed | None = None

    @property
    def failure(self) -> StorageFailed | None:
        """Why the last attempt to write failed; None after one that did not."""
        return self._failure

    async def call(self, method: Callable[Concatenate[S, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of the store in a thread, and wait for it, though not for a disk that does not answer.

        method: as the class declares it that decorates it with `Call`. Raises StorageFailed, and what the method does.
        """
        how, its_own = Call.of(method), cast(Callable[P, R], getattr(self._store, method.__name__))
        try:
            result = await self._answer(how, its_own, *args, **kwargs)
        except StorageFailed as error:
            if how.writes:
                self._failure = error
            raise
        if how.writes:
            self._failure = None
        if how.owes:
            self.owes.set()
        return result

    async def _answer(self, how: Call, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        limit_s = QUICK_S if how.quick else CALL_S
        call = _submitted(self._pools[how.thread], method, *args, **kwargs)
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.shield(asyncio.wrap_future(call))
        except TimeoutError as error:
            call.cancel()  # at once, if its turn has not come: nobody waits for it, and others wait behind it
            raise StorageFailed(f"the job store has not answered for {limit_s:g} s") from error
        finally:
            if how.thread != "store":
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

    async def renew(self, fingerprint: str, pace: ReplicaPace) -> frozenset[str]:
        """Hold the jobs of all `holders`, and jobs that are being added, for one more lease."""
        known = self._adding.union(*(ids() for ids in self.holders))
        return await self.call(SharedStore.renew, fingerprint, pace, known)

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
        """Delete some of the jobs that ended long ago or take too much room."""
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
        for pool in {self._pixels, self._pools["reads"]} - {self._pool}:
            pool.shutdown()
        self._pool.submit(self._store.close)
        self._pool.shutdown()


def _submitted(pool: ThreadPoolExecutor, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> "Future[R]":
    try:
        return pool.submit(work, *args, **kwargs)
    except RuntimeError as error:  # a request was looking through the stores as this one was closed
        raise StorageFailed("the job store is closed") from error
