"""Webhooks: who is told of a job, and what is owed to them; UUIDs that clients choose.

Servers of the version before go on beside it.
"""

import sqlalchemy as sa
from alembic import context, op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    """Bring the tables of version 1 to version 2."""
    schema = context.config.attributes["schema"]
    op.add_column("jobs", sa.Column("webhook", sa.Text), schema=schema)
    # A UUID that a client has chosen is one job among those of all weights.
    op.create_index("jobs_by_key", "jobs", ["key"], schema=schema, postgresql_where=sa.text("key IS NOT NULL"))
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Text, primary_key=True),
        # A server of version 1 deletes jobs, and knows nothing of this table.
        sa.Column("job_id", sa.Text, sa.ForeignKey(f"{schema}.jobs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("receiver", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("since_us", sa.BigInteger, nullable=False),
        sa.Column("due_us", sa.BigInteger, nullable=False),
        sa.Column("held_until_us", sa.BigInteger),
        sa.Column("error", sa.Text),
        sa.UniqueConstraint("job_id", "event"),
        schema=schema,
    )
    pending = sa.text("state = 'pending'")
    op.create_index("deliveries_by_due", "deliveries", ["due_us"], schema=schema, postgresql_where=pending)
    op.create_index("deliveries_by_receiver", "deliveries", ["receiver"], schema=schema, postgresql_where=pending)
