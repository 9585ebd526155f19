"""The interface of a store of durable jobs, and the SQL that SQLite and PostgreSQL share."""

import json
import logging
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import arrays
from tminus.service.jobs.store.records import (
    Call,
    Claimed,
    JobRecord,
    Key,
    LeaseLost,
    ObjectGone,
    Outcome,
    Place,
    StoredObject,
)
from tminus.service.jobs.store.tables import Tables
from tminus.service.jobs.webhooks.delivery_store import Conditions, DeliveryStore, Run, kept_bytes, webhook_of
from tminus.service.jobs.webhooks.webhook import Event, Webhook
from tminus.service.spec import Inputs, Pixels, SampleSpec, Snapshot

log = logging.getLogger(__name__)

# Limits of one sweep. Other calls wait while it runs, for about 30 ms, or for 0.2 s and more on a slow disk.
SWEEP_JOBS, SWEEP_BYTES = 500, 16 * 2**20
# States of an object. Pending: its job has not ended. Kept: its job's outcome is stored. Unneeded: to be deleted.
PENDING, KEPT, UNNEEDED = "pending", "kept", "unneeded"
ORPHAN_US = 3600 * 10**6  # an object that has been pending for longer counts as unneeded
AGAIN_US = 60 * 10**6  # time after which another replica may retry a deletion
MOST_KEYS = 100  # maximum number of object keys that one call returns


