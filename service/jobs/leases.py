"""Membership in a cluster: which of the replicas that share a store works on which job.

A replica claims new jobs that nobody holds and that would not wait for long behind shorter ones here. It claims the
jobs of a replica that is gone one after another. It renews the leases of the jobs that it holds, and notices which ones
it lost. A new job that would wait here is left in the store, to whichever replica has room first.
"""

import asyncio
import logging
import math
import time
from contextlib import suppress

from tminus.service.errors import Draining, Overloaded, StorageFailed
from tminus.service.jobs.held_job import HeldJob, HeldJobs, HeldState, ModelOfJobs, Tasks
from tminus.service.jobs.job_runner import JobRunner
from tminus.service.jobs.retention import Retention
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.records import Claimed, JobRecord, Key, ReplicaPace
from tminus.service.jobs.store.shared_store import SharedStore
from tminus.service.metrics import Metrics
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.room import ClusterLoad, RetryQueue
from tminus.service.work import Outlook, Work
from tminus.service.worker.running_job import NewJob
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

AHEAD_S = 8.0  # of work: a replica leaves a job to others before which it has as much to do
LOAD_S, LOAD_WAIT_S = 1.0, 1.0  # how old the load of all replicas may be, and how long a request waits for it
LIMITS = ("backlog_s", "jobs", "rows")  # of one server, which another may not have reached
CLAIM_S = 1.0  # how often it looks for jobs that nobody holds
RENEWALS = 3  # in the time of a lease


