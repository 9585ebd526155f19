"""Accepts durable jobs: one per Idempotency-Key, within the quotas of the API key.

An accepted job is finished whatever happens to the client or to this process (lifecycle.py).
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import replace
from weakref import WeakValueDictionary

from tminus.service.errors import KeyReused, Overloaded, StorageFailed
from tminus.service.jobs.jobs import Jobs, JobView, unless_retired
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import JobRecord, Key, now_us
from tminus.service.jobs.store.shared_store import SharedStore
from tminus.service.jobs.webhooks.webhook import Webhook
from tminus.service.work import Outlook
from tminus.service.worker.running_job import NewJob
from tminus.service.worker.worker import Worker

# Most undelivered events for one receiver of an owner, since each search for due events reads them; Retry-After beyond
# it.
MOST_OWED, OWED_S = 10_000, 60


class _KeyTaken(Exception):
    """Another job has the Idempotency-Key. It is an exception so that no quota is charged."""


class NewJobs:
    """Accepts jobs, or leaves them to a replica with room. Used in the event loop's thread only."""

    def __init__(self, worker: Worker, jobs: Jobs) -> None:
        self._worker, self._jobs = worker, jobs
        self._entering: dict[str, str] = {}  # owners of jobs that are being accepted, by job id
        # One lock per key, held while the key's job is looked up and added. Other keys do not wait for a slow store.
        self._keyed = WeakValueDictionary[str, asyncio.Lock]()
        self._counts: list[tuple[str, set[str]]] = []  # counts in progress: the owner, and the jobs found so far

    def number_here(self, owner: str) -> int:
        """Return the number of an owner's unfinished jobs that this process knows."""
        return self._worker.jobs.number_of(owner, durable=False) + len(self._known(owner))

    async def number_elsewhere(self, owner: str) -> int:
        """Count an owner's durable jobs that this server does not hold; 0 while their store is away."""
        found = set[str]()
        self._counts.append(count := (owner, found))
        try:
            for store in [each.store for each in self._jobs.by_store()]:
                if store.shared and store.failure is None:
                    with suppress(StorageFailed):
                        found.update(await store.call(SharedStore.open_jobs, owner))
        finally:
            self._counts = [each for each in self._counts if each is not count]
        return len(found - self._known(owner))

    def _known(self, owner: str) -> set[str]:
        """Return the ids of an owner's durable jobs that are held here or are being accepted."""
        held = {job.record.id for job in self._jobs.all_held() if job.record.owner == owner}
        return held | {job_id for job_id, whose in self._entering.items() if whose == owner}

    async def create(
        self,
        new: NewJob,
        key: Key | None,
        webhook: Webhook | None = None,
        *,
        charged: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> tuple[JobView, bool]:
        """Accept a durable job. Return it, and whether the key was used before: then it is the earlier job.

        webhook: the receiver of its events. charged: a context that is entered for a new job, not for a repeat, and
        that exits with an exception if the job is not accepted. Raises KeyReused, StorageFailed, and the errors of
        Worker.submit.
        """
        lifecycle = self._jobs.of_model(new.work.model)

        async def create() -> JobView:
            async with charged():
                return await self._create(lifecycle, new, key, webhook)

        if key is None:
            return await create(), False
        # The lock is here and not in the stores, since stores of different weights do not share keys.
        async with self._keyed.setdefault(key.kept_as, asyncio.Lock()):
            if (found := await self._find_by_key(key, lifecycle.served.name)) is not None:
                return found, True
            try:
                return await create(), False
            except _KeyTaken:  # another server added a job with the key at the same time
                found = await self._find_by_key(key, lifecycle.served.name)
        if found is None:
            raise StorageFailed("the job of this Idempotency-Key was deleted just now")
        return found, True

    async def soonest(self, error: Overloaded, new: NewJob) -> Overloaded:
        """Return the refusal of a job that is not durable, with the least Retry-After of all servers of its store."""
        leases = self._jobs.of_model(new.work.model).leases
        return error if leases is None else await leases.soonest(error, new.work)

    async def _create(self, lifecycle: Lifecycle, new: NewJob, key: Key | None, webhook: Webhook | None) -> JobView:
        """Make the record of a job, and accept the job. Raises _KeyTaken and the errors of `create`."""
        if lifecycle.retention.cannot_keep:
            raise StorageFailed(
                "the results of finished jobs cannot be stored at the moment, so no new durable job is accepted"
            )
        created_us = lifecycle.store.now_us()
        deadline_us = None if new.deadline_s is None else created_us + round(new.deadline_s * 1e6)
        ahead_us = created_us - now_us()
        record = JobRecord(
            new.id,
            new.spec,
            created_us,
            deadline_us,
            owner=new.owner,
            webhook=webhook,
            ahead_us=ahead_us,
        )
        self._entering[new.id] = new.owner  # before the first await, so that every count includes the job
        try:
            if webhook is not None:
                receiver = webhook.receiver  # events of other owners do not count
                if await lifecycle.store.call(JobStore.number_owed, new.owner, receiver, MOST_OWED) >= MOST_OWED:
                    raise Overloaded(
                        f"{MOST_OWED} events wait for the receiver {receiver} to take them",
                        retry_after_s=OWED_S, field="webhook", value=receiver, bound="a receiver that answers",
                    )  # fmt: skip
            outlook = await self._let_in(lifecycle, record, new, key)
        finally:
            del self._entering[new.id]
        if outlook is None:
            raise _KeyTaken
        if new.id not in self._known(new.owner):  # left to any replica, perhaps after a count has read its store
            for whose, found in self._counts:
                if whose == new.owner:
                    found.add(new.id)
        view = JobView(record, lifecycle.served.number, lifecycle.served.name, "waiting", True, 0)
        return replace(view, position=outlook.position, eta_s=outlook.eta_s)

    async def _let_in(self, lifecycle: Lifecycle, record: JobRecord, new: NewJob, key: Key | None) -> Outlook | None:
        """Submit a new job to the worker or leave it to other replicas, and store it. Return None if its key has a job
        by now.
        """
        ticket, leases = None, lifecycle.leases
        if lifecycle.runner.is_unloaded:  # the job waits in the store
            self._worker.state.check_open()
            outlook = lifecycle.runner.check_room()
            if not await lifecycle.store.add(record, key, new.inputs):
                return None
            lifecycle.runner.accept(record, None)
            return outlook
        if leases is None or leases.takes(new.work):
            try:
                ticket = self._worker.submit(replace(new, durable=True))
            except Overloaded as error:
                if leases is None or error.of_owner:
                    raise
        if ticket is None:
            assert leases is not None
            return await leases.leave_to_any(record, key, new)
        kept = False
        try:
            kept = await lifecycle.store.add(record, key, new.inputs)
        finally:
            if not kept:
                self._worker.cancel(new.id, "not_kept")
        if not kept:
            return None
        lifecycle.runner.accept(record, ticket)
        return ticket.outlook

    async def _find_by_key(self, key: Key, model_name: str) -> JobView | None:
        """Find the job that was created with a key. Raises KeyReused if its request or model was another."""
        for lifecycle in self._jobs.by_store():
            found = None
            with unless_retired(lifecycle):
                found = await lifecycle.store.call(JobStore.find, key)
            if found is None:
                continue
            record, same = found
            if not same or lifecycle.served.name != model_name:
                raise KeyReused(
                    f"the Idempotency-Key {key.name!r} came with another request before",
                    field="Idempotency-Key", value=key.name, bound="a new key for a new request",
                )  # fmt: skip
            return await self._jobs.view(record, lifecycle)
        return None
