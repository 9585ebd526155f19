"""Durable jobs in PostgreSQL, shared by any number of replicas: leases by the database's clock, and fencing tokens.

Whoever claims a job gets its next fence, a number that only grows. A replica that lost its lease, asleep or cut off,
writes with the old fence, and so writes nothing (Kleppmann 2016, "How to do distributed locking").
"""

import logging
import math
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, insert

from tminus.service.errors import NewerJob, StorageFailed
from tminus.service.jobs.store.job_store import RECORD_BYTES, JobStore
from tminus.service.jobs.store.postgres_database import connect, prepare_schema
from tminus.service.jobs.store.records import Claimed, JobRecord, Key, ReplicaPace, now_us
from tminus.service.jobs.store.tables import make_postgres_tables
from tminus.service.jobs.webhooks.delivery_store import Conditions, Run, kept_bytes, webhook_of
from tminus.service.scheduling.cluster import ClusterLoad, Intake
from tminus.service.spec import Inputs

log = logging.getLogger(__name__)

CLAIM_JOBS = 32  # the most that one claim looks at
MOST_DOUBLINGS = 8  # of the lease: the longest wait of a job that lost its replica again and again
AWAY = timedelta(minutes=5)  # a replica may be starting again: jobs that others cannot do wait so long for it
GONE = timedelta(hours=1)  # since its lease ended: a replica that long gone is forgotten, with what it served
# Of what a job asks for: its fields and their values. A version that knows one more has the next number, so that none
# before it takes on what it does not know.
FORMAT = 4
_NOW_US = sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()) * 1_000_000, sa.BigInteger)
_EPOCH = sa.func.extract("epoch", sa.func.clock_timestamp())


