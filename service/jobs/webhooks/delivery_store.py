"""The webhook deliveries in a job store, from the event until each is delivered or given up.

store/job_store.py has the store's other calls.
"""

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from tminus.service.jobs.store.arrays import UNREADABLE
from tminus.service.jobs.store.records import Call, JobRecord
from tminus.service.jobs.store.tables import Tables
from tminus.service.jobs.webhooks.webhook import EVENTS, Event, Webhook

Run = Callable[..., Any]  # runs a statement in a transaction
Conditions = Sequence[sa.ColumnElement[bool]]
DELIVERY_S = 86_400.0  # seconds from an event to its last delivery attempt
DELIVERY_BYTES = 512  # estimated size of an event in bytes
AT_ONCE_EACH = 4  # concurrent attempts for one owner's jobs to one receiver
DeliveryState = Literal["pending", "delivered", "given_up"]
Whose = tuple[str, str]  # (owner, receiver)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event of a job, to be delivered to the job's receiver."""

    id: str  # value of the header webhook-id, the same in every attempt
    job_id: str
    event: Event
    receiver: str  # scheme, host and port
    state: DeliveryState
    attempts: int  # number of attempts begun; `settle` rejects the results of earlier attempts
    since_us: int  # time of the event on the store's clock
    error: str | None = None  # reason for the last failure
    owner: str = ""  # owner of the job; set by a claim

    @property
    def whose(self) -> Whose:
        """The owner and the receiver. If a receiver fails for one owner, other owners are not affected."""
        return self.owner, self.receiver


@dataclass(frozen=True, slots=True)
class Room:
    """Limits of a claim: the number of deliveries, and the owners and receivers to skip."""

    most: int  # maximum number of deliveries
    most_failing: int  # maximum number of deliveries to receivers whose last attempt failed
    each: int = AT_ONCE_EACH  # maximum number of deliveries for each owner and receiver
    busy: frozenset[Whose] = frozenset()  # (owner, receiver) pairs to skip
    failing: frozenset[Whose] = frozenset()  # pairs whose last attempt failed, in addition to deliveries with an error
    full: frozenset[str] = frozenset()  # owners to skip
    full_of_failing: frozenset[str] = frozenset()  # owners whose failing receivers are skipped


