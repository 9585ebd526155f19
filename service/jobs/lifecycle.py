"""Connects the parts that run, claim and store one model's durable jobs while the model is served."""

import asyncio
from contextlib import suppress

from tminus.service.errors import Draining, StorageFailed
from tminus.service.jobs.held_job import HeldJobs, HeldState, ModelOfJobs, Tasks
from tminus.service.jobs.job_runner import JobRunner
from tminus.service.jobs.leases import CLAIM_S, Leases
from tminus.service.jobs.retention import RETRY_S, Retention
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.scheduling.admission import Admission
from tminus.service.worker.load_queue import LoadQueue
from tminus.service.worker.worker import Worker


class Lifecycle:
    """Starts, updates and stops the parts that handle one model's jobs. Used only in the event loop's thread."""

    def __init__(
        self,
        store: AsyncStore,
        worker: Worker,
        admission: Admission,
        model: int,
        info: ModelInfo,
        limits: Limits,
        metrics: Metrics,
        load_queue: LoadQueue,
    ) -> None:
        """model: the model's number. load_queue: loads the model when a job needs it."""
        self.store, self.served, self.tasks = store, ModelOfJobs(model, info, limits), Tasks()
        self.held = HeldJobs(worker, self.served)
        self.retention = Retention(store, self.held, self.tasks)
        self.runner = JobRunner(store, worker, self.served, self.held, self.retention, self.tasks, metrics, load_queue)
        self.leases: Leases | None = None
        if store.shared:
            self.leases = Leases(
                store, worker, admission, self.served, self.held, self.runner, self.retention, self.tasks, metrics
            )
        self._taken_on = asyncio.Event()  # not set while the jobs of an earlier process cannot be read
        self._taken_on.set()

    def change(self, info: ModelInfo, limits: Limits | None = None) -> None:
        """Update the model's info and limits. Jobs that end from now on get the new fingerprint."""
        self.served.info, self.served.limits = info, limits or self.served.limits

    @property
    def needs_model(self) -> bool:
        """True if a job is in the worker or waits for room in it.

        A job that waits for the model to load does not count.
        """
        states = (HeldState.IN_WORKER,) if self.runner.is_unloaded else (HeldState.IN_WORKER, HeldState.WAITING)
        return any(job.state in states for job in self.held)

    async def start(self, *, take_on: bool = True) -> None:
        """Resume the stored jobs. If a store file cannot be opened yet, retry in the background.

        take_on: False if another Lifecycle has the store's unfinished jobs.
        """
        if self.leases is not None:
            await self.leases.start()
        elif take_on:
            try:
                await self._take_on()
            except StorageFailed:
                self._taken_on.clear()
                self.tasks.spawn_until_closed(self._take_on_later())
        self.tasks.spawn_until_closed(self.retention.sweep(self.served.limits))

    async def _take_on(self) -> None:
        self.runner.take_on(await self.store.call(SqliteStore.claim_all))

    async def _take_on_later(self) -> None:
        while not self._taken_on.is_set():
            await asyncio.sleep(RETRY_S)
            with suppress(StorageFailed):
                await self._take_on()
                self._taken_on.set()

    async def idle(self) -> None:
        """Wait until all jobs have ended, except those that this process cannot finish."""
        await self._taken_on.wait()
        with suppress(Draining):
            while True:
                await self.held.idle.wait()
                if self.leases is None or (await self.leases.last_is_claimed() and self.held.idle.is_set()):
                    return
                await self.tasks.pause(CLAIM_S)

    async def close(self) -> None:
        """Finish storing outcomes, without retries. Call this once the worker has ended or no jobs are left."""
        await self.tasks.close()
        if self.leases is not None:  # last, because storing a result may take longer than a lease
            await self.leases.close()
