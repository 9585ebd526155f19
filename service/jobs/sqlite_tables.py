"""The tables of the job store. A change of them needs another VERSION, in sqlite_file.py."""

import sqlalchemy as sa

metadata = sa.MetaData()
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("arrival", sa.Integer, primary_key=True),
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
    sa.Column("key", sa.Text, unique=True),
    sa.Column("request_hash", sa.Text),
    sa.Index("jobs_by_outcome", "outcome", "created_us", "id"),
    sa.Index("jobs_by_owner", "owner", "outcome", "created_us", "id"),
    sa.Index("jobs_by_end", "finished_us", "arrival", "bytes"),
    sqlite_autoincrement=True,
)
snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
images_of = sa.Table(
    "images",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
inputs_of = sa.Table(
    "inputs",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
