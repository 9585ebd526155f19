"""The table of deliveries: what is owed of jobs' webhooks, from the transaction in which an event happens until it is
delivered or given up. Each call runs in a transaction of the caller's.
"""

import json
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from tminus.service.jobs.store.arrays import UNREADABLE
from tminus.service.jobs.webhooks.webhook import EVENTS, Delivery, Event, Room, Webhook

Run = Callable[..., Any]
DELIVERY_BYTES = 512  # roughly what an event takes


def make_deliveries(metadata: sa.MetaData) -> sa.Table:
    """The table. A row is made when its event has happened."""
    return sa.Table(
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


class DeliveryRows:
    """What is done with the table. `now` is the store's clock, as an expression of the database."""

    def __init__(self, table: sa.Table, jobs: sa.Table, now: Callable[[], sa.ColumnElement[int]]) -> None:
        self._table, self._jobs, self._now = table, jobs, now

    def owe(self, run: Run, job_id: str, webhook: Webhook | None, events: Collection[Event]) -> None:
        """These events have happened; those that are wanted, and not noted yet, are owed."""
        table = self._table
        if webhook is None or not (wanted := [event for event in events if event in webhook.events]):
            return
        noted = {*run(sa.select(table.c.event).where(table.c.job_id == job_id)).scalars()}
        for number, event in enumerate(wanted):
            if event not in noted:
                told = {"id": f"{event}_{uuid.uuid4().hex}", "job_id": job_id, "event": event}
                to_whom = {"receiver": webhook.receiver, "state": "pending", "attempts": 0}
                run(sa.insert(table).values(**told, **to_whom, since_us=self._now(), due_us=self._now() + number))

    def claim(self, run: Run, here: Sequence[sa.ColumnElement[bool]], room: Room, held_s: float) -> list[Delivery]:
        """Hold some of those that are due, for so long: of each owner, and of its receivers, one after the other."""
        table, jobs, now = self._table, self._jobs, self._now()
        whose = sa.tuple_(jobs.c.owner, table.c.receiver)
        due = [
            table.c.state == "pending",
            table.c.due_us <= now,
            sa.or_(table.c.held_until_us.is_(None), table.c.held_until_us < now),
        ]
        failing: sa.ColumnElement[bool] = table.c.error.is_not(None)
        if room.failing:
            failing = sa.or_(failing, whose.in_([*room.failing]))
        wanted = [jobs.c.owner.not_in([*room.full]), ~sa.and_(failing, jobs.c.owner.in_([*room.full_of_failing]))]
        if room.busy:
            wanted.append(whose.not_in([*room.busy]))
        number = sa.func.row_number().over(
            partition_by=(jobs.c.owner, table.c.receiver), order_by=(table.c.due_us, table.c.id)
        )
        columns = (table.c.id, table.c.due_us, jobs.c.owner, failing.label("failing"), number.label("number"))
        found = sa.select(*columns).join(jobs, jobs.c.id == table.c.job_id).where(*due, *here, *wanted).subquery()
        by_number = (found.c.number, found.c.due_us, found.c.id)
        turn = sa.func.row_number().over(partition_by=(found.c.owner, found.c.failing), order_by=by_number)
        in_turn = sa.select(*found.c, turn.label("turn")).where(found.c.number <= room.each).subquery()
        by_turn = (in_turn.c.turn, in_turn.c.due_us, in_turn.c.id)
        place = sa.func.row_number().over(partition_by=in_turn.c.failing, order_by=by_turn)
        ranked = sa.select(in_turn.c.id, in_turn.c.owner, in_turn.c.turn, in_turn.c.failing, place.label("place"))
        first = ranked.subquery()
        query = sa.select(table, first.c.owner).join(first, first.c.id == table.c.id)
        # The others by LIMIT alone, which goes on behind rows that another server has locked.
        within = sa.or_(~first.c.failing, first.c.place <= room.most_failing)
        query = query.where(within, *due).order_by(first.c.turn, table.c.due_us, table.c.id)
        rows = run(query.limit(room.most).with_for_update(skip_locked=True, of=table)).all()
        if rows:
            holding = {"attempts": table.c.attempts + 1, "held_until_us": now + round(held_s * 1e6)}
            run(sa.update(table).where(table.c.id.in_([row.id for row in rows])).values(**holding))
        return [_delivery(row, row.attempts + 1, row.owner) for row in rows]

    def settle(self, run: Run, delivery: Delivery, again_in_s: float, *, counts: bool) -> bool:
        """Keep how an attempt ended; False if it is another's by now, or gone."""
        table = self._table
        held = [table.c.id == delivery.id, table.c.attempts == delivery.attempts, table.c.state == "pending"]
        held.append(table.c.held_until_us.is_not(None))  # one that did not count has given its number back
        due_us = self._now() + round(again_in_s * 1e6)
        ending = {"state": delivery.state, "error": delivery.error, "due_us": due_us, "held_until_us": None}
        ending["attempts"] = table.c.attempts - (0 if counts else 1)
        return int(run(sa.update(table).where(*held).values(**ending)).rowcount) > 0

    def of(self, run: Run, job_ids: Collection[str]) -> dict[str, list[Delivery]]:
        """Those of jobs, in the order of their events."""
        table, found = self._table, dict[str, list[Delivery]]()
        for row in run(sa.select(table).where(table.c.job_id.in_([*job_ids]))).all():
            found.setdefault(row.job_id, []).append(_delivery(row, row.attempts))
        return {job_id: sorted(each, key=lambda one: EVENTS.index(one.event)) for job_id, each in found.items()}

    def number_of(self, run: Run, owner: str, receiver: str, most: int) -> int:
        """How many are pending of an owner's jobs to a receiver, counted up to a number."""
        table, jobs = self._table, self._jobs
        pending = sa.select(table.c.id).join(jobs, jobs.c.id == table.c.job_id).where(jobs.c.owner == owner)
        pending = pending.where(table.c.state == "pending", table.c.receiver == receiver).limit(most)
        return int(run(sa.select(sa.func.count()).select_from(pending.subquery())).scalar_one())

    def delete(self, run: Run, job_ids: Sequence[str]) -> None:
        """Jobs are deleted: nothing is owed of them any more."""
        run(sa.delete(self._table).where(self._table.c.job_id.in_(job_ids)))

    def let_go_all(self, run: Run) -> None:
        """Nobody attempts any, as there was one process and it has ended."""
        held = self._table.c.held_until_us.is_not(None)
        run(sa.update(self._table).where(held).values(held_until_us=None))

    def is_owed(self, after_us: int) -> sa.ColumnElement[bool]:
        """Whether something of a job is still to be delivered that happened since then."""
        table, jobs = self._table, self._jobs
        pending = sa.select(table.c.id).where(table.c.job_id == jobs.c.id, table.c.state == "pending")
        return sa.and_(jobs.c.webhook.is_not(None), pending.where(table.c.since_us > after_us).exists())


def _delivery(row: Any, attempts: int, owner: str = "") -> Delivery:
    fields: Mapping[str, Any] = {name: getattr(row, name, None) for name in Delivery.__dataclass_fields__}
    return Delivery(**{**fields, "attempts": attempts, "owner": owner})


def webhook_of(row: Any, *, damaged: bool = False) -> Webhook | None:
    """That of a job's row. damaged: None for one that cannot be read."""
    try:
        return Webhook.from_json(json.loads(row.webhook)) if row.webhook is not None else None
    except UNREADABLE:
        if damaged:
            return None
        raise


def kept_bytes(webhook: Webhook | None) -> int:
    """Roughly what a webhook takes with its events."""
    return len(webhook.url) + DELIVERY_BYTES * len(webhook.events) if webhook is not None else 0
