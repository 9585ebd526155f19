"""Leases of jobs, which assign each job in a shared store to one replica.

A replica claims new jobs that no replica holds, unless too much shorter work goes first. The jobs of a dead replica are
claimed one at a time. A replica renews the leases of its jobs, and drops a job whose lease is lost. A new job that
would wait in this replica stays in the store for the first replica with room.
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

AHEAD_S = 8.0  # a job is left to other replicas if this many seconds of work are ahead of it in this replica
LOAD_S, LOAD_WAIT_S = 1.0, 1.0  # seconds: maximum age of the cluster's load, longest wait of a request to read it
LIMITS = ("backlog_s", "jobs", "rows")  # limits that other servers may not have reached
CLAIM_S = 1.0  # seconds between searches for jobs that no replica holds
RENEWALS = 3  # renewals during one lease


class Leases:
    """Claims one model's jobs from a shared store, and renews their leases.

    Used only in the event loop's thread. While the database is unreachable, held jobs continue, because no other
    replica can claim them. Once the database is reachable again, the next renewal returns the jobs that are still held.
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
        self._ended = False  # claiming and renewing have stopped
        self._renewing: asyncio.Task[None] | None = None
        # Last known load of all replicas; None while the database is unreachable.
        self.load: ClusterLoad | None = None
        self._asked_s = -math.inf  # time of the last attempt to read the load
        self._retry_queue = RetryQueue()  # clients given another replica's Retry-After since `_asked_s`
        # Length of the shortest job that the last claim left in the store. Only shorter jobs may overtake it.
        self._least_waiting = math.inf  # in places (forward passes of one row)

    # --- renew and claim until the model is unloaded ---

    async def start(self) -> None:
        """Renew once, so that other replicas learn of this replica. Then renew and claim until `end`."""
        with suppress(StorageFailed):
            await self._renew()
        self._renewing = asyncio.create_task(self._renew_until_ended())
        self._tasks.spawn(self._claim_until_ended())

    def end(self) -> None:
        """Stop claiming and renewing, because the model is unloaded."""
        self._ended, self.load = True, None
        self._store.holders.remove(self._held.ids)

    async def close(self) -> None:
        """Stop renewing. Call this after all results are stored."""
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
            except Exception:  # continue, because a replica that does not renew loses its jobs
                log.exception("the leases of jobs could not be renewed")

    async def _renew(self) -> None:
        """Renew the leases of held jobs, drop jobs whose leases are lost, and read the load of all replicas."""
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
        """Claim and run jobs that no replica holds, unless results cannot be stored at the moment."""
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
        """Claim again as soon as this suspect has ended or is lost, because the next suspect waits for that."""
        await suspect.over.wait()
        await self._claim()

    async def claim(self) -> Claimed:
        """Claim jobs that no replica holds, while there is room.

        The caller must hold the store's lock `turn`, and run the claimed jobs at once.
        """
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
        """True if another loaded model has the same weights, as after a reload."""
        return len(self._store.holders) > 1

    async def last_is_claimed(self) -> bool:
        """Return True if no jobs are left for this model to claim. Used when the weights are no longer served."""
        try:
            return self._others_serve or (await self._store.call(SharedStore.load)).jobs == 0
        except StorageFailed:
            return False

    # --- jobs of any replica ---

    async def cancel(self, record: JobRecord) -> bool:
        """Cancel a job in the store. Return False if the job has ended.

        If another replica holds the job, it notices the cancellation at its next renewal.
        """
        if not await self._store.call(SharedStore.cancel, record.id):
            return False
        if (job := self._held.find(record.id)) is not None:
            self._runner.lose(job)
        elif not record.held:  # otherwise the holder counts the job as lost
            self._metrics.count("tminus_durable_jobs_ended_total", "cancelled")
        return True

    # --- new jobs ---

    def takes(self, work: Work) -> bool:
        """Return True if this replica takes a new job. Otherwise, the first replica with room takes it."""
        intake = self._admission.intake(self._model.number, AHEAD_S)
        return work.places < self._least_waiting and intake.has_room(work.places)

    async def leave_to_any(self, record: JobRecord, key: Key | None, new: NewJob) -> Outlook | None:
        """Store a job for any replica to claim. Return None if its key has a job.

        Raises the errors of Admission.enter.
        """
        self._worker.state.check_open()
        load, has_picture = await self._store.call(SharedStore.load), new.inputs is not None
        outlook = self._admission.leave_to_any(
            new.work, load, now_s=time.perf_counter(), deadline_s=new.deadline_s, has_picture=has_picture
        )
        return outlook if await self._store.add(record, key, new.inputs, held=False) else None

    async def soonest(self, error: Overloaded, work: Work) -> Overloaded:
        """Return `error` with the shortest Retry-After of all replicas. For non-durable jobs."""
        if error.of_owner or error.field not in LIMITS:  # other replicas do not report this limit
            return error
        now_s = time.perf_counter()
        if now_s > self._asked_s + LOAD_S:  # read at most once per LOAD_S
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
