"""Removal from the store: old jobs, and objects that no job refers to."""

import logging
from abc import abstractmethod
from collections.abc import Sequence

import sqlalchemy as sa

from tminus.service.jobs.store.records import Call, LeaseLost, ObjectGone
from tminus.service.jobs.webhooks.delivery_store import Conditions, DeliveryStore, Run

log = logging.getLogger(__name__)

# The most that one sweep does: other calls wait some 30 ms for it, 0.2 s or more where a slow disk must catch up.
SWEEP_JOBS, SWEEP_BYTES = 500, 16 * 2**20
# An object is about to be written, or was; the row of its job refers to it; nobody does, and it is to be deleted.
PENDING, KEPT, UNNEEDED = "pending", "kept", "unneeded"
ORPHAN_US = 3600 * 10**6  # after which nobody is waited for who noted an object
AGAIN_US = 60 * 10**6  # after which another may try to delete what one has not
MOST_KEYS = 100  # that are taken at a time


class Removal(DeliveryStore):
    """The calls of a JobStore that delete jobs and objects."""

    @abstractmethod
    def sweep(self, before_us: int, max_bytes: int, owed_after_us: int = 0) -> bool:
        """Delete jobs that ended before a time, and then the oldest that ended until those left take at most max_bytes.

        The newest stays, whatever its size. One of which deliveries are pending is not too old, but may be too much;
        those of events before owed_after_us are not waited for: nobody tries them, as without a secret to sign them.
        The room of deleted jobs is given back to the disk.
        One call does a part of this, so that other calls need not wait long; returns whether to call again.
        """

    @Call(writes=True)
    def delete(self, job_id: str, owner: str | None = None) -> bool:
        """Delete a job and all its data, even if damaged; False if the owner has no such job."""
        jobs = self._tables.jobs
        mine = [jobs.c.id == job_id, *([jobs.c.owner == owner] if owner is not None else []), *self._here()]
        with self._transaction() as run:
            deleted = self._delete(run, run(sa.select(jobs.c.id).where(*mine)).scalars().all()) > 0
        self._let_go(job_id)
        return deleted

    # --- objects: each is a row of the table, from before it is written until it is deleted ---
    # They are found by this table, and never by listing a bucket: what it does not know may be another's, as where two
    # databases share a bucket.

    @Call(writes=True)
    def note_object(self, job_id: str, key: str) -> None:
        """Note that an object is about to be written for a job that is held. Raises LeaseLost and ObjectGone.

        From then on it is known: if no job comes to refer to it within an hour, nobody needs it.
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
        """Note that no job will refer to an object."""
        objects = self._tables.objects
        noted = sa.update(objects).where(objects.c.key == key, objects.c.state == PENDING)
        with self._transaction() as run:
            run(noted.values(state=UNNEEDED, since_us=0))

    def take_unneeded_objects(self) -> list[str]:
        """Take the keys of some objects that no job refers to, to delete them. Others may take them after a minute.

        From then on no job can come to refer to them.
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
        """Remove the rows of objects that were deleted."""
        objects = self._tables.objects
        with self._transaction() as run:
            run(sa.delete(objects).where(objects.c.key.in_(keys), objects.c.state == UNNEEDED))

    # --- in transactions of the rest of the store ---

    def _sweep(
        self, run: Run, before_us: int, max_bytes: float, owed_after_us: int, which: Conditions | None = None
    ) -> int:
        """Do one part of a sweep, and return how many jobs it deleted. which: jobs other than this store's own."""
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
