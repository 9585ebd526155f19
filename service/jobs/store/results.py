"""The job store for asyncio where large results are objects in an object store: the rest is in the database.

A large result is kept in three steps: the key is noted in the database, under the fence of the job; the object is
written; the end of the job is kept with a reference to it, under the fence too. A process may stop at any point: either
the job has not ended, and goes on elsewhere, or it has, and its object is there. Of what nobody refers to, the key is
known.

The event loop waits for the object store, and never the thread of the database, in which leases are renewed.
"""

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import arrays
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import JobRecord, LeaseLost, ObjectGone, StoredObject
from tminus.service.spec import Pixels
from tminus.service.tracing import traced

if TYPE_CHECKING:  # obstore is an extra
    from tminus.service.jobs.store.objects import S3Objects

log = logging.getLogger(__name__)

R = TypeVar("R")

AT_ONCE = 4  # results that are written at a time


@dataclass(frozen=True, slots=True)
class Results:
    """The object store of large results, and the size above which a result is large."""

    objects: "S3Objects"
    above_bytes: int = 256 * 1024  # of pixels: results of no more stay in the database


@dataclass(slots=True)
class _Upload:
    """The result of one job, from the note of its key until the end of the job is kept."""

    key: str
    stored: StoredObject | None = None  # once the object is written


class ResultStore(AsyncStore):
    """Owns the uploads of jobs whose end is being kept."""

    def __init__(self, store: JobStore, results: Results, folder: str) -> None:
        """folder: of the keys of these jobs, by their weights."""
        super().__init__(store)
        self._objects, self._above_bytes, self._folder = results.objects, results.above_bytes, folder
        self._uploads: dict[str, _Upload] = {}  # by the job
        self._turns = asyncio.Semaphore(AT_ONCE)  # a result is packed, and so in memory twice, while it has one
        self._objects_failure: StorageFailed | None = None  # why the last attempt to write an object failed

    @property
    def failure(self) -> StorageFailed | None:
        """Why the last attempt to write failed, to the database or to the object store."""
        return super().failure or self._objects_failure

    async def check(self) -> None:
        """See whether jobs can be kept, their large results too."""
        await super().check()
        if self._objects_failure is not None:
            try:
                await _logged(self._objects.check())
            except StorageFailed as error:  # what is in the database alone can be kept
                self._objects_failure = error
            else:
                self._objects_failure = None

    async def finish(self, job: JobRecord, images: Pixels | StoredObject | None) -> None:
        """Keep how a job ended. An object that was written while the database was away serves the next try."""
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
                except ObjectGone:  # a store was away for so long that nobody waited for us
                    log.warning("the images of job %s were given up before its end was kept: once more", job.id)
                    upload.key, upload.stored = f"{self._folder}/{job.id}/{uuid.uuid4().hex}", None
        except LeaseLost:
            self._uploads.pop(job.id, None)
            await self._give_up(upload.key)
            raise
        self._uploads.pop(job.id, None)

    async def _uploaded(self, job_id: str, key: str, images: Pixels) -> StoredObject:
        """Write an object under a key that no other replica has, so that none is ever written over."""
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
        except StorageFailed:  # it is known since it was noted, and goes in an hour
            log.warning("the object %s is not needed, and goes later", key)

    async def _packed_images(self, job_id: str) -> bytes | None:
        found = await self._found(job_id)
        if not isinstance(found, StoredObject):
            return found
        with traced("store download", {"tminus.job.id": job_id}):
            data = await _logged(self._objects.get(found.key, found.bytes))
        if data is None and await self._found(job_id) != found:  # it was deleted meanwhile
            return None
        with arrays.reading(f"the images of job {job_id}"):
            return await asyncio.to_thread(_checked, data, found)

    async def sweep(self, before_us: int, max_bytes: int, owed_after_us: int = 0) -> bool:
        """Delete some of the jobs as AsyncStore does, and some of the objects that no job refers to."""
        more = await super().sweep(before_us, max_bytes, owed_after_us)
        keys = await self.call(JobStore.take_unneeded_objects)
        if keys:
            try:
                await _logged(self._objects.delete(keys))
            except StorageFailed:  # they are taken again
                return more
            await self.call(JobStore.forget_objects, keys)
            log.info("%d objects that no job refers to were deleted", len(keys))
        return more or bool(keys)


async def _logged(call: Awaitable[R]) -> R:
    """Log an error of the object store, as the database's errors are logged."""
    try:
        return await call
    except StorageFailed as error:
        log.error("%s", error.detail)
        raise


def _packed(images: Pixels) -> tuple[bytes, str]:
    data = arrays.pack_images(images)
    return data, hashlib.sha256(data).hexdigest()


def _checked(data: bytes | None, stored: StoredObject) -> bytes:
    """Return the data if they are those of the stored object. Raises ValueError otherwise."""
    if data is None:
        raise ValueError(f"the object {stored.key} is missing")
    if len(data) != stored.bytes or hashlib.sha256(data).hexdigest() != stored.sha256:
        raise ValueError(f"the object {stored.key} is not the one that was written")
    return data