class Leases:
    """One model's part in a cluster: what it holds of a shared store. In the event loop's thread only.

    While the database is away, what is held is worked on: nobody else can claim it either. When it is there again, the
    next renewal says what is still held.
    """

    def __init__(
        self,
        store: AsyncStore,
        worker: Worker,
        admission: Admission,
        model: ModelOfJobs,
        held: HeldJobs,
        runner: JobRunner,
        retention: Retention,
        tasks: Tasks,
        metrics: Metrics,
    ) -> None:
        self._store, self._worker, self._admission, self._model = store, worker, admission, model
        self._held, self._runner, self._retention = held, runner, retention
        self._tasks, self._metrics = tasks, metrics
        self._own_tables = frozenset(table.hash for table in model.info.tables)
        store.holders.append(held.ids)
        self._ended = False  # claims and renews no more
        self._renewing: asyncio.Task[None] | None = None
        self.load: ClusterLoad | None = None  # when it was last asked for; None while the database is away
        self._asked_s = -math.inf  # when that was
        self._retry_queue = RetryQueue()  # clients that were told since then when another replica has room
        # The shortest job that the last claim left: only shorter ones go before it.
        self._least_waiting = math.inf  # its places

    # --- from the first renewal until the model is unloaded ---

    async def start(self) -> None:
        """Renew, so that others know that this replica lives; then renew and claim until `end`."""
        with suppress(StorageFailed):
            await self._renew()
        self._renewing = asyncio.create_task(self._renew_until_ended())
        self._tasks.spawn(self._claim_until_ended())

    def end(self) -> None:
        """Claim and renew no more: the model is unloaded."""
        self._ended, self.load = True, None
        self._store.holders.remove(self._held.ids)

    async def close(self) -> None:
        """Renew no more: what jobs made is kept."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)

    async def _renew_until_ended(self) -> None:
        while not self._ended:
            await asyncio.sleep(self._store.lease_s / RENEWALS)
            try:
                if not self._ended:
                    await self._renew()
            except StorageFailed:
                self.load = None
            except Exception:  # a replica that does not renew works for nothing
                log.exception("the leases of jobs could not be renewed")

    async def _renew(self) -> None:
        """Hold what is held for one more lease, lose what is not held any more, and look at the others."""
        async with self._store.turn:
            had, admission = list(self._held), self._admission
            pace = ReplicaPace(admission.places_per_s(self._model.number), admission.backlog_s)
            held = await self._store.renew(self._model.info.fingerprint, pace)
        for job in had:
            if job.record.id not in held and job.ending is None:
                self._runner.lose(job)
        await self._look()

    async def _look(self) -> None:
        """Read the load of all replicas. Raises StorageFailed."""
        self._asked_s, self._retry_queue = time.perf_counter(), RetryQueue()
        load = await self._store.call(SharedStore.load)
        self.load = None if self._ended else load

    async def _claim_until_ended(self) -> None:
        with suppress(Draining):
            while not self._ended:
                await self._claim()
                await self._tasks.pause(CLAIM_S)

    async def _claim(self) -> None:
        """Take on what nobody holds, if its results could be kept."""
        try:
            if not (self._ended or self._retention.cannot_keep or (self._model.retired and self._others_serve)):
                async with self._store.turn:
                    found = self._runner.take_on(await self.claim())
                for job in found:
                    if job.record.suspect:
                        self._tasks.spawn_until_closed(self._claim_after(job))
        except StorageFailed:
            pass
        except Exception:
            log.exception("jobs could not be claimed")

    async def _claim_after(self, suspect: HeldJob) -> None:
        """Claim as soon as a suspect is over: the next one waits for that."""
        await suspect.over.wait()
        await self._claim()

    async def claim(self) -> Claimed:
        """Hold what nobody holds and there is room for. The caller has the store's turn, and runs the jobs at once."""
        if not self._worker.state.ready or any(job.state is HeldState.WAITING for job in self._held):
            return Claimed()
        begun_places = AHEAD_S * self._admission.places_per_s(self._model.number)
        oldest_us = min((job.record.created_us for job in self._held), default=None)
        intake = self._admission.intake(self._model.number, AHEAD_S, oldest_us)
        build, max_rows = self._model.info.fingerprint, self._model.limits.max_rows
        claimed = await self._store.call(SharedStore.claim, build, intake, begun_places, max_rows, self._own_tables)
        self._least_waiting = intake.refused
        return claimed

    @property
    def _others_serve(self) -> bool:
        """Whether these weights are loaded a second time, as after a reload of the same ones."""
        return len(self._store.holders) > 1

    async def last_is_claimed(self) -> bool:
        """Whether no job of these weights is left that this replica, which serves them no more, should take on."""
        try:
            return self._others_serve or (await self._store.call(SharedStore.load)).jobs == 0
        except StorageFailed:
            return False

    # --- jobs of any replica ---

    async def cancel(self, record: JobRecord) -> bool:
        """End a job that another replica holds, or nobody; False if it has ended. Its holder learns it by renewing."""
        if not await self._store.call(SharedStore.cancel, record.id):
            return False
        if (job := self._held.find(record.id)) is not None:
            self._runner.lose(job)
        elif not record.held:  # else its holder counts it as lost
            self._metrics.count("tminus_durable_jobs_ended_total", "cancelled")
        return True

    # --- new jobs ---

    def takes(self, work: Work) -> bool:
        """Whether a new job is worked on here; else it is left to whichever replica has room first."""
        intake = self._admission.intake(self._model.number, AHEAD_S)
        return work.places < self._least_waiting and intake.has_room(work.places)

    async def leave_to_any(self, record: JobRecord, key: Key | None, new: NewJob) -> Outlook | None:
        """Keep a job that any replica may claim. None if another has the key. Raises what Admission.enter does."""
        self._worker.state.check_open()
        load, has_picture = await self._store.call(SharedStore.load), new.inputs is not None
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
                async with asyncio.timeout(LOAD_WAIT_S):
                    await self._look()
        if (load := self.load) is None:
            return error
        in_s = load.room_elsewhere_in_s(work, self._model.limits.max_backlog_s if error.field == "backlog_s" else 0.0)
        if in_s >= error.retry_after_s:
            return error
        due_s = self._retry_queue.next_s(now_s + in_s, work.places / (load.places_per_s or math.inf))
        return error.sooner(max(1, math.ceil(due_s - now_s)))
