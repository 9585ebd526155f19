"""Which jobs a replica sweeps, of those that share a database. Each call runs in a transaction of the caller's."""

from collections.abc import Sequence
from datetime import timedelta

import sqlalchemy as sa

from tminus.service.jobs.webhooks.delivery_store import Run

GONE = timedelta(hours=1)  # since its lease ended: a replica that long gone is forgotten, with what it served


def may_sweep(run: Run, schema: str, weights: str) -> bool:
    """Whether these weights are this caller's to sweep until its transaction ends: one replica does it at a time."""
    key = sa.func.hashtext(f"tminus sweep {schema} {weights}")
    return bool(run(sa.select(sa.func.pg_try_advisory_xact_lock(key))).scalar_one())


def forget_gone(run: Run, replicas: sa.Table) -> None:
    """Forget the replicas that are long gone."""
    run(sa.delete(replicas).where(replicas.c.lease_until < sa.func.clock_timestamp() - GONE))


def unserved_weights(run: Run, jobs: sa.Table, replicas: sa.Table, old: Sequence[sa.ColumnElement[bool]]) -> str | None:
    """Some weights that have jobs that are too old, and no replica of their own that would sweep them.

    Not those of a replica that went within the last hour, which may be starting again.
    """
    served = sa.select(replicas.c.weights)
    ended = jobs.c.outcome.is_not(None)  # in the words of the index
    query = sa.select(jobs.c.weights).where(ended, *old, jobs.c.weights.not_in(served)).limit(1)
    weights: str | None = run(query).scalar_one_or_none()
    return weights
