"""The tables of a job store, as SQLAlchemy knows them.

SQLite's are made from these; a change of them needs another VERSION, in sqlite_file.py.
PostgreSQL's are made by migrations/versions.
"""

from dataclasses import dataclass

import sqlalchemy as sa


@dataclass(frozen=True, slots=True)
class Tables:
    """Jobs, and what belongs to them: rows of the other tables have a job's id."""

    metadata: sa.MetaData
    jobs: sa.Table
    snapshots: sa.Table
    images: sa.Table
    inputs: sa.Table
    objects: sa.Table  # every object of ours, whether or not a job refers to it
    deliveries: sa.Table  # what webhooks are told


def make_tables(schema: str | None = None, *more: "sa.schema.SchemaItem") -> Tables:
    """The tables of a store. more: what its jobs have beside the common columns."""
    metadata = sa.MetaData(schema=schema)
    jobs = sa.Table(
        "jobs",
        metadata,
        sa.Column("arrival", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("deadline_us", sa.BigInteger),
        sa.Column("outcome", sa.Text),
        sa.Column("finished_us", sa.BigInteger),
        sa.Column("fingerprint", sa.Text),
        sa.Column("problem", sa.Text),
        sa.Column("owner", sa.Text, nullable=False, server_default=""),
        sa.Column("crashes", sa.Integer, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("key", sa.Text),
        sa.Column("request_hash", sa.Text),
        sa.Column("webhook", sa.Text),
        *more,
        sqlite_autoincrement=True,
    )
    snapshots = sa.Table(
        "snapshots",
        metadata,
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    images, inputs = (
        sa.Table(
            name,
            metadata,
            sa.Column("job_id", sa.Text, primary_key=True),
            sa.Column("data", sa.LargeBinary, nullable=False),
        )
        for name in ("images", "inputs")
    )
    objects = sa.Table(
        "objects",
        metadata,
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("since_us", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Index("objects_by_job", "job_id"),
        sa.Index("objects_by_state", "state", "since_us"),
    )
    deliveries = sa.Table(  # a row is made when its event has happened
        "deliveries",
        metadata,
        sa.Column("id", sa.Text, primary_key=True),  # webhook-id
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("receiver", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),  # also the fence of who attempts it
        sa.Column("since_us", sa.BigInteger, nullable=False),
        sa.Column("due_us", sa.BigInteger, nullable=False),
        sa.Column("held_until_us", sa.BigInteger),  # null: nobody attempts it now
        sa.Column("error", sa.Text),
        sa.UniqueConstraint("job_id", "event"),
        sa.Index("deliveries_by_due", "state", "due_us"),
        sa.Index("deliveries_by_receiver", "state", "receiver"),
    )
    return Tables(metadata, jobs, snapshots, images, inputs, objects, deliveries)


def make_postgres_tables(schema: str) -> tuple[sa.Table, Tables]:
    """The replicas that live, and the tables that both stores have."""
    tables = make_tables(
        schema,
        sa.Column("weights", sa.Text, nullable=False),  # the hash of them, as far as it is in a file's name
        sa.Column("format", sa.Integer, nullable=False),  # that who works on it must know
        sa.Column("places", sa.BigInteger, nullable=False),  # in forward passes, what it takes in all
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("replica", sa.Text),  # who holds it, or held it last
        sa.Column("fence", sa.BigInteger, nullable=False),  # how often it was held
        sa.Column("lease_until", sa.DateTime(timezone=True)),  # by the database's clock; null: nobody holds it
    )
    replicas = sa.Table(
        "replicas",
        tables.metadata,
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("weights", sa.Text, primary_key=True),
        sa.Column("fingerprint", sa.Text, primary_key=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("address", sa.Text),
        sa.Column("places_per_s", sa.Float, nullable=False),
        sa.Column("backlog_s", sa.Float, nullable=False),
    )
    return replicas, tables
