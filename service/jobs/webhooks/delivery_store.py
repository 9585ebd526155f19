"""What both stores do about deliveries; the rest of a store is in sql_store.py."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa

from tminus.service.jobs.store.records import JobRecord
from tminus.service.jobs.webhooks.rows import DeliveryRows
from tminus.service.jobs.webhooks.webhook import Delivery, Room

Run = Callable[..., Any]  # runs a statement in a transaction
Conditions = Sequence[sa.ColumnElement[bool]]


class DeliveryStore:
    """The calls of a JobStore that are about deliveries. Subclasses say what a transaction is, and whose jobs are."""

    _deliveries: DeliveryRows
    _jobs: sa.Table

    def _transaction(self) -> AbstractContextManager[Run]:
        """Run statements in one transaction. Raises StorageFailed when one of them fails, which undoes all."""
        raise NotImplementedError

    def _here(self) -> Conditions:
        """Which jobs of the table are of this store."""
        return ()

    def _understood(self) -> Conditions:
        """Which jobs are of no newer version, where there may be such ones."""
        return ()

    def _held(self, job_ids: Collection[str]) -> Conditions:
        """Which of these jobs this store may write: none that has ended, nor one that others have taken over."""
        return [self._jobs.c.id.in_(job_ids), self._jobs.c.outcome.is_(None)]

    def started(self, job: JobRecord) -> None:
        """Owe it to a job's webhook that the job has begun, if it is held and has not ended, and that is wanted."""
        held = sa.select(self._jobs.c.id).where(*self._held([job.id]))
        with self._transaction() as run:
            if run(held.with_for_update()).first():
                self._deliveries.owe(run, job.id, job.webhook, ["start"])

    def claim_deliveries(self, room: Room, held_s: float) -> list[Delivery]:
        """Hold deliveries that are due, for so long, and count an attempt of each; nobody else has them meanwhile.

        Of each owner, and of each of its receivers, in turn. None of jobs that a newer version made.
        """
        with self._transaction() as run:
            return self._deliveries.claim(run, [*self._here(), *self._understood()], room, held_s)

    def settle(self, delivery: Delivery, again_in_s: float = 0.0, *, counts: bool = True) -> bool:
        """Keep how an attempt of a delivery that is held ended; False if it is another's by now, or its job is gone.

        again_in_s: until the next one, if it is still pending. counts: False where nothing was attempted after all.
        """
        with self._transaction() as run:
            return self._deliveries.settle(run, delivery, again_in_s, counts=counts)

    def number_owed(self, owner: str, receiver: str, most: int) -> int:
        """How many deliveries of an owner's jobs to a receiver are pending, counted up to this number."""
        with self._transaction() as run:
            return self._deliveries.number_of(run, owner, receiver, most)

    def deliveries(self, job_ids: Collection[str]) -> dict[str, list[Delivery]]:
        """All that was owed of jobs so far, by job."""
        with self._transaction() as run:
            return self._deliveries.of(run, job_ids)