class Removal(DeliveryStore):
    """The part of a JobStore that deletes jobs and objects."""

    @abstractmethod
    def sweep(self, before_us: int, max_bytes: int, owed_after_us: int = 0) -> bool:
        """Delete jobs that ended before `before_us`, then the oldest until at most `max_bytes` are left.

        The newest job is never deleted to free space. A job with pending deliveries may be deleted to free space, but
        not because of its age. Deliveries of events before `owed_after_us` do not count as pending: without a secret to
        sign them, they are never sent. The freed space is returned to the disk.

        One call does only a part of the work, so that other calls do not wait long. Returns whether to call this again.
        """

    @Call(writes=True)
    def delete(self, job_id: str, owner: str | None = None) -> bool:
        """Delete a job and all its data, even damaged data.

        Return False if there is no such job or it has another owner.
        """
        jobs = self._tables.jobs
        mine = [jobs.c.id == job_id, *([jobs.c.owner == owner] if owner is not None else []), *self._here()]
        with self._transaction() as run:
            deleted = self._delete(run, run(sa.select(jobs.c.id).where(*mine)).scalars().all()) > 0
        self._let_go(job_id)
        return deleted

    # --- objects ---
    # Each object has a row in the table `objects`, from before it is written until after it is deleted. Objects are
    # found in this table and not by listing the bucket, because another database may share the bucket.

    @Call(writes=True)
    def note_object(self, job_id: str, key: str) -> None:
        """Record the key of an object that is about to be written.

        An object that no job refers to is deleted after an hour. Raises LeaseLost if this store does not hold the job,
        and ObjectGone if the key is no longer pending.
        """
        jobs, objects, now_us = self._tables.jobs, self._tables.objects, self.now_us()
        again = sa.update(objects).where(objects.c.key == key, objects.c.state == PENDING).values(since_us=now_us)
        new = {"key": key, "job_id": job_id, "state": PENDING, "since_us": now_us, "bytes": 0, "sha256": ""}
        with self._transaction() as run:
            if not run(sa.select(jobs.c.id).where(*self._held([job_id]))).first():
                raise LeaseLost(job_id)
            if not run(again).rowcount:
                if run(sa.select(objects.c.key).where(objects.c.key == key)).first() is not None:
                    raise ObjectGone(key)
                run(sa.insert(objects).values(**new))

    @Call(writes=True)
    def give_up_object(self, key: str) -> None:
        """Mark a pending object as unneeded, because no job will refer to it."""
        objects = self._tables.objects
        noted = sa.update(objects).where(objects.c.key == key, objects.c.state == PENDING)
        with self._transaction() as run:
            run(noted.values(state=UNNEEDED, since_us=0))

    def take_unneeded_objects(self) -> list[str]:
        """Return the keys of some unneeded objects, to be deleted. No job can refer to them any more.

        Pass the keys to `forget_objects` within a minute. Otherwise, another replica may take the same keys.
        """
        objects, now_us = self._tables.objects, self.now_us()
        orphaned = sa.and_(objects.c.state == PENDING, objects.c.since_us < now_us - ORPHAN_US)
        unneeded = sa.and_(objects.c.state == UNNEEDED, objects.c.since_us < now_us - AGAIN_US)
        oldest = sa.select(objects.c.key).where(sa.or_(orphaned, unneeded)).order_by(objects.c.since_us)
        with self._transaction() as run:
            query = oldest.limit(MOST_KEYS).with_for_update(skip_locked=True)
            keys: list[str] = list(run(query).scalars().all())
            if keys:
                run(sa.update(objects).where(objects.c.key.in_(keys)).values(state=UNNEEDED, since_us=now_us))
        return keys

    def forget_objects(self, keys: Sequence[str]) -> None:
        """Delete the rows of deleted objects."""
        objects = self._tables.objects
        with self._transaction() as run:
            run(sa.delete(objects).where(objects.c.key.in_(keys), objects.c.state == UNNEEDED))

    # --- helpers that run in the caller's transaction ---

    def _sweep(
        self, run: Run, before_us: int, max_bytes: float, owed_after_us: int, which: Conditions | None = None
    ) -> int:
        """Do one part of a sweep, and return the number of deleted jobs.

        which: a filter; None selects this store's jobs.
        """
        jobs = self._tables.jobs
        ended = [jobs.c.finished_us.is_not(None), *(self._here() if which is None else which)]
        owed = self._is_owed(owed_after_us)
        oldest = sa.select(jobs.c.id, jobs.c.finished_us, jobs.c.bytes, owed.label("owed")).where(*ended)
        oldest = oldest.order_by(jobs.c.finished_us, jobs.c.arrival).limit(SWEEP_JOBS)
        chosen: list[str] = []
        total = left = int(run(sa.select(sa.func.coalesce(sa.func.sum(jobs.c.bytes), 0)).where(*ended)).scalar_one())
        for row in run(oldest if total > max_bytes else oldest.where(~owed)).all():
            too_much = left > max_bytes and left > row.bytes
            if not (row.finished_us < before_us or too_much) or total - left >= SWEEP_BYTES:
                break
            if too_much or not row.owed:
                chosen.append(row.id)
                left -= row.bytes
        if chosen:
            self._delete(run, chosen)
            log.info("%d jobs that had ended were deleted", len(chosen))
        return len(chosen)

    def _delete(self, run: Run, job_ids: Sequence[str]) -> int:
        tables = self._tables
        for table in (tables.snapshots, tables.inputs, tables.images, tables.deliveries):
            run(sa.delete(table).where(table.c.job_id.in_(job_ids)))
        let_go = sa.update(tables.objects).where(tables.objects.c.job_id.in_(job_ids), tables.objects.c.state == KEPT)
        run(let_go.values(state=UNNEEDED, since_us=0))
        return int(run(sa.delete(tables.jobs).where(tables.jobs.c.id.in_(job_ids))).rowcount)


RECORD_BYTES = 1024  # approximate size of a job in bytes, without its images and its webhook
EVENTS_OF_END: Mapping[str, Sequence[Event]] = {
    "done": ("start", "output", "completed"),  # the job has begun, even if its start was not recorded
    "failed": ("completed",),
    "cancelled": ("completed",),
}
SIGNED = ("outcome", "finished_us", "fingerprint")  # columns that identify an outcome; the time is in microseconds


