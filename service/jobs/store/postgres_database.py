"""A PostgreSQL database for the job store: connections bounded in time, and its tables brought to this version."""

import logging
import socket
from collections.abc import Mapping
from ipaddress import ip_address

import sqlalchemy as sa

from tminus.service.jobs.store.tables import make_postgres_tables

log = logging.getLogger(__name__)

STATEMENT_S = 10.0  # a statement that takes longer is given up, so that a lease can be renewed in time
CONNECT_S = 5
VERSION = 4  # of tables.py
# From each earlier version to the next. Servers of the version before go on working.
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
    """An engine for a database, and no connection yet. What the URL sets holds, and our options hold beside its own.

    Raises ValueError for what is no URL of PostgreSQL.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise ValueError("it is no URL, as postgresql://user@host/database is") from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError(f"it must begin with postgresql://, not with {parsed.drivername}://")
    limit_ms = round(1000 * STATEMENT_S)
    # The database has these too, or it would keep for two hours what a server held as its packets were lost, or as it
    # was stopped in a transaction: connections, and locks on jobs, which no other could claim.
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
        "prepare_threshold": None,  # a proxy that pools by transaction gives each one another connection
    }
    arguments = {name: value for name, value in arguments.items() if name not in parsed.query}
    if "options" in parsed.query:  # of two values the later one holds
        arguments["options"] = " ".join([own_options, *parsed.normalized_query["options"]])
    return sa.create_engine(
        parsed.set(drivername="postgresql+psycopg"), connect_args=arguments,
        pool_size=3, max_overflow=0, pool_timeout=5, pool_pre_ping=True,
    )  # fmt: skip


def prepare_schema(engine: sa.Engine, namespace: str) -> None:
    """Bring a namespace to this version, in one transaction; several replicas that start at once wait for each other.

    namespace: a schema of the database, so that several clusters can share it. Raises ValueError where the database
    cannot be reached or used, or is of a newer version.
    """
    # Alembic made the tables of earlier releases and kept their version in this table.
    versions = sa.table("alembic_version", sa.column("version_num"), schema=namespace)
    try:
        with engine.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"tminus {namespace}"))))
            if not sa.inspect(connection).has_schema(namespace):
                connection.execute(sa.schema.CreateSchema(namespace))
            connection.execute(
                sa.select(sa.func.set_config("search_path", f'"{namespace}"', True))
            )  # in this transaction
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
    """The URL by which other replicas reach a server that listens here; None where that cannot be found out.

    One that listens on every address is reached by the one that its packets to the database have; one that listens on
    this machine only, by replicas beside it, if the database is there too.
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
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])
