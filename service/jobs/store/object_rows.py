"""The table that knows of every object of ours in an object store, from before it is written until it is deleted.

Objects are found by this table, and never by listing a bucket: what it does not know may be another's, as where two
databases share a bucket. Each call runs in a transaction of the caller's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from tminus.service.jobs.store.records import ObjectGone, StoredObject

# An object is about to be written, or was; the row of its job refers to it; nobody does, and it is to be deleted.
PENDING, KEPT, UNNEEDED = "pending", "kept", "unneeded"
ORPHAN_US = 3600 * 10**6  # after which nobody is waited for who noted an object
AGAIN_US = 60 * 10**6  # after which another may try to delete what one has not
MOST_KEYS = 100  # that are taken at a time

Run = Callable[..., Any]


class ObjectRows:
    """What is done with the table `objects`."""

    def __init__(self, table: sa.Table) -> None:
        self._table = table

    def note(self, run: Run, job_id: str, key: str, at_us: int) -> None:
        """An object is about to be written for a job, now or once more. Raises ObjectGone where it was given up."""
        table = self._table
        again = sa.update(table).where(table.c.key == key, table.c.state == PENDING).values(since_us=at_us)
        if run(again).rowcount == 0:
            if run(sa.select(table.c.key).where(table.c.key == key)).first() is not None:
                raise ObjectGone(key)
            run(sa.insert(table).values(key=key, job_id=job_id, state=PENDING, since_us=at_us, bytes=0, sha256=""))

    def keep(self, run: Run, stored: StoredObject) -> None:
        """The job's row is about to refer to it. Raises ObjectGone where it is being deleted, or was."""
        table = self._table
        kept = sa.update(table).where(table.c.key == stored.key, table.c.state == PENDING)
        if not run(kept.values(state=KEPT, bytes=stored.bytes, sha256=stored.sha256)).rowcount:
            raise ObjectGone(stored.key)

    def of(self, run: Run, job_id: str) -> StoredObject | None:
        """The object that a job refers to."""
        table = self._table
        query = sa.select(table.c.key, table.c.bytes, table.c.sha256)
        row = run(query.where(table.c.job_id == job_id, table.c.state == KEPT)).one_or_none()
        return StoredObject(row.key, row.bytes, row.sha256) if row is not None else None

    def let_go_of(self, run: Run, job_ids: Sequence[str]) -> None:
        """Jobs are deleted: nobody needs their objects any more."""
        table = self._table
        theirs = sa.update(table).where(table.c.job_id.in_(job_ids), table.c.state == KEPT)
        run(theirs.values(state=UNNEEDED, since_us=0))

    def give_up(self, run: Run, key: str) -> None:
        """Nobody will refer to an object that was noted."""
        table = self._table
        run(sa.update(table).where(table.c.key == key, table.c.state == PENDING).values(state=UNNEEDED, since_us=0))

    def take_unneeded(self, run: Run, at_us: int) -> list[str]:
        """Some of those that nobody needs, the oldest first; for a minute they are this caller's to delete."""
        table = self._table
        due = sa.or_(
            sa.and_(table.c.state == PENDING, table.c.since_us < at_us - ORPHAN_US),
            sa.and_(table.c.state == UNNEEDED, table.c.since_us < at_us - AGAIN_US),
        )
        query = sa.select(table.c.key).where(due).order_by(table.c.since_us).limit(MOST_KEYS)
        keys: list[str] = list(run(query.with_for_update(skip_locked=True)).scalars().all())
        if keys:
            run(sa.update(table).where(table.c.key.in_(keys)).values(state=UNNEEDED, since_us=at_us))
        return keys

    def forget(self, run: Run, keys: Sequence[str]) -> None:
        """They were deleted."""
        table = self._table
        run(sa.delete(table).where(table.c.key.in_(keys), table.c.state == UNNEEDED))
