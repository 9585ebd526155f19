"""The tables in PostgreSQL, for the statements; migrations/versions makes them."""

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from tminus.service.jobs.store.records import JobRecord
from tminus.service.jobs.store.tables import Tables, make_tables

# Of what a job asks for: its fields and their values. A version that knows one more has the next number, so that none
# before it takes on what it does not know.
FORMAT = 3


def format_of(job: JobRecord) -> int:
    """The least version that can do a job.

    Those before the third know no noise between two seeds. The first knows no webhooks, and would owe them nothing.
    """
    if job.spec.to_seed is not None:
        return 3
    return 1 if job.webhook is None else 2


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


def texts(each: Collection[str]) -> sa.ColumnElement[Any]:
    """An array, which may have more members than a statement may have parameters."""
    return sa.literal(list(each), ARRAY(sa.Text))


def lacks_table(spec: sa.ColumnElement[str], tables: Collection[str]) -> sa.ColumnElement[bool]:
    """Whether a job's spec, as JSON text, names a checkpoint's table that is none of these hashes."""
    named = sa.func.substring(spec, '"table": ?"([^"]*)"')  # not parsed: a damaged spec must fail no claim
    return named.isnot(None) & (named != sa.all_(texts(tables)))
