"""Where replicas share a store: which of them works on what.

A replica claims new jobs that nobody holds and that would not wait for long behind shorter ones here, and one after
another those of a replica that is gone. It renews the leases of those it holds, and notices those that it lost. A new
job that would wait here is left in the store, to whoever has room first.
"""

import asyncio
import math
import time
from collections.abc import Mapping
from contextlib import suppress

from tminus.service.errors import Overloaded, StorageFailed
from tminus.service.jobs.held_job import HeldJob, HeldState
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import Claimed, JobRecord, Key, ReplicaPace
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.cluster import ClusterLoad
from tminus.service.scheduling.room import RetryQueue
from tminus.service.work import Outlook, Work
from tminus.service.worker.running_job import NewJob
from tminus.service.worker.worker import Worker

AHEAD_S = 8.0  # of work: a replica leaves a job to others before which it has as much to do
LOAD_S, LOOK_S = 1.0, 1.0  # how old a look at the others may be, and how long one may take
LIMITS = ("backlog_s", "jobs", "rows")  # of one server, which another may not have reached
CLAIM_S = 1.0  # how often it looks for jobs that nobody holds
RENEWALS = 3  # in the time of a lease


class Leases:
    """What one model holds of a shared store. In the event loop's thread only.

    While the database is away, what is held is worked on: nobody else can claim it either. When it is there again, the
    next renewal says what is still held.
    """

    def __init__(
        self,
        store: AsyncStore,
        worker: Worker,
        admission: Admission,
        model: int,
        info: ModelInfo,
        limits: Limits,
        held: Mapping[str, HeldJob],
    ) -> None:
        """model: its number. held: the jobs that it holds, which its Lifecycle changes."""
        self._store, self._worker, self._admission, self._held = store, worker, admission, held
        self._model, self._info = model, info
        self._max_rows, self._max_backlog_s, self.ended = limits.max_rows, limits.max_backlog_s, False
        self._own_tables = frozenset(table.hash for table in info.tables)
        store.holders.append(self._ids)
        self.load: ClusterLoad | None = None  # when it was last asked for; None while the database is away
        self._asked_s = -math.inf  # when that was
        self._retry_queue = RetryQueue()  # of those who were told since then when another replica has room
        # The shortest job that the last claim left: only shorter ones go before it.
        self._least_waiting = math.inf  # its places

    def change(self, info: ModelInfo, limits: Limits) -> None:
        """Note something else of the model from now on."""
        self._info, self._max_rows, self._max_backlog_s = info, limits.max_rows, limits.max_backlog_s

    @property
    def renewed_every_s(self) -> float:
        """How often to renew."""
        return self._store.lease_s / RENEWALS

    async def renew(self) -> list[HeldJob]:
        """Hold what is held for one more lease, and return what is not held any more. Raises StorageFailed."""
        async with self._store.turn:
            had = list(self._held.values())
            pace = ReplicaPace(self._admission.places_per_s(self._model), self._admission.backlog_s)
            held = await self._store.renew(self._info.fingerprint, pace)
        return [job for job in had if job.record.id not in held and job.ending is None]

    async def look(self) -> None:
        """See what all replicas have to do. Raises StorageFailed."""
        self._asked_s, self._retry_queue = time.perf_counter(), RetryQueue()
        load = await self._store.call(JobStore.load)
        self.load = None if self.ended else load

    async def claim(self) -> Claimed:
        """Hold what nobody holds and there is room for. The caller has the store's turn, and works on it at once."""
        held = self._held.values()
        if not self._worker.state.ready or any(job.state is HeldState.WAITING for job in held):
            return Claimed()
        begun_places = AHEAD_S * self._admission.places_per_s(self._model)
        oldest_us = min((job.record.created_us for job in held), default=None)
        intake = self._admission.intake(self._model, AHEAD_S, oldest_us)
        claimed = await self._store.call(
            JobStore.claim, self._info.fingerprint, intake, begun_places, self._max_rows, self._own_tables
        )
        self._least_waiting = intake.refused
        return claimed

    @property
    def others_serve(self) -> bool:
        """Whether these weights are loaded a second time, as after a reload of the same ones."""
        return len(self._store.holders) > 1

    async def last_is_claimed(self) -> bool:
        """Whether no job of these weights is left that this replica, which serves them no more, should take on."""
        try:
            return self.others_serve or (await self._store.call(JobStore.load)).jobs == 0
        except StorageFailed:
            return False

    def end(self) -> None:
        """Claim and renew no more: the model is unloaded."""
        self.ended, self.load = True, None
        self._store.holders.remove(self._ids)

    def _ids(self) -> list[str]:
        return list(self._held)

    # --- new jobs ---

    def takes(self, work: Work) -> bool:
        """Whether a new job is worked on here; else it is left to whichever replica has room first."""
        intake = self._admission.intake(self._model, AHEAD_S)
        return work.places < self._least_waiting and intake.has_room(work.places)

    async def leave_to_any(self, record: JobRecord, key: Key | None, new: NewJob) -> Outlook | None:
        """Keep a job that any replica may claim. None if another has the key. Raises what Admission.enter does."""
        self._worker.state.check_open()
        load, has_picture = await self._store.call(JobStore.load), new.inputs is not None
        outlook = self._admission.leave_to_any(
            new.work, load, now_s=time.perf_counter(), deadline_s=new.deadline_s, has_picture=has_picture
        )
        return outlook if await self._store.add(record, key, new.inputs, held=False) else None

    async def soonest(self, error: Overloaded, work: Work) -> Overloaded:
        """The refusal of a job that stays where it came in, with the least Retry-After of all replicas."""
        if error.of_owner or error.field not in LIMITS:  # of these nothing is known of others
            return error
        now_s = time.perf_counter()
        if now_s > self._asked_s + LOAD_S:  # not for each of a flood
            with suppress(StorageFailed, TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self.look()
        if (load := self.load) is None:
            return error
        in_s = load.room_elsewhere_in_s(work, self._max_backlog_s if error.field == "backlog_s" else 0.0)
        if in_s >= error.retry_after_s:
            return error
        due_s = self._retry_queue.next_s(now_s + in_s, work.places / (load.places_per_s or math.inf))
        return error.sooner(max(1, math.ceil(due_s - now_s)))
