"""Assigns the jobs of a shared store to replicas.

A replica claims jobs and holds each under a lease, which expires by the database's clock. Each claim increases the
job's fence. A replica may lose its lease while it is suspended or disconnected. It then still has the old fence, so its
writes change nothing (Kleppmann 2016, "How to do distributed locking").
"""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, insert

from tminus.service.errors import StorageFailed
from tminus.service.jobs.store.job_store import RECORD_BYTES, JobStore
from tminus.service.jobs.store.records import Call, Claimed, JobRecord, Key, ReplicaPace, now_us
from tminus.service.jobs.store.tables import make_postgres_tables
from tminus.service.jobs.webhooks.delivery_store import Conditions, kept_bytes, webhook_of
from tminus.service.scheduling.room import ClusterLoad, Intake
from tminus.service.spec import Inputs

CLAIM_JOBS = 32  # maximum number of jobs in the result of one claim query
MOST_DOUBLINGS = 8  # limits the wait of a job that keeps losing its replica
AWAY = timedelta(minutes=5)  # time that a lost replica has to restart, for jobs that no other replica can run
DATABASE_S = sa.func.extract("epoch", sa.func.clock_timestamp())


class SharedStore(JobStore):
    """A replica's access to the jobs of one set of weights, in PostgreSQL's dialect.

    A subclass provides the database connection.
    """

    def __init__(
        self, namespace: str, weights_hash: str, replica: str, lease_s: float, address: str | None = None
    ) -> None:
        """replica: unique name of this replica. lease_s: seconds that a job stays held without a renewal.

        address: the URL at which other replicas can reach this replica, if known.
        """
        self._replicas, tables = make_postgres_tables(namespace)
        super().__init__(tables)
        self._weights, self._replica, self._address, self.lease_s = weights_hash[:16], replica, address, lease_s
        self._lease = timedelta(seconds=lease_s)
        self._living = sa.func.coalesce(tables.jobs.c.lease_until >= sa.func.clock_timestamp(), sa.false())
        # If a job has no live lease, a replica in this column means that the replica was lost. A replica that releases
        # a job or shuts down clears the column.
        self._left_behind = tables.jobs.c.replica.is_not(None)
        # A suspect is a job that may have crashed its replica. It stays a suspect until it ends.
        self._suspect = sa.or_(self._left_behind, tables.jobs.c.takeovers > 0)
        self._record_columns += [self._living.label("held"), tables.jobs.c.format]
        self._fences: dict[str, int] = {}  # the fences of held jobs, keyed by job id
        self._unsure: set[str] = set()  # ids of jobs to delete: `add` failed, but may have been committed
        self._ahead_us = now_us() - _steady_us()  # the database's clock minus this machine's monotonic clock

    def _now(self) -> sa.ColumnElement[int]:
        return sa.cast(DATABASE_S * 1_000_000, sa.BigInteger)

    def read_clock(self) -> None:
        """Read the database's time. Each renewal reads it too. Raises StorageFailed."""
        asked_us = _steady_us()
        with self._transaction() as run:
            self._know_time(run(sa.select(DATABASE_S)).scalar_one(), asked_us)

    def _know_time(self, database_s: Any, asked_us: int) -> None:
        self._ahead_us = round(float(database_s) * 1e6) - (asked_us + _steady_us()) // 2

    def now_us(self) -> int:
        """Return the database's time, estimated from its difference to the local clock at the last renewal."""
        return _steady_us() + self._ahead_us

    def add(self, job: JobRecord, key: Key | None = None, inputs: Inputs | None = None, *, held: bool = True) -> bool:
        try:
            return super().add(job, key, inputs, held=held)
        except StorageFailed:
            if key is None:  # with a key, the client's retry finds the job
                self._unsure.add(job.id)  # the connection may have been lost after the commit
            raise

    def claim(
        self, fingerprint: str, intake: Intake, begun_places: float, rows: int, tables: Collection[str] = ()
    ) -> Claimed:
        """Claim unfinished jobs that no replica holds and that have at most `rows` rows.

        Jobs are claimed in this order:

        1. The shortest suspect, unless this replica has a suspect on trial. A suspect is a job whose replica was lost.
        2. Jobs that a replica has released, by arrival.
        3. New jobs that the intake accepts, the shortest first.
        4. The oldest new job, if the intake accepts it.

        Jobs of the first two kinds come first because their clients wait for the next step. Once they add up to
        `begun_places` places, no more of them are claimed.

        A job that another build began is skipped while a replica of that build lives. A job whose table's hash is not
        in `tables` is skipped while a replica of another build lives or may be restarting. A job with a damaged record
        ends as failed.
        """
        jobs = self._tables.jobs
        now = sa.func.clock_timestamp()
        held = {
            "replica": self._replica,
            "fence": jobs.c.fence + 1,
            "lease_until": now + self._lease,
            "takeovers": jobs.c.takeovers + sa.cast(self._left_behind, sa.Integer),
            "on_trial_at": sa.case((self._suspect, now)),
        }
        arrival, length = jobs.c.arrival, jobs.c.places
        new, released = jobs.c.fence == 0, sa.and_(jobs.c.fence > 0, ~self._suspect)
        free = partial(self._free, (fingerprint, rows, tables))
        with self._transaction() as run:
            suspect = run(free(self._may_be_tried(), length, arrival).limit(1)).all()
            chosen = _first([*suspect, *run(free(released, arrival)).all()], begun_places)
            for row in chosen:
                intake.add(row.places)
            shortest = run(free(new, length, arrival)).all()
            chosen += [row for row in shortest if intake.offer(row.places)]
            if intake.refused < math.inf:
                oldest = run(free(new, arrival).limit(1)).first()  # None if a replica with its table has just started
                is_next = oldest is not None and oldest not in chosen
                if is_next and intake.offer_oldest(oldest.places, oldest.created_us):
                    chosen.append(oldest)
            if chosen:
                run(sa.update(jobs).where(jobs.c.id.in_([row.id for row in chosen])).values(**held))
        self._fences |= {row.id: row.fence + 1 for row in chosen}
        return self._claimed(chosen)

    def _free(
        self, can: tuple[str, int, Collection[str]], which: sa.ColumnElement[bool], *order: Any
    ) -> sa.Select[Any]:
        """Select and lock the first jobs that this replica may claim.

        can: this replica's fingerprint, maximum number of rows, and hashes of tables.
        """
        fingerprint, rows, tables = can
        jobs, snapshots, replicas = self._tables.jobs, self._tables.snapshots, self._replicas
        other_builds = [replicas.c.fingerprint != fingerprint, *self._its_weights()]
        lease_left = replicas.c.lease_until - sa.func.clock_timestamp()
        may_have_it = sa.exists(replicas.c.id).where(*other_builds, lease_left > -AWAY)
        query = sa.select(*self._record_columns, self._suspect.label("suspect"), jobs.c.fence, jobs.c.places)
        query = query.where(jobs.c.outcome.is_(None), ~self._living, which)
        query = query.where(jobs.c.rows <= rows, *self._understood(), *self._here())
        query = query.where(~(_lacks_table(jobs.c.spec, tables) & may_have_it))
        began = sa.select(snapshots.c.job_id).join(replicas, replicas.c.fingerprint == snapshots.c.fingerprint)
        began = began.where(snapshots.c.job_id == jobs.c.id, *other_builds, lease_left > timedelta())
        query = query.where(sa.or_(jobs.c.fence == 0, ~began.exists()))
        return query.order_by(*order).limit(CLAIM_JOBS).with_for_update(skip_locked=True, of=jobs)

    def _may_be_tried(self) -> sa.ColumnElement[bool]:
        """Return the condition for suspects that have waited long enough, if none is on trial in this replica.

        A trial lasts at most one lease. These limits keep a job that crashes its server from delaying other jobs. They
        also let a restarted server count the crash before the next trial.
        """
        jobs, now = self._tables.jobs, sa.func.clock_timestamp()
        free_for_s = sa.func.extract("epoch", now - jobs.c.lease_until)
        wait_s = self.lease_s * sa.func.power(2, sa.func.least(jobs.c.takeovers + 1, MOST_DOUBLINGS))
        is_due = sa.or_(jobs.c.takeovers == 0, ~self._left_behind, free_for_s > wait_s)
        here = jobs.alias()
        on_trial = [here.c.replica == self._replica, here.c.outcome.is_(None), here.c.on_trial_at > now - self._lease]
        # Exclude this replica's own expired jobs, because the next renewal takes them back or releases them.
        not_mine = jobs.c.replica.is_distinct_from(self._replica)
        return sa.and_(jobs.c.fence > 0, self._suspect, not_mine, is_due, ~sa.exists(here.c.id).where(*on_trial))

    @Call("reads")
    def holder(self, job_id: str) -> str | None:
        """Return the address of the live replica that holds a job, or None."""
        jobs, replicas = self._tables.jobs, self._replicas
        query = sa.select(replicas.c.address).join(jobs, jobs.c.replica == replicas.c.id)
        query = query.where(jobs.c.id == job_id, self._living, *self._its_weights())
        with self._transaction() as run:
            address: str | None = run(query.limit(1)).scalar_one_or_none()
        return address

    @Call(writes=True)
    def renew(self, fingerprint: str, pace: ReplicaPace, known: Collection[str]) -> frozenset[str]:
        """Renew the leases of the held jobs, report the pace to other replicas, and return the held jobs' ids.

        known: ids of the jobs that this server is working on. Any other jobs that this replica holds are released,
        because the response to their claim was lost.
        """
        jobs, replicas, now = self._tables.jobs, self._replicas, sa.func.clock_timestamp()
        told_others = {"address": self._address, "lease_until": now + self._lease, **asdict(pace)}
        alive = insert(replicas).values(id=self._replica, weights=self._weights, fingerprint=fingerprint, **told_others)
        alive = alive.on_conflict_do_update(index_elements=["id", "weights", "fingerprint"], set_=told_others)
        mine = self._mine()
        worked_on = jobs.c.id == sa.any_(_texts(known))
        longer = sa.update(jobs).where(*mine, worked_on).values(lease_until=now + self._lease)
        others = sa.update(jobs).where(*mine, ~worked_on).values(replica=None, lease_until=None)
        # Clients were told that these jobs were not stored, and have no key to find them.
        unsure = [jobs.c.id == sa.any_(_texts(self._unsure)), jobs.c.fence <= 1, jobs.c.outcome.is_(None)]
        asked_us = _steady_us()
        with self._transaction() as run:
            if self._unsure:
                self._delete(run, run(sa.select(jobs.c.id).where(*unsure)).scalars().all())
            database_s = run(alive.returning(DATABASE_S)).scalar_one()
            held = {row.id: row.fence for row in run(longer.returning(jobs.c.id, jobs.c.fence)).all()}
            run(others)
        self._know_time(database_s, asked_us)
        self._unsure.clear()
        self._fences = {job_id: fence for job_id, fence in self._fences.items() if held.get(job_id) == fence}
        return frozenset(self._fences)

    def load(self) -> ClusterLoad:
        """Return the load of all replicas and of the unclaimed jobs."""
        jobs, replicas, now = self._tables.jobs, self._replicas, sa.func.clock_timestamp()
        columns = (replicas.c.places_per_s, replicas.c.backlog_s, replicas.c.lease_until)
        most = [sa.func.max(column).label(column.name) for column in columns]
        alive = [replicas.c.lease_until > now, *self._its_weights()]
        # Count a replica once, even if it serves two builds of the same weights during a reload.
        living = sa.select(replicas.c.id, *most).where(*alive).group_by(replicas.c.id).subquery()
        # Seconds since each replica reported its backlog.
        told_s = sa.func.extract("epoch", now + self._lease - living.c.lease_until)
        least = sa.func.min(sa.func.greatest(0, living.c.backlog_s - told_s)).filter(living.c.id != self._replica)
        held = sa.func.avg(living.c.backlog_s)
        those = sa.select(sa.func.count(), sa.func.sum(living.c.places_per_s), held, least)
        waiting = sa.select(sa.func.count(), sa.func.sum(jobs.c.places))
        waiting = waiting.where(jobs.c.outcome.is_(None), ~self._living, *self._understood(), *self._here())
        with self._transaction() as run:
            count, pace, held_s, least_s = run(those).one()
            jobs_free, places = run(waiting).one()
        return ClusterLoad(
            count,
            float(pace or 0),
            float(held_s or 0),
            jobs_free,
            float(places or 0),
            math.inf if least_s is None else float(least_s),
        )

    @Call(writes=True)
    def release(self, job_id: str) -> None:
        """Release a job. Until another replica claims it, this replica can still store its snapshot."""
        free = sa.update(self._tables.jobs).where(*self._held([job_id])).values(replica=None, lease_until=None)
        with self._transaction() as run:
            run(free)

    @Call(writes=True, owes=True)
    def cancel(self, job_id: str) -> bool:
        """End a job as cancelled. Return False if it had already ended. The holder finds out at its next renewal."""
        tables, jobs = self._tables, self._tables.jobs
        mine = [jobs.c.id == job_id, jobs.c.outcome.is_(None), *self._here()]
        ended = sa.update(jobs).where(*mine).values(outcome="cancelled", finished_us=self.now_us())
        with self._transaction() as run:
            if (row := run(ended.returning(jobs.c.webhook)).one_or_none()) is None:
                return False
            webhook = webhook_of(row, damaged=True)
            self._owe(run, job_id, webhook, ["completed"])
            for table in (tables.snapshots, tables.inputs):
                run(sa.delete(table).where(table.c.job_id == job_id))
            left = RECORD_BYTES + kept_bytes(webhook)  # its inputs are deleted
            run(sa.update(jobs).where(jobs.c.id == job_id).values(bytes=left))
        self._let_go(job_id)
        return True

    @Call("reads", quick=True)
    def open_jobs(self, owner: str) -> frozenset[str]:
        """Return the ids of an owner's unfinished jobs."""
        jobs = self._tables.jobs
        query = sa.select(jobs.c.id).where(jobs.c.owner == owner, jobs.c.outcome.is_(None), *self._here())
        with self._transaction() as run:
            return frozenset(run(query).scalars())

    # --- called by JobStore ---

    def _mine(self) -> Conditions:
        jobs = self._tables.jobs
        return [jobs.c.replica == self._replica, jobs.c.outcome.is_(None), *self._here()]

    def _its_weights(self) -> Conditions:
        return [self._replicas.c.weights == self._weights]

    def _here(self) -> Conditions:
        return [self._tables.jobs.c.weights == self._weights]

    def _held(self, job_ids: Collection[str]) -> Conditions:
        jobs = self._tables.jobs
        fences = [(job_id, self._fences[job_id]) for job_id in job_ids if job_id in self._fences]
        return [sa.tuple_(jobs.c.id, jobs.c.fence).in_(fences), jobs.c.outcome.is_(None)]

    def _if_held(self, held: bool | None) -> Conditions:
        return () if held is None else [self._living if held else ~self._living]

    def _let_go(self, job_id: str) -> None:
        self._fences.pop(job_id, None)

    def _lease_of_new(self, job_id: str, held: bool) -> dict[str, Any]:
        """Hold a new job, or leave it to any replica. Return the values of the job's lease columns."""
        if not held:
            return {"fence": 0}
        self._fences[job_id] = 1
        return {"fence": 1, "replica": self._replica, "lease_until": sa.func.clock_timestamp() + self._lease}


def _first(rows: Sequence[Any], places: float) -> list[Any]:
    """Return the first rows that add up to at least `places` places, or all rows if they have fewer."""
    before = accumulate((row.places for row in rows), initial=0)
    return [row for row, passed in zip(rows, before, strict=False) if passed < places]


def _steady_us() -> int:
    return time.monotonic_ns() // 1000


def _texts(each: Collection[str]) -> sa.ColumnElement[Any]:
    """Create an array parameter. An array can have more elements than a statement can have parameters."""
    return sa.literal(list(each), ARRAY(sa.Text))


def _lacks_table(spec: sa.ColumnElement[str], tables: Collection[str]) -> sa.ColumnElement[bool]:
    """Return the condition for specs, as JSON text, that name a table whose hash is not in `tables`."""
    named = sa.func.substring(spec, '"table": ?"([^"]*)"')  # not parsed, so a damaged spec cannot fail a claim
    return named.isnot(None) & (named != sa.all_(_texts(tables)))
