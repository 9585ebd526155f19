"""Accept durable jobs: once for each request, however often it is sent, and within what its key may have.

A job, once accepted, is finished whatever happens to the client or to this process: see lifecycle.py.
"""

import asyncio
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial

from tminus.service.errors import KeyReused, Overloaded, StorageFailed
from tminus.service.jobs.jobs import Jobs
from tminus.service.jobs.kept import unless_retired
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.store import JobRecord, Key, now_us
from tminus.service.jobs.views import JobView
from tminus.service.spec import Inputs, SampleSpec
from tminus.service.worker.worker import Worker


class NewJobs:
    """Lets jobs in, or leaves them to whichever replica has room. In the event loop's thread only."""

    def __init__(self, worker: Worker, jobs: Jobs) -> None:
        self._worker, self._jobs = worker, jobs
        self._keyed = asyncio.Lock()  # held while a job with a key is looked for and added

    def number_of(self, owner: str) -> int:
        """How many jobs of an owner have not ended here, with those that the worker has not yet."""
        lives = (live for live in self._jobs.all_live() if not live.submitted)
        return self._worker.jobs.number_of(owner) + sum(live.record.owner == owner for live in lives)

    async def number_everywhere(self, owner: str) -> int:
        """As `number_of`, with the durable ones of all servers that share a store, and those that nobody holds."""
        here = self._worker.jobs.number_of(owner)
        passing = here - sum(live.submitted and live.record.owner == owner for live in self._jobs.all_live())
        try:
            kept = [await each.store.number_of(owner) for each in self._jobs.by_store() if each.store.shared]
        except StorageFailed:
            kept = []
        return max(self.number_of(owner), passing + sum(kept))

    async def create(
        self,
        spec: SampleSpec,
        deadline_s: float | None,
        key: Key | None,
        inputs: Inputs | None = None,
        *,
        model: int = 0,
        owner: str = "",
        charged: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> tuple[JobView, bool]:
        """Accept a durable job of a model.

        owner: the name of the API key that it came with. charged: is entered if a new job is made, not for a repeat,
        and left by an exception if it is not accepted. Returns the job, and whether the key was used before; if so,
        it is the earlier job.

        Raises KeyReused, StorageFailed, and what Worker.submit does.
        """
        lifecycle = self._jobs.of_model(model)

        async def new() -> tuple[JobView, bool]:
            async with charged():
                return await self._create(lifecycle, spec, deadline_s, key, inputs, owner)

        if key is None:
            return await new()
        async with self._keyed:  # stores of other weights do not know of each other's keys
            if (found := await self._find_by_key(key, lifecycle.model_name)) is not None:
                return found, True
            return await new()

    async def soonest(self, error: Overloaded, model: int, spec: SampleSpec) -> Overloaded:
        """The refusal of a job that is not durable, with the least Retry-After of all servers that share its store."""
        leases = self._jobs.of_model(model).leases
        return error if leases is None else await leases.soonest(error, spec)

    async def _create(
        self,
        lifecycle: Lifecycle,
        spec: SampleSpec,
        deadline_s: float | None,
        key: Key | None,
        inputs: Inputs | None,
        owner: str,
    ) -> tuple[JobView, bool]:
        async def found() -> tuple[JobView, bool]:  # another request had the same key at the same time
            assert key is not None
            earlier = await self._find_by_key(key, lifecycle.model_name)
            if earlier is None:
                raise StorageFailed("the job of this Idempotency-Key was deleted just now")
            return earlier, True

        model = lifecycle.model
        lifecycle.check_store()
        created_us = lifecycle.store.now_us()
        deadline_us = None if deadline_s is None else created_us + round(deadline_s * 1e6)
        record = JobRecord(uuid.uuid4().hex, spec, created_us, deadline_us, owner=owner, ahead_us=created_us - now_us())
        view = partial(JobView, record, model, lifecycle.model_name, "waiting", True, 0)
        ticket, leases = None, lifecycle.leases
        if leases is None or leases.takes_next:
            try:
                ticket = self._worker.submit(
                    record.id, spec, deadline_s, model=model, inputs=inputs, owner=owner, durable=True
                )
            except Overloaded as error:
                if leases is None or error.of_owner:
                    raise
        if ticket is None:
            assert leases is not None
            outlook = await leases.leave_to_any(record, key, inputs, deadline_s)
            return (view(outlook.position, outlook.eta_s), False) if outlook is not None else await found()
        kept = False
        try:
            kept = await lifecycle.store.add(record, key, inputs)
        finally:
            if not kept:
                self._worker.cancel(record.id, "not_kept")
        if not kept:
            return await found()
        lifecycle.accept(record, ticket)
        return view(ticket.outlook.position, ticket.outlook.eta_s), False

    async def _find_by_key(self, key: Key, model_name: str) -> JobView | None:
        """Find the job that was asked for with a key. Raises KeyReused if it was another request, or model."""
        for lifecycle in self._jobs.by_store():
            found = None
            with unless_retired(lifecycle):
                found = await lifecycle.store.find(key)
            if found is None:
                continue
            record, same = found
            if not same or lifecycle.model_name != model_name:
                raise KeyReused(
                    f"the Idempotency-Key {key.name!r} came with another request before",
                    field="Idempotency-Key", value=key.name, bound="a new key for a new request",
                )  # fmt: skip
            return await self._jobs.view(record, lifecycle)
        return None
