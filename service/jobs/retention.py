"""Stores snapshots, outcomes and webhook events of durable jobs, and deletes old jobs."""

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

RETRY_S = 5.0  # seconds before a failed call to the store is retried
SWEEP_S = 10.0
LATE_S = 60.0  # extra seconds for the last attempt to deliver an event


class Retention:
    """Stores the outcomes of jobs, and deletes old jobs. Used only in the event loop's thread."""

    def __init__(self, store: AsyncStore, held: HeldJobs, tasks: Tasks) -> None:
        self._store, self._held, self._tasks = store, held, tasks
        self._fails = False  # the last attempt to store an outcome failed

    @property
    def cannot_keep(self) -> bool:
        """True while ended jobs have outcomes that cannot be stored."""
        fails = self._fails or self._store.failure  # storing a small result clears `_fails`, even if large ones fail
        return bool(fails) and any(job.state is HeldState.ENDING for job in self._held)

    async def keep_end(self, job: HeldJob, ended: JobRecord, images: Pixels | None) -> None:
        """Store a job's outcome, and retry until this succeeds. Raises LeaseLost, or Draining at shutdown.

        Clients get the outcome only after it is stored, because a restart before that would run the job again.
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
                if not isinstance(error, StorageFailed):  # the store logs its own failures
                    log.exception("the end of job %s could not be kept", ended.id)
                await self._tasks.pause(RETRY_S)
        self._fails = False
        job.record = ended
        self._held.move(job, HeldState.ENDED)

    def owe_start(self, job: HeldJob) -> None:
        """Add the event "start" for the job's webhook after the job's first step in this process."""
        mailbox = Mailbox(asyncio.get_running_loop(), lambda: None)
        watch = Watch(Pace(every=1), (), mailbox.put)
        self._held.watch(job, watch, mailbox)
        self._tasks.spawn_until_closed(self._owe_start(job, watch, mailbox))

    async def _owe_start(self, job: HeldJob, watch: Watch, mailbox: Mailbox) -> None:
        begun = await mailbox.take() is not None  # None if the job took no step in this process
        self._held.unwatch(job, watch)
        if begun:
            with suppress(StorageFailed):  # if this fails, the event is added when the job is done
                await self._store.call(JobStore.started, job.record)

    async def sweep(self, limits: Limits) -> None:
        """Delete jobs that are too old or take too much space. Repeat every SWEEP_S seconds until cancelled."""
        keep_us, owed_us = round(limits.keep_jobs_s * 1e6), round((DELIVERY_S + LATE_S) * 1e6)
        while True:
            with suppress(StorageFailed):
                await self._store.check()
                now_us, again = self._store.now_us(), True
                while again:  # in parts, so that other calls to the store can run in between
                    again = await self._store.sweep(now_us - keep_us, limits.keep_jobs_bytes, now_us - owed_us)
            await asyncio.sleep(SWEEP_S)


SHARE = 0.005  # largest share of time to spend on snapshots
LEAST_S = 2.0  # minimum seconds between the starts of two rounds of snapshots


class SnapshotKeeper:
    """Implements the worker's Keeper. Its own thread waits for copies from the GPU and for the store.

    A round stores the snapshots of several jobs. Its cost is the wall time in the worker's thread, plus the CPU time in
    this keeper's thread and in the store's thread. Waiting for the GPU or the disk costs nothing, because it delays no
    tick.
    """

    def __init__(self, store: AsyncStore, fingerprint: str, metrics: Metrics) -> None:
        self._store, self._fingerprint, self._metrics = store, fingerprint, metrics
        self._thread = started_pool(1, "tminus-snapshots")
        self._next_s = 0.0
        self._busy = False  # a round is in progress

    def change(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    def due(self, now_s: float) -> bool:
        return not self._busy and now_s >= self._next_s

    def keep(self, snapshots: Mapping[str, ReadSnapshot], began_s: float, cost_s: float) -> None:
        """Store a round of snapshots, keyed by job id. cost_s: seconds used so far in the worker's thread."""
        self._busy = True
        self._thread.submit(self._keep, snapshots, began_s, cost_s)

    def close(self) -> None:
        """Wait until all pending snapshots are stored. Call this before the store is closed."""
        self._thread.shutdown()

    def _keep(self, snapshots: Mapping[str, ReadSnapshot], began_s: float, cost_s: float) -> None:
        started_s = time.thread_time()
        try:
            read_snapshots = {job_id: read() for job_id, read in snapshots.items()}
        except Exception:
            log.exception("snapshots could not be read")
        else:
            # If this fails, a crash will repeat the steps since the last stored snapshot.
            error, save_s = self._store.save(read_snapshots, self._fingerprint)
            cost_s += save_s
            if error is None:
                self._metrics.snapshotted(len(read_snapshots))
            elif not isinstance(error, StorageFailed):  # the store logs its own failures
                log.error("snapshots could not be kept", exc_info=error)
        cost_s += time.thread_time() - started_s
        self._next_s = began_s + max(LEAST_S, cost_s / SHARE)
        self._busy = False  # set last, because the worker's thread reads _next_s once this is False
