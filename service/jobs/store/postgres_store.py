"""Durable jobs in PostgreSQL, shared by any number of replicas. Which of them has which job: see shared_store.py."""

import math
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from tminus.service.errors import NewerJob, StorageFailed
from tminus.service.jobs.store.postgres_database import connect, prepare_schema
from tminus.service.jobs.store.records import JobRecord, now_us
from tminus.service.jobs.store.shared_store import SharedStore
from tminus.service.jobs.webhooks.delivery_store import Conditions, Run

GONE = timedelta(hours=1)  # since its lease ended: a replica that long gone is forgotten, with what it served
# The format of what jobs ask for. Raise it for a new sampler or field of the spec, with a line in `format_of`: a server
# leaves jobs of a higher format to newer servers.
JOB_FORMAT = 4


class PostgresStore(SharedStore):
    """The jobs of one set of weights, as one replica has them. Owns its engine."""

    def __init__(
        self,
        engine: sa.Engine,
        namespace: str,
        weights_hash: str,
        replica: str,
        lease_s: float,
        address: str | None = None,
    ) -> None:
        """engine: of a database whose tables are of this version, see postgres_database.py."""
        super().__init__(namespace, weights_hash, replica, lease_s, address)
        self._engine, self._schema = engine, namespace

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

    def sweep(self, before_us: int, max_bytes: int, owed_after_us: int = 0) -> bool:
        """Sweep as JobStore says; one replica does at a time, and the others have nothing to do.

        Jobs of weights that nobody serves are deleted too, by their age and not by their size.
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
        """Free what is held at once. If the database does not answer, it is free when the lease ends."""
        jobs = self._tables.jobs
        try:
            with suppress(StorageFailed), self._transaction() as run:
                run(sa.update(jobs).where(*self._mine()).values(replica=None, lease_until=None))
                # Its row stays for a while: the next sweep sees that these weights were served until now.
                mine = [self._replicas.c.id == self._replica, *self._its_weights()]
                run(sa.update(self._replicas).where(*mine).values(lease_until=sa.func.clock_timestamp()))
        finally:
            self._engine.dispose()

    # --- what a JobStore asks ---

    def _understood(self) -> Conditions:
        return [self._tables.jobs.c.format <= JOB_FORMAT]

    def _record(self, row: Any) -> JobRecord:
        if row.format > JOB_FORMAT:
            raise NewerJob(
                f"job {row.id} was accepted by a newer server, and asks for something that this one does not know"
            )
        return replace(super()._record(row), ahead_us=self.now_us() - now_us())

    def _added(self, job: JobRecord, held: bool) -> dict[str, Any]:
        places = job.spec.n * job.spec.num_passes * (2 if job.spec.guidance != 1 else 1)
        asks = {"weights": self._weights, "format": format_of(job), "places": places, "rows": job.spec.n}
        return asks | self._lease_of_new(job.id, held)


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


def format_of(job: JobRecord) -> int:
    """The lowest format that has all that a job asks for.

    Format 4 added pndm and bit depths; 3 noise between two seeds; 2 webhooks.
    """
    if job.spec.sampler == "pndm" or job.spec.bit_depth is not None:
        return 4
    if job.spec.to_seed is not None:
        return 3
    return 1 if job.webhook is None else 2
