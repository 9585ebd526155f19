"""Durable jobs in PostgreSQL, shared by any number of replicas (servers on the same store).

Has the connections with their timeouts, the tables, and the store. shared_store.py decides which replica holds which
job.
"""

import logging
import math
import socket
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import sqlalchemy as sa

from tminus.service.errors import NewerJob, StorageFailed
from tminus.service.jobs.store.records import JobRecord, now_us
from tminus.service.jobs.store.shared_store import SharedStore
from tminus.service.jobs.store.tables import make_postgres_tables
from tminus.service.jobs.webhooks.delivery_store import Conditions, Run

log = logging.getLogger(__name__)

STATEMENT_S = 10.0  # timeout of a statement; short, so that leases are renewed in time
CONNECT_S = 5
VERSION = 4  # version of the tables in tables.py
# Statements that upgrade the tables from each version to the next. Servers of the earlier version keep working.
UPGRADES: Mapping[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE jobs ADD COLUMN webhook TEXT",
        "CREATE INDEX jobs_by_key ON jobs (key) WHERE key IS NOT NULL",
        "CREATE TABLE deliveries (id TEXT PRIMARY KEY, job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, "
        "event TEXT NOT NULL, receiver TEXT NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL, "
        "since_us BIGINT NOT NULL, due_us BIGINT NOT NULL, held_until_us BIGINT, error TEXT, UNIQUE (job_id, event))",
        "CREATE INDEX deliveries_by_due ON deliveries (due_us) WHERE state = 'pending'",
        "CREATE INDEX deliveries_by_receiver ON deliveries (receiver) WHERE state = 'pending'",
    ),
    2: (
        "ALTER TABLE jobs ADD COLUMN background BOOLEAN DEFAULT false NOT NULL",
        "ALTER TABLE replicas ADD COLUMN background_s DOUBLE PRECISION DEFAULT 0 NOT NULL",
    ),
    3: (
        "ALTER TABLE jobs ADD COLUMN takeovers INTEGER DEFAULT 0 NOT NULL",
        "ALTER TABLE jobs ADD COLUMN on_trial_at TIMESTAMP WITH TIME ZONE",
    ),
}


