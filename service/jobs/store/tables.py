"""The tables of a job store, in SQLAlchemy. New databases are created from these definitions.

If you change a table, increase VERSION and add an upgrade, both in sqlite_file.py and in postgres_store.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa


@dataclass(frozen=True, slots=True)
class Tables:
    """The table of jobs, and the tables that refer to jobs by id."""

    metadata: sa.MetaData
    jobs: sa.Table
    snapshots: sa.Table
    images: sa.Table
    inputs: sa.Table
    objects: sa.Table  # all of the store's objects, with or without a job
    deliveries: sa.Table  # messages to webhooks


def make_tables(
    schema: str | None, of_jobs: "Sequence[sa.schema.SchemaItem]", of_deliveries: "Sequence[sa.schema.SchemaItem]"
) -> Tables:
    """Define the tables of a store. of_jobs, of_deliveries: additional columns, constraints and indexes."""
    metadata = sa.MetaData(schema=schema)
    jobs = sa.Table(
        "jobs",
        metadata,
        sa.Column("arrival", sa.BigInteger().with_variant(sa.Integer, "sqlite"), sa.Identity(), primary_key=True),
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
        sa.Column("background", sa.Boolean, nullable=False, server_default=sa.false()),  # used only by earlier versions
        *of_jobs,
        sqlite_autoincrement=True,
        # Leases change every few seconds. With free space in its page, the new version of a row stays in that page, and
        # the indexes do not change.
        postgresql_with={"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.02"},
    )
    snapshots = sa.Table(
        "snapshots",
        metadata,
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        postgresql_with={"autovacuum_vacuum_scale_factor": "0.02"},  # each row is rewritten every few seconds
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
    deliveries = sa.Table(  # each event adds a row
        "deliveries",
        metadata,
        sa.Column("id", sa.Text, primary_key=True),  # value of the webhook-id header
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("receiver", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),  # also identifies the current attempt
        sa.Column("since_us", sa.BigInteger, nullable=False),
        sa.Column("due_us", sa.BigInteger, nullable=False),
        sa.Column("held_until_us", sa.BigInteger),  # null while no attempt is running
        sa.Column("error", sa.Text),
        sa.UniqueConstraint("job_id", "event"),
        *of_deliveries,
    )
    return Tables(metadata, jobs, snapshots, images, inputs, objects, deliveries)


def make_sqlite_tables() -> Tables:
    """Define the tables of a file. All jobs in a file have the same weights."""
    of_jobs = (
        sa.UniqueConstraint("key"),
        sa.Index("jobs_by_outcome", "outcome", "created_us", "id"),
        sa.Index("jobs_by_owner", "owner", "outcome", "created_us", "id"),
        sa.Index("jobs_by_end", "finished_us", "arrival", "bytes"),
    )
    return make_tables(
        None,
        of_jobs,
        (sa.Index("deliveries_by_due", "state", "due_us"), sa.Index("deliveries_by_receiver", "state", "receiver")),
    )


def make_postgres_tables(schema: str) -> tuple[sa.Table, Tables]:
    """Define the table of live replicas, and the tables of a store."""
    new, begun, is_open = (sa.text(f"outcome IS NULL{more}") for more in (" AND fence = 0", " AND fence > 0", ""))
    pending = sa.text("state = 'pending'")
    of_jobs = (
        sa.Column("weights", sa.Text, nullable=False),  # first 16 digits of the weights hash
        sa.Column("format", sa.Integer, nullable=False),  # lowest JOB_FORMAT of servers that can run the job
        sa.Column("places", sa.BigInteger, nullable=False),  # total cost: forward passes of one row
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("replica", sa.Text),  # current or last holder
        sa.Column("fence", sa.BigInteger, nullable=False),  # increases with each new holder
        sa.Column("lease_until", sa.DateTime(timezone=True)),  # database time; null if no replica holds the job
        sa.Column("takeovers", sa.Integer, nullable=False, server_default="0"),  # takeovers from lost replicas
        sa.Column("on_trial_at", sa.DateTime(timezone=True)),  # time of the last claim; null if not a suspect then
        sa.UniqueConstraint("weights", "key"),
        # Earlier versions need this index, because they look up a client's UUID among the jobs of all weights.
        sa.Index("jobs_by_key", "key", postgresql_where=sa.text("key IS NOT NULL")),
        sa.Index("jobs_new", "weights", "arrival", postgresql_where=new),
        sa.Index("jobs_begun", "weights", "arrival", postgresql_where=begun),
        sa.Index("jobs_by_replica", "replica", postgresql_where=is_open),
        sa.Index("jobs_by_outcome", "weights", "outcome", "created_us", "id"),
        sa.Index("jobs_by_owner", "weights", "owner", "outcome", "created_us", "id"),
        sa.Index(
            "jobs_by_end", "weights", "finished_us", "arrival", "bytes", postgresql_where=sa.text("outcome IS NOT NULL")
        ),
    )
    of_deliveries = (
        # Delete deliveries together with their job. Servers of version 1 delete only the job.
        sa.ForeignKeyConstraint(["job_id"], [f"{schema}.jobs.id"], ondelete="CASCADE"),
        sa.Index("deliveries_by_due", "due_us", postgresql_where=pending),
        sa.Index("deliveries_by_receiver", "receiver", postgresql_where=pending),
    )
    tables = make_tables(schema, of_jobs, of_deliveries)
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
        sa.Column("background_s", sa.Float, nullable=False, server_default="0"),  # used only by earlier versions
    )
    return replicas, tables
