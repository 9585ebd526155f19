"""The job store for asyncio.

Each call runs in one of the store's threads, so the event loop never waits. A method's `Call` names its thread:
"store", "reads" or "pixels". A shared store has all three threads. Clients' reads have their own thread, so that they
never delay the renewal of leases. The "pixels" thread reads and unpacks images. A SQLite file can be used by only one
connection, so the "store" thread makes all calls. It reads packed images in milliseconds, and the "pixels" thread only
unpacks them.

Large results may go to an object store, in three steps. First, the database records the object's key. Second, the
object is written. Third, the job's outcome is stored with a reference to the object. The first and third steps fail if
this server no longer holds the job. The process may stop at any point: either the job is unfinished and another process
continues it, or the job has ended and its object exists. The database also has the keys of objects that no job refers
to. Requests to the object store run in the event loop, so they do not delay the thread that renews leases.
"""

import asyncio
import hashlib
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar, cast

from tminus.service.errors import StorageFailed
from tminus.service.jobs.crash_report import OF_MAPPED_FILE, CrashReport
from tminus.service.jobs.store import arrays
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import (
    Call,
    JobRecord,
    Key,
    LeaseLost,
    ObjectGone,
    ReplicaPace,
    StoredObject,
    Thread,
)
from tminus.service.jobs.store.shared_store import SharedStore
from tminus.service.jobs.webhooks.delivery_store import DeliveryStore
from tminus.service.spec import Inputs, Pixels, Snapshot
from tminus.service.threads import started_pool
from tminus.service.tracing import traced

if TYPE_CHECKING:  # obstore is an optional dependency
    from tminus.service.jobs.store.objects import S3Objects

CALL_S = 30.0  # timeout of a call, in seconds
QUICK_S = 1.0  # timeout of a call that is marked `quick`
P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=DeliveryStore)  # the base class of all stores


class AsyncStore:
    """Makes the calls of a job store in threads. Owns the store and the threads."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self.shared = isinstance(store, SharedStore)
        self.lease_s = store.lease_s if isinstance(store, SharedStore) else math.inf
        self._pool, self._pixels = started_pool(1, "tminus-store"), started_pool(1, "tminus-store-pixels")
        self._pools: dict[Thread, ThreadPoolExecutor] = {"store": self._pool, "reads": self._pool, "pixels": self._pool}
        if self.shared:
            self._pools |= {"reads": started_pool(1, "tminus-store-reads"), "pixels": self._pixels}
        self.turn = asyncio.Lock()  # claims and renewals hold this lock, so a renewal sees every claim
        self.holders: list[Callable[[], Collection[str]]] = []  # each returns the ids of the jobs it is working on
        self.owes = asyncio.Event()  # set when a webhook event may be due
        self._adding: set[str] = set()
        self.now_us = store.now_us  # may be called in the event loop, because it does no I/O
        self._failure: StorageFailed | None = None

    @property
    def failure(self) -> StorageFailed | None:
        """The error of the last write, or None if it succeeded."""
        return self._failure

    async def call(self, method: Callable[Concatenate[S, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a method of the store in its thread, and return the result.

        method: a function of the store's class, such as JobStore.get. Raises the method's errors, and StorageFailed
        after a timeout.
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
            call.cancel()  # if the call has not started, drop it, because other calls wait behind it
            raise StorageFailed(f"the job store has not answered for {limit_s:g} s") from error
        finally:
            if how.thread != "store":
                call.cancel()  # the client may have disconnected before the call started

    async def check(self) -> None:
        """Check whether jobs can be stored. Writes only if the last write failed."""
        await self.call(JobStore.check, write=self._failure is not None)

    async def add(self, job: JobRecord, key: Key | None, inputs: Inputs | None, *, held: bool = True) -> bool:
        """Add a job. After a timeout, delete the job, because the client is told that it was not stored."""
        self._adding.add(job.id)
        try:
            with traced("store add", {"tminus.job.id": job.id}):
                return await self.call(JobStore.add, job, key, inputs, held=held)
        except StorageFailed as error:
            # In a shared store, keep a job that has an idempotency key: the client's retry will find it.
            if isinstance(error.__cause__, TimeoutError) and not (self.shared and key is not None):
                self._pool.submit(self._store.delete, job.id)  # runs after the add, in the same thread
            raise
        finally:
            self._adding.discard(job.id)

    async def renew(self, fingerprint: str, pace: ReplicaPace) -> frozenset[str]:
        """Renew the leases of all jobs that `holders` name, and of jobs that are being added."""
        known = self._adding.union(*(ids() for ids in self.holders))
        return await self.call(SharedStore.renew, fingerprint, pace, known)

    async def finish(self, job: JobRecord, images: Pixels | StoredObject | None) -> None:
        with traced("store finish", {"tminus.job.id": job.id, "tminus.outcome": job.outcome or ""}):
            await self.call(JobStore.finish, job, images)
        if job.webhook is not None:
            self.owes.set()

    async def images(self, job_id: str) -> Pixels | None:
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
        with traced("store delete", {}):
            return await self.call(JobStore.delete, job_id, owner)

    async def sweep(self, before_us: int, max_bytes: int, owed_after_us: int = 0) -> bool:
        """Delete some old jobs; see JobStore.sweep. Return True if the caller should call again."""
        return await self.call(JobStore.sweep, before_us, max_bytes, owed_after_us)

    def save(self, snapshots: Mapping[str, Snapshot], fingerprint: str) -> tuple[Exception | None, float]:
        """Replace the snapshots of jobs. Blocks, so it must not be called in the event loop.

        Returns the error, or None, and the CPU time in seconds.
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
        """Close the store after all earlier calls. Blocks until the store is closed."""
        for pool in {self._pixels, self._pools["reads"]} - {self._pool}:
            pool.shutdown()
        self._pool.submit(self._store.close)
        self._pool.shutdown()