def connect(url: str, namespace: str) -> sa.Engine:
    """Create an engine for a PostgreSQL database, without connecting. Raises ValueError for any other URL.

    Parameters in the URL override the defaults of this function; `options` in the URL are added to them.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise ValueError("it is no URL, as postgresql://user@host/database is") from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError(f"it must begin with postgresql://, not with {parsed.drivername}://")
    limit_ms = round(1000 * STATEMENT_S)
    # Set these timeouts in the database too. Otherwise, if the connection is lost, or this server is stopped inside a
    # transaction, the database would keep the connection and its locks on jobs for two hours. No replica could claim
    # these jobs.
    of_the_database = {
        "statement_timeout": limit_ms,
        "lock_timeout": limit_ms,
        "idle_in_transaction_session_timeout": limit_ms,
        "tcp_keepalives_idle": 5,
        "tcp_keepalives_interval": 2,
        "tcp_keepalives_count": 3,
        "tcp_user_timeout": limit_ms,
    }
    own_options = " ".join(f"-c {name}={value}" for name, value in of_the_database.items())
    arguments = {
        "connect_timeout": CONNECT_S,
        "application_name": f"tminus {namespace}",
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": limit_ms,
        "options": own_options,
        "prepare_threshold": None,  # no prepared statements, because a proxy may change connections after a transaction
    }
    arguments = {name: value for name, value in arguments.items() if name not in parsed.query}
    if "options" in parsed.query:  # an option's last value wins
        arguments["options"] = " ".join([own_options, *parsed.normalized_query["options"]])
    return sa.create_engine(
        parsed.set(drivername="postgresql+psycopg"), connect_args=arguments,
        pool_size=3, max_overflow=0, pool_timeout=5, pool_pre_ping=True,
    )  # fmt: skip


def prepare_schema(engine: sa.Engine, namespace: str) -> None:
    """Create or upgrade the tables in one transaction. Replicas that start together wait for each other.

    namespace: a schema of the database, so that several clusters can share one database. Raises ValueError if the
    database cannot be reached or used, or its tables have a newer version.
    """
    # Earlier releases used Alembic, so the version is stored in Alembic's table.
    versions = sa.table("alembic_version", sa.column("version_num"), schema=namespace)
    try:
        with engine.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"tminus {namespace}"))))
            if not sa.inspect(connection).has_schema(namespace):
                connection.execute(sa.schema.CreateSchema(namespace))
            connection.execute(
                sa.select(sa.func.set_config("search_path", f'"{namespace}"', True))
            )  # applies only to this transaction
            if not sa.inspect(connection).has_table("alembic_version", schema=namespace):
                made = "version_num VARCHAR(32) CONSTRAINT alembic_version_pkc PRIMARY KEY"
                connection.execute(sa.text(f"CREATE TABLE alembic_version ({made})"))
                make_postgres_tables(namespace)[1].metadata.create_all(connection)
                connection.execute(sa.insert(versions).values(version_num=str(VERSION)))
            version: str = connection.execute(sa.select(versions.c.version_num)).scalar_one()
            if version not in map(str, (VERSION, *UPGRADES)):
                raise ValueError(
                    f"its tables are of version {version}, and this tminus knows version {VERSION}; "
                    "nothing was changed. Serve it with the tminus that made them, or name another --job-namespace"
                )
            for earlier in range(int(version), VERSION):
                for statement in UPGRADES[earlier]:
                    connection.execute(sa.text(statement))
                connection.execute(sa.update(versions).values(version_num=str(earlier + 1)))
                log.info("the job store's tables are of version %d now", earlier + 1)
    except sa.exc.SQLAlchemyError as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise ValueError(f"it cannot be used: {reason}") from None


def own_address(url: str, host: str, port: int) -> str | None:
    """Return the URL at which other replicas can reach this server, or None if it is unknown.

    If the server listens on all addresses, the URL has the local address of the route to the database. If the server
    listens only on loopback, only replicas on the same machine can reach it, so the URL is known only if the database
    is on that machine too.
    """
    try:
        towards = _towards(sa.make_url(url).host or "localhost")
        if ip_address(host).is_unspecified:
            host = towards
    except (OSError, ValueError, sa.exc.ArgumentError):
        return None
    if ip_address(host).is_loopback and not ip_address(towards).is_loopback:
        return None
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _towards(host: str) -> str:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # UDP, so no packet is sent
        return str(probe.getsockname()[0])


GONE = timedelta(hours=1)  # time from the end of a replica's lease until its row is deleted
# Format of a job's request. For a new sampler or a new field of the spec, increase it and extend `format_of`. Servers
# leave jobs in a higher format to newer servers.
JOB_FORMAT = 4


class PostgresStore(SharedStore):
    """A replica's access to the jobs of one set of weights. Owns its engine."""

    def __init__(
        self,
        engine: sa.Engine,
        namespace: str,
        weights_hash: str,
        replica: str,
        lease_s: float,
        address: str | None = None,
    ) -> None:
        """engine: for a database that `prepare_schema` has upgraded."""
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
        """Do as JobStore.sweep does. While one replica sweeps, this call does nothing in the other replicas.

        Also deletes old jobs whose weights no replica serves. Those jobs are deleted for their age only.
        """
        jobs, replicas = self._tables.jobs, self._replicas
        with self._transaction() as run:
            if not self._may_sweep(run, self._weights):
                return False
            run(sa.delete(replicas).where(replicas.c.lease_until < sa.func.clock_timestamp() - GONE))
            if self._sweep(run, before_us, max_bytes, owed_after_us):
                return True
            # A replica that ended within the last hour may be restarting, so its weights still count as served.
            unserved = jobs.c.weights.not_in(sa.select(replicas.c.weights))
            ended = jobs.c.outcome.is_not(None)  # matches the partial index jobs_by_end
            old = [jobs.c.finished_us < before_us, ~self._is_owed(owed_after_us)]
            weights = run(sa.select(jobs.c.weights).where(ended, *old, unserved).limit(1)).scalar_one_or_none()
            if weights is None or not self._may_sweep(run, weights):
                return False
            return self._sweep(run, before_us, math.inf, owed_after_us, [jobs.c.weights == weights]) > 0

    def _may_sweep(self, run: Run, weights: str) -> bool:
        """Lock the sweep of these weights until the transaction ends. Return False if another replica has the lock."""
        key = sa.func.hashtext(f"tminus sweep {self._schema} {weights}")
        return bool(run(sa.select(sa.func.pg_try_advisory_xact_lock(key))).scalar_one())

    def check(self, *, write: bool) -> None:
        with self._transaction() as run:
            if write:  # changes no row, but fails if the database is read-only
                run(sa.update(self._replicas).where(sa.false()).values(fingerprint=""))
            else:
                run(sa.select(1))

    def close(self) -> None:
        """Release all jobs. If the database does not answer, the jobs become free when their leases expire."""
        jobs = self._tables.jobs
        try:
            with suppress(StorageFailed), self._transaction() as run:
                run(sa.update(jobs).where(*self._mine()).values(replica=None, lease_until=None))
                # Keep the replica's row, so that the next sweep knows that these weights were served until now.
                mine = [self._replicas.c.id == self._replica, *self._its_weights()]
                run(sa.update(self._replicas).where(*mine).values(lease_until=sa.func.clock_timestamp()))
        finally:
            self._engine.dispose()

    # --- called by JobStore ---

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
    """Upgrade the database, and return a function that opens the store for a weights hash.

    Raises ValueError if the database cannot be reached or used. The message omits the URL's password.
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
    """Return the lowest format that can express a job's request.

    Format 2 added webhooks, format 3 noise between two seeds, and format 4 the sampler pndm and bit depths.
    """
    if job.spec.sampler == "pndm" or job.spec.bit_depth is not None:
        return 4
    if job.spec.to_seed is not None:
        return 3
    return 1 if job.webhook is None else 2