class JobStore(Removal):
    """Stores jobs. Each call is one transaction. Its changes are durable when it returns.

    Only one thread at a time may call a store. A shared store may be called from each of the threads that `Call.thread`
    names, but only from one thread of each name at a time.

    A call that fails or reads damaged data raises StorageFailed and changes nothing.

    A store holds the jobs that its server has added or claimed, until they end. Only the holder of a job writes the
    job's snapshots and outcome. In a shared store, another replica may take over a job (see shared_store.py).

    A subclass creates the engine and defines how jobs are claimed.
    """

    _engine: sa.Engine
    _name = "the job store"  # name of the store in log messages

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        fields = JobRecord.__dataclass_fields__
        self._record_columns: list[sa.ColumnElement[Any]] = [column for column in self._jobs.c if column.name in fields]

    # --- implemented by each store ---

    @abstractmethod
    def left_behind(self, served: Collection[str]) -> Mapping[str, list[str]]:
        """Return the ids of unfinished jobs whose weights no running server serves, keyed by weights hash.

        served: hashes of the weights that this server serves.
        """

    @Call(writes=True)
    @abstractmethod
    def check(self, *, write: bool) -> None:
        """Raise StorageFailed if jobs cannot be stored. write: also try a small write."""

    @abstractmethod
    def close(self) -> None:
        """Release all jobs and close the store. No other call may follow."""

    # --- shared by all stores ---

    @Call(writes=True)
    def add(self, job: JobRecord, key: Key | None = None, inputs: Inputs | None = None, *, held: bool = True) -> bool:
        """Store a new job. held: hold the job. If False, leave it for any replica to claim.

        Return False and store nothing if the key already has a job, which `find` returns.
        """
        jobs = self._tables.jobs
        data = arrays.pack_inputs(inputs) if inputs is not None else None
        values = {name: value for name, value in asdict(job).items() if name in jobs.c}
        values |= {"spec": _json(job.spec.to_json()), "problem": _json(job.problem)}
        values |= {"webhook": _json(job.webhook.to_json() if job.webhook is not None else None)}
        size = RECORD_BYTES + kept_bytes(job.webhook) + len(data or b"")
        values |= {"bytes": size} | self._added(job, held)
        if key is not None:
            values |= {"key": key.kept_as, "request_hash": key.request_hash}
        try:
            with self._transaction() as run:
                if key is not None and run(self._of_key(key, jobs.c.id)).first() is not None:
                    self._let_go(job.id)
                    return False
                run(sa.insert(jobs).values(**values))
                if data is not None:
                    run(sa.insert(self._tables.inputs).values(job_id=job.id, data=data))
        except StorageFailed as error:
            self._let_go(job.id)
            # Another replica added a job with this key between the query and the insert.
            if isinstance(error.__cause__, sa.exc.IntegrityError):
                return False
            raise
        return True

    @Call("reads")
    def find(self, key: Key) -> tuple[JobRecord, bool] | None:
        """Return the job that was added with this key and whether its request was the same, or None."""
        with self._transaction() as run:
            row = run(self._of_key(key, *self._record_columns, self._tables.jobs.c.request_hash)).one_or_none()
        return (self._record(row), row.request_hash == key.request_hash) if row is not None else None

    def _of_key(self, key: Key, *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
        return sa.select(*columns).where(self._tables.jobs.c.key == key.kept_as, *self._here())

    @Call("reads")
    def get(self, job_id: str) -> JobRecord | None:
        query = sa.select(*self._record_columns).where(self._tables.jobs.c.id == job_id, *self._here())
        with self._transaction() as run:
            row = run(query).one_or_none()
        return self._record(row) if row is not None else None

    @Call("reads")
    def page(
        self,
        before: Place | None,
        outcomes: Collection[Outcome | None],
        limit: int,
        owner: str | None = None,
        *,
        held: bool | None = None,
    ) -> list[JobRecord]:
        """List jobs with these outcomes that were created before `before`, newest first.

        Skip jobs with damaged records.

        outcomes: None selects unfinished jobs. owner: list only this owner's jobs. held: list unfinished jobs only if a
        live replica holds them (True), or only if none does (False).
        """
        jobs = self._tables.jobs
        of_owner = [jobs.c.owner == owner] if owner is not None else []
        chosen: sa.ColumnElement[bool] = jobs.c.outcome.in_([each for each in outcomes if each is not None])
        if None in outcomes:
            chosen = sa.or_(chosen, sa.and_(jobs.c.outcome.is_(None), *self._if_held(held)))
        query = sa.select(*self._record_columns).where(chosen, *of_owner, *self._here())
        query = query.order_by(jobs.c.created_us.desc(), jobs.c.id.desc())
        records: list[JobRecord] = []
        while (missing := limit - len(records)) > 0:
            older = query if before is None else query.where(sa.tuple_(jobs.c.created_us, jobs.c.id) < before)
            with self._transaction() as run:
                rows = run(older.limit(missing)).all()
            for row in rows:
                with suppress(StorageFailed):
                    records.append(self._record(row))
            if len(rows) < missing:
                break
            before = rows[-1].created_us, rows[-1].id
        return records

    def save(self, snapshots: Mapping[str, Snapshot], fingerprint: str) -> None:
        """Replace the jobs' snapshots. Ignore jobs that have ended or that this store does not hold."""
        jobs, table = self._tables.jobs, self._tables.snapshots
        packed = {job_id: arrays.pack_snapshot(snapshot) for job_id, snapshot in snapshots.items()}
        with self._transaction() as run:
            # SQLite allows 32,766 variables in a statement, enough for the ids of MAX_JOBS jobs.
            held = sa.select(jobs.c.id).where(*self._held(packed))
            live = run(held.with_for_update()).scalars().all()
            run(sa.delete(table).where(table.c.job_id.in_(live)))
            if live:
                rows = [{"job_id": each, "fingerprint": fingerprint, "data": packed[each]} for each in live]
                run(sa.insert(table), rows)

    def snapshot(self, job_id: str, fingerprint: str) -> Snapshot | None:
        """Return a job's last snapshot. Return None if the snapshot is damaged or was made by another build."""
        table = self._tables.snapshots
        query = sa.select(table.c.data).where(table.c.job_id == job_id, table.c.fingerprint == fingerprint)
        with self._transaction() as run:
            data = run(query).scalar_one_or_none()
        with suppress(StorageFailed), arrays.reading(f"the snapshot of job {job_id}, which begins anew,"):
            return arrays.unpack_snapshot(data) if data is not None else None
        return None

    def inputs(self, job_id: str) -> Inputs | None:
        data = self._data(self._tables.inputs, job_id)
        with arrays.reading(f"the inputs of job {job_id}"):
            return arrays.unpack_inputs(data) if data is not None else None

    @Call("pixels")
    def images(self, job_id: str) -> bytes | StoredObject | None:
        """Return the packed images of a finished job, or a reference to the object that holds them."""
        if (data := self._data(self._tables.images, job_id)) is None:
            objects = self._tables.objects
            query = sa.select(objects).where(objects.c.job_id == job_id, objects.c.state == KEPT)
            with self._transaction() as run:
                row = run(query).one_or_none()
            return StoredObject(row.key, row.bytes, row.sha256) if row is not None else None
        return data

    def _data(self, table: sa.Table, job_id: str) -> bytes | None:
        with self._transaction() as run:
            data: bytes | None = run(sa.select(table.c.data).where(table.c.job_id == job_id)).scalar_one_or_none()
        return data

    @Call(writes=True)
    def crashed(self, job_ids: Collection[str]) -> None:
        """Count a crash of the server against these jobs, whether this store holds them or not.

        The crash is always counted against a single job. If there are several jobs, it is counted only against those
        without an earlier crash, because another of the jobs may be the cause.
        """
        jobs = self._tables.jobs
        which = [jobs.c.id.in_(job_ids), jobs.c.outcome.is_(None), *self._here()]
        if len(job_ids) > 1:
            which.append(jobs.c.crashes == 0)
        with self._transaction() as run:
            run(sa.update(jobs).where(*which).values(crashes=jobs.c.crashes + 1))

    @Call(writes=True)
    def finish(self, job: JobRecord, images: Pixels | StoredObject | None = None) -> None:
        """Store a job's outcome and images, and delete its snapshot and inputs. Its webhook events become due.

        images: if stored as an object, its key must have been passed to `note_object` before it was written. Raises
        LeaseLost if this store does not hold the job, and ObjectGone if the object was given up. In both cases, nothing
        is stored.
        """
        ending = {name: getattr(job, name) for name in ("outcome", "finished_us", "fingerprint", "problem")}
        packed = images if images is None or isinstance(images, StoredObject) else arrays.pack_images(images)
        self._finish(job.id, ending, job.webhook, packed)

    def _finish(
        self, job_id: str, ending: dict[str, Any], webhook: Webhook | None, images: bytes | StoredObject | None = None
    ) -> None:
        tables = self._tables
        size = images.bytes if isinstance(images, StoredObject) else len(images or b"")
        ending |= {"problem": _json(ending["problem"]), "bytes": RECORD_BYTES + kept_bytes(webhook) + size}
        with self._transaction() as run:
            if not run(sa.update(tables.jobs).where(*self._held([job_id])).values(**ending)).rowcount:
                self._let_go(job_id)
                kept = [tables.jobs.c.id == job_id, *(tables.jobs.c[name] == ending.get(name) for name in SIGNED)]
                # An earlier attempt stored this outcome, but its response was lost.
                if run(sa.select(tables.jobs.c.id).where(*kept)).first():
                    return
                raise LeaseLost(job_id)
            self._owe(run, job_id, webhook, EVENTS_OF_END[ending["outcome"]])
            run(sa.delete(tables.snapshots).where(tables.snapshots.c.job_id == job_id))
            run(sa.delete(tables.inputs).where(tables.inputs.c.job_id == job_id))
            if isinstance(images, StoredObject):
                pending = [tables.objects.c.key == images.key, tables.objects.c.state == PENDING]
                kept_as = {"state": KEPT, "bytes": images.bytes, "sha256": images.sha256}
                if not run(sa.update(tables.objects).where(*pending).values(**kept_as)).rowcount:
                    raise ObjectGone(images.key)  # the object is deleted, or will be
            elif images is not None:
                run(sa.insert(tables.images).values(job_id=job_id, data=images))
        self._let_go(job_id)

    # --- overridden by a shared store ---

    def _if_held(self, _held: bool | None) -> Conditions:
        """Select jobs that a live replica holds (True), jobs that none holds (False), or all jobs (None)."""
        return ()

    def _added(self, _job: JobRecord, _held: bool) -> dict[str, Any]:
        """Return values for the columns of a new job that JobRecord lacks, such as its holder."""
        return {}

    # --- helpers ---

    @contextmanager
    def _transaction(self) -> Iterator[Run]:
        try:
            with self._engine.begin() as connection:
                yield connection.execute
        except sa.exc.IntegrityError as error:
            raise StorageFailed("the job store has a row with this key already") from error
        except sa.exc.DBAPIError as error:
            reason = " ".join(str(error.orig).split())
            log.error("%s: %s", self._name, reason)
            raise StorageFailed(f"the job store cannot do it: {reason}") from None
        except sa.exc.TimeoutError:
            raise StorageFailed("the job store has no connection free") from None

    def _claimed(self, rows: Sequence[Any]) -> Claimed:
        """Return the records of the rows. End a job as failed if its record is damaged."""
        records, damaged = [], 0
        for row in rows:
            try:
                records.append(self._record(row))
            except StorageFailed as error:
                ending = {"outcome": "failed", "finished_us": self.now_us(), "problem": error.problem()}
                with suppress(StorageFailed, LeaseLost):  # if this fails, the next replica to claim the job retries
                    self._finish(row.id, ending, webhook_of(row, damaged=True))
                    damaged += 1
        return Claimed(records, damaged)

    def _record(self, row: Any) -> JobRecord:
        """Make a record from a row. Raises StorageFailed if the row is damaged."""
        fields = {name: getattr(row, name) for name in JobRecord.__dataclass_fields__ if hasattr(row, name)}
        with arrays.reading(f"the record of job {row.id}"):
            fields["spec"] = SampleSpec.from_json(json.loads(row.spec))
            fields["problem"] = json.loads(row.problem) if row.problem is not None else None
            fields["webhook"] = webhook_of(row)
            return JobRecord(**fields)


def _json(value: Mapping[str, Any] | None) -> str | None:
    return json.dumps(value) if value is not None else None
