"""The job store for asyncio: each call runs in a thread of the store's, so that the event loop waits for no disk.

Of a shared store, what clients read runs in a second thread: however much that is, leases are renewed in time.
"""

import asyncio
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from tminus.service.errors import StorageFailed
from tminus.service.jobs.store.contract import JobRecord, JobStore, Key, Outcome, Pace, Place, StoredObject
from tminus.service.jobs.webhooks.slots import Room
from tminus.service.jobs.webhooks.webhook import Delivery
from tminus.service.scheduling.cluster import ClusterLoad
from tminus.service.scheduling.intake import Intake
from tminus.service.spec import Images, Inputs, Snapshot
from tminus.service.tracing import traced

CALL_S = 30.0  # a call that takes longer is not waited for
QUICK_S = 1.0  # the same, of one without which a request can be answered
P = ParamSpec("P")
R = TypeVar("R")


class AsyncStore:
    """Owns the store and its threads. Its methods are those of JobStore, and raise StorageFailed as they do."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tminus-store")
        self._reads = ThreadPoolExecutor(1, thread_name_prefix="tminus-store-reads") if store.shared else self._pool
        self.shared, self.lease_s = store.shared, store.lease_s
        self.turn = asyncio.Lock()  # of who claims, or renews: what was claimed is known before the next renewal
        self.holders: list[Callable[[], Collection[str]]] = []  # each says which jobs it works on
        self.owes = asyncio.Event()  # set where a webhook may be to be told something
        self._adding: set[str] = set()
        self._damaged = 0
        self.now_us = store.now_us  # needs no disk
        self._failure: StorageFailed | None = None

    @property
    def failure(self) -> StorageFailed | None:
        """Why the last attempt to write failed; None after one that did not."""
        return self._failure

    async def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Wait for a call, though not for a disk that does not answer. Raises StorageFailed."""
        return await self._call_in(self._pool, CALL_S, function, *args, **kwargs)

    async def _read(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As `_call`, of what a client reads."""
        return await self._call_in(self._reads, CALL_S, function, *args, **kwargs)

    async def _call_in(
        self, pool: ThreadPoolExecutor, limit_s: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        try:
            call = pool.submit(function, *args, **kwargs)
        except RuntimeError as error:  # a request was looking through the stores as this one was closed
            raise StorageFailed("the job store is closed") from error
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.shield(asyncio.wrap_future(call))
        except TimeoutError as error:
            call.cancel()  # at once, if its turn has not come: nobody waits for it, and others wait behind it
            raise StorageFailed(f"the job store has not answered for {limit_s:g} s") from error

    async def _write(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As `_call`; whether it could be done is kept in `failure`."""
        try:
            result = await self._call(function, *args, **kwargs)
        except StorageFailed as error:
            self._failure = error
            raise
        self._failure = None
        return result

    async def check(self) -> None:
        """See JobStore. Writes only while the last attempt to write has failed."""
        await self._write(self._store.check, write=self._failure is not None)

    async def add(self, job: JobRecord, key: Key | None, inputs: Inputs | None, *, held: bool = True) -> bool:
        """See JobStore. A job whose client is told that it was not kept is not kept later either."""
        self._adding.add(job.id)
        try:
            with traced("store add", {"tminus.job.id": job.id}):
                return await self._write(self._store.add, job, key, inputs, held=held)
        except StorageFailed as error:
            # One with a key is found by the client's next try.
            if isinstance(error.__cause__, TimeoutError) and not (self.shared and key is not None):
                self._pool.submit(self._store.delete, job.id)  # comes right after, in the same thread
            raise
        finally:
            self._adding.discard(job.id)

    async def find(self, key: Key) -> tuple[JobRecord, bool] | None:
        """See JobStore."""
        return await self._read(self._store.find, key)

    async def id_of(self, key: Key) -> str | None:
        """See JobStore."""
        return await self._read(self._store.id_of, key)

    async def open_jobs(self, owner: str) -> frozenset[str]:
        """See JobStore. Is given up soon."""
        return await self._call_in(self._reads, QUICK_S, self._store.open_jobs, owner)

    async def get(self, job_id: str) -> JobRecord | None:
        """See JobStore."""
        return await self._read(self._store.get, job_id)

    async def claim(
        self, fingerprint: str, intake: Intake, begun_places: float, rows: int, tables: Collection[str] = ()
    ) -> list[JobRecord]:
        """See JobStore."""
        return await self._claim(fingerprint, intake, begun_places, rows, tables)

    async def claim_all(self) -> list[JobRecord]:
        """Hold every job that has not ended, of a store that no other process shares."""
        return await self._claim("", Intake(math.inf), math.inf, sys.maxsize)

    async def _claim(self, *asked: Any) -> list[JobRecord]:
        def claim() -> tuple[list[JobRecord], int]:
            return self._store.claim(*asked), self._store.take_damaged()

        records, damaged = await self._call(claim)
        self._damaged += damaged
        return records

    def take_damaged(self) -> int:
        """See JobStore; of what was claimed so far."""
        damaged, self._damaged = self._damaged, 0
        return damaged

    async def holder(self, job_id: str) -> str | None:
        """See JobStore."""
        return await self._read(self._store.holder, job_id)

    async def renew(self, fingerprint: str, pace: Pace) -> frozenset[str]:
        """See JobStore. Known are the jobs of all `holders`, and those that are being added."""
        known = self._adding.union(*(ids() for ids in self.holders))
        return await self._write(self._store.renew, fingerprint, pace, known)

    async def load(self) -> ClusterLoad:
        """See JobStore."""
        return await self._call(self._store.load)

    async def release(self, job_id: str) -> None:
        """See JobStore."""
        await self._write(self._store.release, job_id)

    async def cancel(self, job_id: str) -> bool:
        """See JobStore."""
        cancelled = await self._write(self._store.cancel, job_id)
        self.owes.set()
        return cancelled

    async def page(
        self,
        before: Place | None,
        outcomes: Collection[Outcome | None],
        limit: int,
        owner: str | None = None,
        *,
        held: bool | None = None,
    ) -> list[JobRecord]:
        """See JobStore."""
        return await self._read(self._store.page, before, outcomes, limit, owner, held=held)

    async def snapshot(self, job_id: str, fingerprint: str) -> Snapshot | None:
        """See JobStore."""
        return await self._call(self._store.snapshot, job_id, fingerprint)

    async def inputs(self, job_id: str) -> Inputs | None:
        """See JobStore."""
        return await self._call(self._store.inputs, job_id)

    async def crashed(self, job_ids: Collection[str]) -> None:
        """See JobStore."""
        await self._write(self._store.crashed, job_ids)

    async def finish(self, job: JobRecord, images: Images | StoredObject | None) -> None:
        """See JobStore."""
        with traced("store finish", {"tminus.job.id": job.id, "tminus.outcome": job.outcome or ""}):
            await self._write(self._store.finish, job, images)
        if job.webhook is not None:
            self.owes.set()

    async def started(self, job: JobRecord) -> None:
        """See JobStore."""
        await self._write(self._store.started, job)
        self.owes.set()

    async def claim_deliveries(self, room: Room, held_s: float) -> list[Delivery]:
        """See JobStore."""
        return await self._call(self._store.claim_deliveries, room, held_s)

    async def settle(self, delivery: Delivery, again_in_s: float = 0.0, *, counts: bool = True) -> bool:
        """See JobStore."""
        return await self._write(self._store.settle, delivery, again_in_s, counts=counts)

    async def number_owed(self, owner: str, receiver: str, most: int) -> int:
        """See JobStore."""
        return await self._read(self._store.number_owed, owner, receiver, most)

    async def deliveries(self, job_ids: Collection[str]) -> dict[str, list[Delivery]]:
        """See JobStore."""
        return await self._read(self._store.deliveries, job_ids)

    async def images(self, job_id: str) -> Images | None:
        """See JobStore."""
        found = await self._found(job_id)
        if isinstance(found, StoredObject):
            raise StorageFailed("the images of this job are in an object store, which this server was not told of")
        return found

    async def _found(self, job_id: str) -> Images | StoredObject | None:
        with traced("store images", {"tminus.job.id": job_id}):
            return await self._read(self._store.images, job_id)

    async def delete(self, job_id: str, owner: str | None = None) -> bool:
        """See JobStore."""
        with traced("store delete", {}):
            return await self._write(self._store.delete, job_id, owner)

    async def sweep(self, before_us: int, max_bytes: int, owed_after_us: int = 0) -> bool:
        """See JobStore."""
        return await self._call(self._store.sweep, before_us, max_bytes, owed_after_us)

    def save(
        self, snapshots: Mapping[str, Snapshot], fingerprint: str, saved: Callable[[Exception | None, float], None]
    ) -> None:
        """See JobStore; for callers outside the event loop.

        saved: is called in the store's thread with the error, if there was one, and the CPU time in seconds.
        """

        def save() -> None:
            started_s, error = time.thread_time(), None
            try:
                self._store.save(snapshots, fingerprint)
            except Exception as raised:
                error = raised
            if error is None or isinstance(error, StorageFailed):
                self._failure = error
            saved(error, time.thread_time() - started_s)

        self._pool.submit(save)

    def close(self) -> None:
        """Finish the calls that have been made, and close the store. Blocks until then."""
        if self._reads is not self._pool:
            self._reads.shutdown()
        self._pool.submit(self._store.close)
        self._pool.shutdown()