def _submitted(pool: ThreadPoolExecutor, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> "Future[R]":
    try:
        return pool.submit(work, *args, **kwargs)
    except RuntimeError as error:  # a request that searches all stores may reach a store that was just closed
        raise StorageFailed("the job store is closed") from error


log = logging.getLogger(__name__)

AT_ONCE = 4  # maximum number of concurrent uploads


@dataclass(frozen=True, slots=True)
class Results:
    """The object store for large results, and the size above which results go there."""

    objects: "S3Objects"
    above_bytes: int = 256 * 1024  # results with at most this many bytes of pixels stay in the database


@dataclass(slots=True)
class _Upload:
    """The upload of a job's result. Kept until the job's outcome is stored."""

    key: str
    stored: StoredObject | None = None  # None until the object is written


class ResultStore(AsyncStore):
    """An AsyncStore that writes large results to an object store. Owns the running uploads."""

    def __init__(self, store: JobStore, results: Results, folder: str) -> None:
        """folder: prefix of the objects' keys, taken from the weights hash."""
        super().__init__(store)
        self._objects, self._above_bytes, self._folder = results.objects, results.above_bytes, folder
        self._uploads: dict[str, _Upload] = {}  # keyed by job id
        self._turns = asyncio.Semaphore(AT_ONCE)  # limits memory: packing a result needs a second copy
        self._objects_failure: StorageFailed | None = None  # error of the last write, or None

    @property
    def failure(self) -> StorageFailed | None:
        """The error of the last write to the database, or else to the object store. None if both succeeded."""
        return super().failure or self._objects_failure

    async def check(self) -> None:
        """Check whether jobs and large results can be stored."""
        await super().check()
        if self._objects_failure is not None:
            try:
                await _logged(self._objects.check())
            except StorageFailed as error:  # do not raise: small results can still be stored
                self._objects_failure = error
            else:
                self._objects_failure = None

    async def finish(self, job: JobRecord, images: Pixels | StoredObject | None) -> None:
        """Store a job's outcome. If the database fails after an upload, the next attempt reuses the object."""
        if images is None or isinstance(images, StoredObject) or images.nbytes <= self._above_bytes:
            await super().finish(job, images)
            return
        upload = self._uploads.setdefault(job.id, _Upload(f"{self._folder}/{job.id}/{uuid.uuid4().hex}"))
        try:
            while True:
                try:
                    upload.stored = upload.stored or await self._uploaded(job.id, upload.key, images)
                    await super().finish(job, upload.stored)
                    break
                except ObjectGone:  # a store was unreachable for so long that a sweep took the object
                    log.warning("the images of job %s were given up before its end was kept: once more", job.id)
                    upload.key, upload.stored = f"{self._folder}/{job.id}/{uuid.uuid4().hex}", None
        except LeaseLost:
            self._uploads.pop(job.id, None)
            await self._give_up(upload.key)
            raise
        self._uploads.pop(job.id, None)

    async def _uploaded(self, job_id: str, key: str, images: Pixels) -> StoredObject:
        """Upload images. Each key is unique, so replicas never overwrite each other's objects."""
        await self.call(JobStore.note_object, job_id, key)
        try:
            async with self._turns:
                data, sha256 = await asyncio.to_thread(_packed, images)
                with traced("store upload", {"tminus.job.id": job_id}):
                    await _logged(self._objects.put(key, data))
        except StorageFailed as error:
            self._objects_failure = error
            raise
        self._objects_failure = None
        return StoredObject(key, len(data), sha256)

    async def _give_up(self, key: str) -> None:
        try:
            await self.call(JobStore.give_up_object, key)
        except StorageFailed:  # harmless: the database has the key, so a sweep deletes the object after an hour
            log.warning("the object %s is not needed, and goes later", key)

    async def _packed_images(self, job_id: str) -> bytes | None:
        found = await self._found(job_id)
        if not isinstance(found, StoredObject):
            return found
        with traced("store download", {"tminus.job.id": job_id}):
            data = await _logged(self._objects.get(found.key, found.bytes))
        if data is None and await self._found(job_id) != found:  # the job was deleted during the download
            return None
        with arrays.reading(f"the images of job {job_id}"):
            return await asyncio.to_thread(_checked, data, found)

    async def sweep(self, before_us: int, max_bytes: int, owed_after_us: int = 0) -> bool:
        """Delete some old jobs, and some objects that no job refers to. Return True if the caller should call again."""
        more = await super().sweep(before_us, max_bytes, owed_after_us)
        keys = await self.call(JobStore.take_unneeded_objects)
        if keys:
            try:
                await _logged(self._objects.delete(keys))
            except StorageFailed:  # a later sweep will try these keys again
                return more
            await self.call(JobStore.forget_objects, keys)
            log.info("%d objects that no job refers to were deleted", len(keys))
        return more or bool(keys)


async def _logged(call: Awaitable[R]) -> R:
    try:
        return await call
    except StorageFailed as error:
        log.error("%s", error.detail)
        raise


def _packed(images: Pixels) -> tuple[bytes, str]:
    data = arrays.pack_images(images)
    return data, hashlib.sha256(data).hexdigest()


def _checked(data: bytes | None, stored: StoredObject) -> bytes:
    """Return the data. Raises ValueError if they are missing or differ from what was written."""
    if data is None:
        raise ValueError(f"the object {stored.key} is missing")
    if len(data) != stored.bytes or hashlib.sha256(data).hexdigest() != stored.sha256:
        raise ValueError(f"the object {stored.key} is not the one that was written")
    return data


class Stores:
    """Owns the stores. Models with the same weights share a store, as happens during a reload.

    Each store first counts the crashes of earlier processes, once, before any of its jobs is resumed.
    """

    def __init__(
        self,
        open_store: Callable[[str], JobStore],
        results: Results | None = None,
        first: Mapping[str, JobStore] | None = None,
        crash_reports: Sequence[CrashReport] = (),
    ) -> None:
        """open_store: opens the store for a weights hash. results: the object store for large results, if any.

        first: stores that are already open, keyed by weights hash. crash_reports: reports of earlier processes.
        """
        self._open, self._results, self._crash_reports = open_store, results, crash_reports
        self._counted: set[str] = set()
        self._users: Counter[str] = Counter()
        self._turn = asyncio.Lock()  # a store must be closed before it can be opened again
        self._stores = {weights_hash: self._made(weights_hash, store) for weights_hash, store in (first or {}).items()}

    def take_first(self, weights_hash: str) -> AsyncStore:
        """Return the store for these weights, and open it if needed. Blocks. Call `release` after use."""
        if weights_hash not in self._stores:
            self._stores[weights_hash] = self._made(weights_hash, self._open(weights_hash))
        self._users[weights_hash] += 1
        return self._stores[weights_hash]

    async def take(self, weights_hash: str) -> AsyncStore:
        """Like `take_first`, but without blocking the event loop. Raises ValueError if the store cannot be opened."""
        async with self._turn:
            return await asyncio.to_thread(self.take_first, weights_hash)

    def _made(self, weights_hash: str, store: JobStore) -> AsyncStore:
        if weights_hash not in self._counted:
            self._counted.add(weights_hash)
            for report in self._crash_reports:
                if report.cause not in (None, OF_MAPPED_FILE):
                    with suppress(StorageFailed):  # the store has already logged the error
                        store.crashed(report.jobs)
        return AsyncStore(store) if self._results is None else ResultStore(store, self._results, weights_hash[:16])

    def is_shared(self, weights_hash: str) -> bool:
        """Return True if more than one model uses the store of these weights."""
        return self._users[weights_hash] > 1

    async def release(self, weights_hash: str) -> None:
        """End a use of a store. A store that nobody uses is closed."""
        async with self._turn:
            self._users[weights_hash] -= 1
            if not self._users[weights_hash]:
                del self._users[weights_hash]
                await asyncio.to_thread(self._stores.pop(weights_hash).close)

    async def count_crash(self, job_ids: Collection[str]) -> None:
        """Count a crash of this process against jobs, whichever store has them. Errors are not raised."""
        if job_ids:
            calls = [store.call(JobStore.crashed, job_ids) for store in self._stores.values()]
            await asyncio.gather(*calls, return_exceptions=True)

    def close(self) -> None:
        """Close all stores. Blocks. The stores must not be used afterwards."""
        for store in list(self._stores.values()):  # a copy, because a thread that is opening a store may still add it
            store.close()