class DeliveryStore(ABC):
    """Base class of JobStore that has the calls for deliveries."""

    def __init__(self, tables: Tables) -> None:
        self._tables, self._jobs, self._deliveries = tables, tables.jobs, tables.deliveries

    @abstractmethod
    def now_us(self) -> int:
        """Return the Unix time in microseconds on the store's clock, which all replicas share."""

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[Run]:
        """Run statements in one transaction. If one fails, undo the transaction and raise StorageFailed."""

    def _now(self) -> sa.ColumnElement[int]:
        """Return the store's time as an SQL expression. A shared store uses the database's clock."""
        return sa.literal(self.now_us(), sa.BigInteger)

    def _here(self) -> Conditions:
        """Return the conditions for this store's jobs. A table may contain the jobs of several stores."""
        return ()

    def _understood(self) -> Conditions:
        """Return the conditions that exclude jobs made by a newer version of tminus."""
        return ()

    def _held(self, job_ids: Collection[str]) -> Conditions:
        """Return the conditions for unfinished jobs that no other replica has taken over."""
        return [self._jobs.c.id.in_(job_ids), self._jobs.c.outcome.is_(None)]

    def _let_go(self, job_id: str) -> None:  # noqa: B027
        """Forget a held job that has ended or was lost."""

    @Call(writes=True, owes=True)
    def started(self, job: JobRecord) -> None:
        """Add the event "start" if the webhook wants it and the job is held and unfinished."""
        held = sa.select(self._jobs.c.id).where(*self._held([job.id]))
        with self._transaction() as run:
            if run(held.with_for_update()).first():
                self._owe(run, job.id, job.webhook, ["start"])

    def claim_deliveries(self, room: Room, held_s: float) -> list[Delivery]:
        """Claim due deliveries, and count an attempt for each.

        No other server can claim them for `held_s` seconds. Owners take turns, and so do the receivers of each owner.
        Jobs made by a newer version are skipped.
        """
        table, jobs, now = self._deliveries, self._jobs, self._now()
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
        found = (
            sa.select(*columns)
            .join(jobs, jobs.c.id == table.c.job_id)
            .where(*due, *self._here(), *self._understood(), *wanted)
            .subquery()
        )
        by_number = (found.c.number, found.c.due_us, found.c.id)
        turn = sa.func.row_number().over(partition_by=(found.c.owner, found.c.failing), order_by=by_number)
        in_turn = sa.select(*found.c, turn.label("turn")).where(found.c.number <= room.each).subquery()
        by_turn = (in_turn.c.turn, in_turn.c.due_us, in_turn.c.id)
        place = sa.func.row_number().over(partition_by=in_turn.c.failing, order_by=by_turn)
        ranked = sa.select(in_turn.c.id, in_turn.c.owner, in_turn.c.turn, in_turn.c.failing, place.label("place"))
        first = ranked.subquery()
        query = sa.select(table, first.c.owner).join(first, first.c.id == table.c.id)
        # `place` limits only the deliveries to failing receivers. LIMIT bounds all deliveries. Unlike `place`, LIMIT
        # does not count rows that another server has locked.
        within = sa.or_(~first.c.failing, first.c.place <= room.most_failing)
        query = query.where(within, *due).order_by(first.c.turn, table.c.due_us, table.c.id)
        with self._transaction() as run:
            rows = run(query.limit(room.most).with_for_update(skip_locked=True, of=table)).all()
            if rows:
                holding = {"attempts": table.c.attempts + 1, "held_until_us": now + round(held_s * 1e6)}
                run(sa.update(table).where(table.c.id.in_([row.id for row in rows])).values(**holding))
        return [_delivery(row, row.attempts + 1, row.owner) for row in rows]

    @Call(writes=True)
    def settle(self, delivery: Delivery, again_in_s: float = 0.0, *, counts: bool = True) -> bool:
        """Store the result of an attempt. Return False if another server has the delivery, or the job is gone.

        again_in_s: seconds until the next attempt of a pending delivery. counts: False if nothing was attempted.
        """
        table = self._deliveries
        held = [table.c.id == delivery.id, table.c.attempts == delivery.attempts, table.c.state == "pending"]
        held.append(table.c.held_until_us.is_not(None))  # `attempts` may repeat, because counts=False lowers it
        due_us = self._now() + round(again_in_s * 1e6)
        ending = {"state": delivery.state, "error": delivery.error, "due_us": due_us, "held_until_us": None}
        ending["attempts"] = table.c.attempts - (0 if counts else 1)
        with self._transaction() as run:
            return int(run(sa.update(table).where(*held).values(**ending)).rowcount) > 0

    @Call("reads")
    def number_owed(self, owner: str, receiver: str, most: int) -> int:
        """Count the pending deliveries of an owner's jobs to a receiver, up to `most`."""
        table, jobs = self._deliveries, self._jobs
        pending = sa.select(table.c.id).join(jobs, jobs.c.id == table.c.job_id).where(jobs.c.owner == owner)
        pending = pending.where(table.c.state == "pending", table.c.receiver == receiver).limit(most)
        with self._transaction() as run:
            return int(run(sa.select(sa.func.count()).select_from(pending.subquery())).scalar_one())

    @Call("reads")
    def deliveries(self, job_ids: Collection[str]) -> dict[str, list[Delivery]]:
        """Return all deliveries of these jobs, keyed by job id, in the order of EVENTS."""
        found = dict[str, list[Delivery]]()
        with self._transaction() as run:
            for row in run(sa.select(self._deliveries).where(self._deliveries.c.job_id.in_([*job_ids]))).all():
                found.setdefault(row.job_id, []).append(_delivery(row, row.attempts))
        return {job_id: sorted(each, key=lambda one: EVENTS.index(one.event)) for job_id, each in found.items()}

    # --- called in transactions of other store calls ---

    def _owe(self, run: Run, job_id: str, webhook: Webhook | None, events: Collection[Event]) -> None:
        """Add a delivery for each event that the webhook wants and that has no delivery yet."""
        table = self._deliveries
        if webhook is None or not (wanted := [event for event in events if event in webhook.events]):
            return
        noted = {*run(sa.select(table.c.event).where(table.c.job_id == job_id)).scalars()}
        for number, event in enumerate(wanted):
            if event not in noted:
                told = {"id": f"{event}_{uuid.uuid4().hex}", "job_id": job_id, "event": event}
                to_whom = {"receiver": webhook.receiver, "state": "pending", "attempts": 0}
                run(sa.insert(table).values(**told, **to_whom, since_us=self._now(), due_us=self._now() + number))

    def _is_owed(self, after_us: int) -> sa.ColumnElement[bool]:
        """Return the condition for jobs that have a pending delivery of an event after this time."""
        table, jobs = self._deliveries, self._jobs
        pending = sa.select(table.c.id).where(table.c.job_id == jobs.c.id, table.c.state == "pending")
        return sa.and_(jobs.c.webhook.is_not(None), pending.where(table.c.since_us > after_us).exists())


def _delivery(row: Any, attempts: int, owner: str = "") -> Delivery:
    fields: Mapping[str, Any] = {name: getattr(row, name, None) for name in Delivery.__dataclass_fields__}
    return Delivery(**{**fields, "attempts": attempts, "owner": owner})


def webhook_of(row: Any, *, damaged: bool = False) -> Webhook | None:
    """Return the webhook in a job's row, or None. damaged: if the webhook is unreadable, return None."""
    try:
        return Webhook.from_json(json.loads(row.webhook)) if row.webhook is not None else None
    except UNREADABLE:
        if damaged:
            return None
        raise


def kept_bytes(webhook: Webhook | None) -> int:
    """Estimate how many bytes a webhook and its events take in the store."""
    return len(webhook.url) + DELIVERY_BYTES * len(webhook.events) if webhook is not None else 0