class PostgresStore(JobStore):
    """The jobs of one set of weights, as one replica has them. Owns its engine."""

    shared = True

    def __init__(
        self,
        engine: sa.Engine,
        namespace: str,
        weights_hash: str,
        replica: str,
        lease_s: float,
        address: str | None = None,
    ) -> None:
        """engine: of a database whose tables are of this version, see postgres_database. replica: its name, its own.

        address: the URL by which other replicas reach this one.
        """
        self._address = address
        self._schema, (self._replicas, tables) = namespace, make_postgres_tables(namespace)
        super().__init__(tables)
        self._engine, self._weights, self._replica, self.lease_s = engine, weights_hash[:16], replica, lease_s
        self._lease = timedelta(seconds=lease_s)
        self._living = sa.func.coalesce(tables.jobs.c.lease_until >= sa.func.clock_timestamp(), sa.false())
        # For jobs that no replica holds: a replica that releases or ends a job clears this column.
        self._left_behind = tables.jobs.c.replica.is_not(None)
        # Such a job may have caused the loss of its replica. It stays a suspect until it ends.
        self._suspect = sa.or_(self._left_behind, tables.jobs.c.takeovers > 0)
        self._record_columns += [self._living.label("held"), tables.jobs.c.format]
        self._fences: dict[str, int] = {}  # of the jobs that are held
        self._unsure: set[str] = set()  # jobs that may or may not have been added: they are to be deleted
        self._ahead_us = now_us() - _steady_us()  # the database's clock, over one that nobody sets

    def _now(self) -> sa.ColumnElement[int]:
        return _NOW_US

    def read_clock(self) -> None:
        """Know the database's time, as after each renewal. Raises StorageFailed."""
        asked_us = _steady_us()
        with self._transaction() as run:
            self._know_time(run(sa.select(_EPOCH)).scalar_one(), asked_us)

    def _know_time(self, database_s: Any, asked_us: int) -> None:
        self._ahead_us = round(float(database_s) * 1e6) - (asked_us + _steady_us()) // 2

    def now_us(self) -> int:
        """The time of the database, as far as the clocks were apart at the last renewal."""
        return _steady_us() + self._ahead_us

    def add(self, job: JobRecord, key: Key | None = None, inputs: Inputs | None = None, *, held: bool = True) -> bool:
        try:
            return super().add(job, key, inputs, held=held)
        except _Taken:  # by another replica, since this one looked
            self._let_go(job.id)
            return False
        except StorageFailed:
            if key is None:  # else the client's next try finds it
                self._unsure.add(job.id)  # the connection may have broken after the commit
            raise

    def claim(
        self, fingerprint: str, intake: Intake, begun_places: float, rows: int, tables: Collection[str] = ()
    ) -> Claimed:
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
                oldest = run(free(new, arrival).limit(1)).first()  # None: one with its table has just started
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
        """Lock the first of these jobs, in some order, that this replica may claim with its build, rows and tables."""
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
        """Choose the suspects whose wait is over, if none is on trial here. A trial lasts a lease at most.

        So a job that ends its server delays no other, and a restart has time to count a crash before the next trial.
        """
        jobs, now = self._tables.jobs, sa.func.clock_timestamp()
        free_for_s = sa.func.extract("epoch", now - jobs.c.lease_until)
        wait_s = self.lease_s * sa.func.power(2, sa.func.least(jobs.c.takeovers + 1, MOST_DOUBLINGS))
        is_due = sa.or_(jobs.c.takeovers == 0, ~self._left_behind, free_for_s > wait_s)
        here = jobs.alias()
        on_trial = [here.c.replica == self._replica, here.c.outcome.is_(None), here.c.on_trial_at > now - self._lease]
        # The next renewal takes back the jobs whose lease this replica let expire, or leaves them to others.
        not_mine = jobs.c.replica.is_distinct_from(self._replica)
        return sa.and_(jobs.c.fence > 0, self._suspect, not_mine, is_due, ~sa.exists(here.c.id).where(*on_trial))

    def holder(self, job_id: str) -> str | None:
        jobs, replicas = self._tables.jobs, self._replicas
        query = sa.select(replicas.c.address).join(jobs, jobs.c.replica == replicas.c.id)
        query = query.where(jobs.c.id == job_id, self._living, *self._its_weights())
        with self._transaction() as run:
            address: str | None = run(query.limit(1)).scalar_one_or_none()
        return address

    def renew(self, fingerprint: str, pace: ReplicaPace, known: Collection[str]) -> frozenset[str]:
        jobs, replicas, now = self._tables.jobs, self._replicas, sa.func.clock_timestamp()
        told_others = {"address": self._address, "lease_until": now + self._lease, **asdict(pace)}
        alive = insert(replicas).values(id=self._replica, weights=self._weights, fingerprint=fingerprint, **told_others)
        alive = alive.on_conflict_do_update(index_elements=["id", "weights", "fingerprint"], set_=told_others)
        mine = self._mine()
        worked_on = jobs.c.id == sa.any_(_texts(known))
        longer = sa.update(jobs).where(*mine, worked_on).values(lease_until=now + self._lease)
        others = sa.update(jobs).where(*mine, ~worked_on).values(replica=None, lease_until=None)
        # Their clients were told that they were not kept, and have no key to find them by.
        unsure = [jobs.c.id == sa.any_(_texts(self._unsure)), jobs.c.fence <= 1, jobs.c.outcome.is_(None)]
        asked_us = _steady_us()
        with self._transaction() as run:
            if self._unsure:
                self._delete(run, run(sa.select(jobs.c.id).where(*unsure)).scalars().all())
            database_s = run(alive.returning(_EPOCH)).scalar_one()
            held = {row.id: row.fence for row in run(longer.returning(jobs.c.id, jobs.c.fence)).all()}
            run(others)
        self._know_time(database_s, asked_us)
        self._unsure.clear()
        self._fences = {job_id: fence for job_id, fence in self._fences.items() if held.get(job_id) == fence}
        return frozenset(self._fences)

    def left_behind(self, served: Collection[str]) -> Mapping[str, list[str]]:
        jobs, replicas = self._tables.jobs, self._replicas
        living = sa.select(replicas.c.weights).where(replicas.c.lease_until > sa.func.clock_timestamp())
        query = sa.select(jobs.c.weights, jobs.c.id).where(jobs.c.outcome.is_(None), jobs.c.weights.not_in(living))
        query = query.where(jobs.c.weights.not_in([each[:16] for each in served])).order_by(jobs.c.arrival)
        found: dict[str, list[str]] = {}
        with self._transaction() as run:
            for row in run(query):
                found.setdefault(row.weights, []).append(row.id)
        return found

    def load(self) -> ClusterLoad:
        jobs, replicas, now = self._tables.jobs, self._replicas, sa.func.clock_timestamp()
        columns = (replicas.c.places_per_s, replicas.c.backlog_s, replicas.c.lease_until)
        most = [sa.func.max(column).label(column.name) for column in columns]
        alive = [replicas.c.lease_until > now, *self._its_weights()]
        # A replica with two builds of the same weights, during a reload, counts once.
        living = sa.select(replicas.c.id, *most).where(*alive).group_by(replicas.c.id).subquery()
        # How long ago it told its backlog.
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

    def release(self, job_id: str) -> None:
        free = sa.update(self._tables.jobs).where(*self._held([job_id])).values(replica=None, lease_until=None)
        with self._transaction() as run:
            run(free)

    def cancel(self, job_id: str) -> bool:
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
            left = RECORD_BYTES + kept_bytes(webhook)  # without its picture
            run(sa.update(jobs).where(jobs.c.id == job_id).values(bytes=left))
        self._let_go(job_id)
        return True

    def sweep(self, before_us: int, max_bytes: int, owed_after_us: int = 0) -> bool:
        """One replica sweeps at a time; the others have nothing to do.

        Of weights that nobody serves, those that are too old go as well; how many may stay is not for others to say.
        """
        jobs, replicas = self._tables.jobs, self._replicas
        with self._transaction() as run:
            if not self._may_sweep(run, self._weights):
                return False
            run(sa.delete(replicas).where(replicas.c.lease_until < sa.func.clock_timestamp() - GONE))
            if self._sweep(run, before_us, max_bytes, owed_after_us):
                return True
            # Not those of a replica that went within the last hour, which may be starting again.
            unserved = jobs.c.weights.not_in(sa.select(replicas.c.weights))
            ended = jobs.c.outcome.is_not(None)  # in the words of the index
            old = [jobs.c.finished_us < before_us, ~self._is_owed(owed_after_us)]
            weights = run(sa.select(jobs.c.weights).where(ended, *old, unserved).limit(1)).scalar_one_or_none()
            if weights is None or not self._may_sweep(run, weights):
                return False
            return self._sweep(run, before_us, math.inf, owed_after_us, [jobs.c.weights == weights]) > 0

    def _may_sweep(self, run: Run, weights: str) -> bool:
        """Whether these weights are this replica's to sweep until its transaction ends."""
        key = sa.func.hashtext(f"tminus sweep {self._schema} {weights}")
        return bool(run(sa.select(sa.func.pg_try_advisory_xact_lock(key))).scalar_one())

    def check(self, *, write: bool) -> None:
        with self._transaction() as run:
            if write:  # no row, and yet what a database that may only be read refuses
                run(sa.update(self._replicas).where(sa.false()).values(fingerprint=""))
            else:
                run(sa.select(1))

    def close(self) -> None:
        """What is held is free at once; if the database is not there, when the lease ends."""
        jobs = self._tables.jobs
        try:
            with suppress(StorageFailed), self._transaction() as run:
                run(sa.update(jobs).where(*self._mine()).values(replica=None, lease_until=None))
                # Its row stays for a while: whoever sweeps sees that these weights have been served until now.
                mine = [self._replicas.c.id == self._replica, *self._its_weights()]
                run(sa.update(self._replicas).where(*mine).values(lease_until=sa.func.clock_timestamp()))
        finally:
            self._engine.dispose()

    # --- what JobStore asks ---

    def _mine(self) -> Conditions:
        jobs = self._tables.jobs
        return [jobs.c.replica == self._replica, jobs.c.outcome.is_(None), *self._here()]

    def _its_weights(self) -> Conditions:
        return [self._replicas.c.weights == self._weights]

    def _here(self) -> Conditions:
        return [self._tables.jobs.c.weights == self._weights]

    def _understood(self) -> Conditions:
        return [self._tables.jobs.c.format <= FORMAT]

    def _held(self, job_ids: Collection[str]) -> Conditions:
        jobs = self._tables.jobs
        fences = [(job_id, self._fences[job_id]) for job_id in job_ids if job_id in self._fences]
        return [sa.tuple_(jobs.c.id, jobs.c.fence).in_(fences), jobs.c.outcome.is_(None)]

    def _record(self, row: Any) -> JobRecord:
        if row.format > FORMAT:
            raise NewerJob(
                f"job {row.id} was accepted by a newer server, and asks for something that this one does not know"
            )
        return replace(super()._record(row), ahead_us=self.now_us() - now_us())

    def _if_held(self, held: bool | None) -> Conditions:
        return () if held is None else [self._living if held else ~self._living]

    def _let_go(self, job_id: str) -> None:
        self._fences.pop(job_id, None)

    def _added(self, job: JobRecord, held: bool) -> dict[str, Any]:
        places = job.spec.n * job.spec.num_passes * (2 if job.spec.guidance != 1 else 1)
        asks = {"weights": self._weights, "format": format_of(job), "places": places, "rows": job.spec.n}
        if not held:
            return asks | {"fence": 0}
        self._fences[job.id] = 1
        return asks | {"fence": 1, "replica": self._replica, "lease_until": sa.func.clock_timestamp() + self._lease}

    @contextmanager
    def _transaction(self) -> Iterator[Run]:
        try:
            with self._engine.begin() as connection:
                yield connection.execute
        except sa.exc.IntegrityError as error:
            raise _Taken from error
        except sa.exc.DBAPIError as error:
            reason = " ".join(str(error.orig).split())
            log.error("the job store: %s", reason)
            raise StorageFailed(f"the job store cannot do it: {reason}") from None
        except sa.exc.TimeoutError:
            raise StorageFailed("the job store has no connection free") from None


