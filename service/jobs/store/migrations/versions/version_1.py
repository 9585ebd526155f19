"""Jobs, what belongs to them, and the replicas that live."""

import sqlalchemy as sa
from alembic import context, op

revision = "1"
down_revision = None


def upgrade() -> None:
    """Make the tables of version 1."""
    schema = context.config.attributes["schema"]
    op.create_table(
        "jobs",
        sa.Column("arrival", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("weights", sa.Text, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("format", sa.Integer, nullable=False),
        sa.Column("places", sa.BigInteger, nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
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
        sa.Column("replica", sa.Text),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("weights", "key"),
        schema=schema,
        # Leases change every few seconds. With room in its page a row's new version needs no entry in the indices.
        postgresql_with={"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.02"},
    )
    for name, columns, where in (
        ("jobs_new", ["weights", "arrival"], sa.text("outcome IS NULL AND fence = 0")),
        ("jobs_begun", ["weights", "arrival"], sa.text("outcome IS NULL AND fence > 0")),
        ("jobs_by_replica", ["replica"], sa.text("outcome IS NULL")),
        ("jobs_by_outcome", ["weights", "outcome", "created_us", "id"], None),
        ("jobs_by_owner", ["weights", "owner", "outcome", "created_us", "id"], None),
        ("jobs_by_end", ["weights", "finished_us", "arrival", "bytes"], sa.text("outcome IS NOT NULL")),
    ):
        op.create_index(name, "jobs", columns, schema=schema, postgresql_where=where)
    op.create_table(
        "snapshots",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        schema=schema,
        postgresql_with={"autovacuum_vacuum_scale_factor": "0.02"},  # each is written anew every few seconds
    )
    for name in ("images", "inputs"):
        op.create_table(
            name,
            sa.Column("job_id", sa.Text, primary_key=True),
            sa.Column("data", sa.LargeBinary, nullable=False),
            schema=schema,
        )
    op.create_table(
        "objects",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("since_us", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        schema=schema,
    )
    op.create_index("objects_by_job", "objects", ["job_id"], schema=schema)
    op.create_index("objects_by_state", "objects", ["state", "since_us"], schema=schema)
    op.create_table(
        "replicas",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("weights", sa.Text, primary_key=True),
        sa.Column("fingerprint", sa.Text, primary_key=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("address", sa.Text),
        sa.Column("places_per_s", sa.Float, nullable=False),
        sa.Column("backlog_s", sa.Float, nullable=False),
        schema=schema,
    )
