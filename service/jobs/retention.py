"""Stores snapshots and outcomes of durable jobs and undelivered events of webhooks, and deletes old jobs."""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress

from tminus.service.errors import StorageFailed
from tminus.service.jobs.held_job import HeldJob, HeldJobs, HeldState, Tasks
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import JobRecord, LeaseLost
from tminus.service.jobs.webhooks.delivery_store import DELIVERY_S
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits
from tminus.service.preview import Mailbox, Pace, Watch
from tminus.service.spec import Pixels
from tminus.service.threads import started_pool
from tminus.service.worker.loaded_model import ReadSnapshot

log = logging.getLogger(__name__)

RETRY_S = 5.0  # until a failed call of the store is retried
SWEEP_S = 10.0
LATE_S = 60.0  # for the last attempt to deliver an event to end


class Retention:
    """Stores the outcomes of jobs, and deletes old jobs. Used in the event loop's thread only."""

    def __init__(self, store: AsyncStore, held: HeldJobs, tasks: Tasks) -> None:
        self._store, self._held, self._tasks = store, held, tasks
        self._fails = False  # whether the last attempt to store an outcome failed

    @property
    def cannot_keep(self) -> bool:
        """Whether jobs have ended whose outcomes cannot be stored at the moment."""
        fails = self._fails or self._store.failure  # of two stores one may still take small results
        return bool(fails) and any(job.state is HeldState.ENDING for job in self._held)

    async def keep_end(self, job: HeldJob, ended: JobRecord, images: Pixels | None) -> None:
        """Store the outcome of a job, and retry until it is stored. Raises LeaseLost, and Draining at shutdown.

        Clients get the outcome only once it is stored, since a restart before that runs the job again.
        """
        job.ending = ended
        self._held.move(job, HeldState.ENDING)
        while True:
            try:
                await self._store.finish(ended, images)
                break
            except LeaseLost:
                raise
            except Exception as error:
                self._fails = True
                if not isinstance(error, StorageFailed):  # the store has logged its own failures
                    log.exception("the end of job %s could not be kept", ended.id)
                await self._tasks.pause(RETRY_S)
        self._fails = False
        job.record = ended
        self._held.move(job, HeldState.ENDED)

    def owe_start(self, job: HeldJob) -> None:
        """Add the event "start" for a job's webhook once the job has taken a step."""
        mailbox = Mailbox(asyncio.get_running_loop(), lambda: None)
        watch = Watch(Pace(every=1), (), mailbox.put)
        self._held.watch(job, watch, mailbox)
        self._tasks.spawn_until_closed(self._owe_start(job, watch, mailbox))

    async def _owe_start(self, job: HeldJob, watch: Watch, mailbox: Mailbox) -> None:
        begun = await mailbox.take() is not None  # else the job has ended, or another server has it
        self._held.unwatch(job, watch)
        if begun:
            with suppress(StorageFailed):  # then it is owed when the job is done
                await self._store.call(JobStore.started, job.record)

    async def sweep(self, limits: Limits) -> None:
        """Delete jobs that ended long ago or take too much room, every SWEEP_S seconds until cancelled."""
        keep_us, owed_us = round(limits.keep_jobs_s * 1e6), round((DELIVERY_S + LATE_S) * 1e6)
        while True:
            with suppress(StorageFailed):
                await self._store.check()
                now_us, again = self._store.now_us(), True
                while again:  # in parts, so that other calls of the store can run in between
                    again = await self._store.sweep(now_us - keep_us, limits.keep_jobs_bytes, now_us - owed_us)
            await asyncio.sleep(SWEEP_S)


SHARE = 0.005  # largest share of the time that snapshots may cost
LEAST_S = 2.0  # between two rounds


class SnapshotKeeper:
    """The worker's Keeper. Its own thread waits for copies from a GPU and for the store.

    A round costs the worker's wall time plus the CPU time of this thread and the store's. Waits for a GPU or a
    disk do not count, since they take nothing from a tick.
    """

    def __init__(self, store: AsyncStore, fingerprint: str, metrics: Metrics) -> None:
        self._store, self._fingerprint, self._metrics = store, fingerprint, metrics
        self._thread = started_pool(1, "tminus-snapshots")
        self._next_s = 0.0
        self._busy = False  # while a round is under way

    def change(self, fingerprint: str) -> None:
        """Store snapshots under another fingerprint from now on."""
        self._fingerprint = fingerprint

    def due(self, now_s: float) -> bool:
        """Return whether to take snapshots now."""
        return not self._busy and now_s >= self._next_s

    def keep(self, snapshots: Mapping[str, ReadSnapshot], began_s: float, cost_s: float) -> None:
        """Store a round of snapshots, by job id. cost_s: seconds that it has cost the worker's thread so far."""
        self._busy = True
        self._thread.submit(self._keep, snapshots, began_s, cost_s)

    def close(self) -> None:
        """Store the snapshots that were taken. Blocks until then; call it before the store is closed."""
        self._thread.shutdown()

    def _keep(self, snapshots: Mapping[str, ReadSnapshot], began_s: float, cost_s: float) -> None:
        started_s = time.thread_time()
        try:
            read_snapshots = {job_id: read() for job_id, read in snapshots.items()}
        except Exception:
            log.exception("snapshots could not be read")
        else:
            # After an error, a crash costs the steps since the last snapshot that was stored.
            error, save_s = self._store.save(read_snapshots, self._fingerprint)
            cost_s += save_s
            if error is None:
                self._metrics.snapshotted(len(read_snapshots))
            elif not isinstance(error, StorageFailed):  # the store has logged its own failures
                log.error("snapshots could not be kept", exc_info=error)
        cost_s += time.thread_time() - started_s
        self._next_s = began_s + max(LEAST_S, cost_s / SHARE)
        self._busy = False  # last: the worker's thread reads _next_s once this is False