def open_postgres(
    url: str, namespace: str, lease_s: float, address: str | None = None
) -> Callable[[str], PostgresStore]:
    """Bring the database to this version, and return what opens the store of some weights, by their hash.

    Raises ValueError for a database that cannot be reached or used, without the password of the URL.
    """
    engine = connect(url, namespace)
    try:
        prepare_schema(engine, namespace)
    finally:
        engine.dispose()
    replica = uuid.uuid4().hex

    def open_store(weights_hash: str) -> PostgresStore:
        store = PostgresStore(connect(url, namespace), namespace, weights_hash, replica, lease_s, address)
        try:
            store.read_clock()
        except StorageFailed as error:
            store.close()
            raise ValueError(error.detail) from None
        return store

    return open_store


def _first(rows: Sequence[Any], places: float) -> list[Any]:
    """The first, until they make up so many places: at least one, if there is any and places are asked for."""
    before = accumulate((row.places for row in rows), initial=0)
    return [row for row, passed in zip(rows, before, strict=False) if passed < places]


def _steady_us() -> int:
    return time.monotonic_ns() // 1000


class _Taken(Exception):
    """A row with this key is there already."""


def format_of(job: JobRecord) -> int:
    """The least version that can do a job.

    Those before the fourth do not know pndm and no bit depth; those before the third know no noise between two seeds.
    The first knows no webhooks, and would owe them nothing.
    """
    if job.spec.sampler == "pndm" or job.spec.bit_depth is not None:
        return 4
    if job.spec.to_seed is not None:
        return 3
    return 1 if job.webhook is None else 2


def _texts(each: Collection[str]) -> sa.ColumnElement[Any]:
    """An array, which may have more members than a statement may have parameters."""
    return sa.literal(list(each), ARRAY(sa.Text))


def _lacks_table(spec: sa.ColumnElement[str], tables: Collection[str]) -> sa.ColumnElement[bool]:
    """Whether a job's spec, as JSON text, names a checkpoint's table that is none of these hashes."""
    named = sa.func.substring(spec, '"table": ?"([^"]*)"')  # not parsed: a damaged spec must fail no claim
    return named.isnot(None) & (named != sa.all_(_texts(tables)))
