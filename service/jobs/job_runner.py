"""Runs each durable job of a model from its acceptance or claim to its end.

jobs.py handles the clients' commands. Each job has a task that waits for the worker's result and stores the outcome,
even if the client disconnects.

A job may crash the worker or the whole process. The store counts each crash against the jobs in progress. A job with a
crash count runs alone in its ticks (a tick is one batched step), so that another crash shows whether this job is the
cause. Being killed from outside does not count, unless the server had hung.

Servers that share a store may take over a dead server's jobs before a restart counts the crash. A job taken over is a
suspect: it also runs alone in its ticks, and a server takes on only one suspect at a time (shared_store.py).
"""

import asyncio
import logging
import math
import time
from contextlib import suppress
from dataclasses import replace

from tminus.service.errors import (
    DeadlinePassed,
    Draining,
    EngineFailed,
    JobCancelled,
    ModelUnloaded,
    NotReady,
    Overloaded,
    ServiceError,
    StorageFailed,
)
from tminus.service.jobs.held_job import HeldJob, HeldJobs, HeldState, ModelOfJobs, Tasks
from tminus.service.jobs.retention import Retention
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import Claimed, JobRecord, LeaseLost, Outcome
from tminus.service.jobs.store.shared_store import SharedStore
from tminus.service.metrics import Metrics
from tminus.service.spec import Inputs, Pixels, Snapshot
from tminus.service.tracing import traced
from tminus.service.work import Outlook, Ticket, check_table, work_of
from tminus.service.worker.load_queue import LoadQueue
from tminus.service.worker.loop import LOST
from tminus.service.worker.running_job import NewJob
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

ROOM_S = 0.2  # seconds between attempts to submit a job to a full worker
LOAD_RETRY_S = 15.0  # seconds before a failed load of the model is retried
READ_RETRY_S = 1.0  # seconds before a failed read of a resumed job is retried
FILE_AWAY_S = 60.0  # longest wait for an unreachable store file; the other resumed jobs wait behind this job
MOST_CRASHES = 2  # a job fails after this many crashes of the server
FAILED_BY_CRASHES = f"the server ended {MOST_CRASHES} times while it worked on this job"


class JobRunner:
    """Moves each held job from state to state. Used only in the event loop's thread."""

    def __init__(
        self,
        store: AsyncStore,
        worker: Worker,
        model: ModelOfJobs,
        held: HeldJobs,
        retention: Retention,
        tasks: Tasks,
        metrics: Metrics,
        load_queue: LoadQueue,
    ) -> None:
        self._store, self._worker, self._model, self._held = store, worker, model, held
        self._retention, self._tasks, self._metrics, self._load_queue = retention, tasks, metrics, load_queue
        self._resuming = asyncio.Lock()  # resumed jobs enter the worker one at a time, in order of arrival

    # --- accept, resume, cancel and leave jobs ---

    @property
    def is_unloaded(self) -> bool:
        """True if the model is served but not in memory. Its jobs wait until the model is loaded."""
        return not self._model.retired and self._load_queue.is_unloaded(self._model.name)

    def check_room(self) -> Outlook:
        """Return the outlook of a job that waits for its model to load. Raises Overloaded if too many jobs wait."""
        left_s = self._load_queue.expected_s(self._model.name)
        waiting, most = len(self._held), self._model.limits.max_jobs
        if waiting >= most:
            raise Overloaded(
                f"{waiting} jobs wait until the model is in memory", retry_after_s=max(1, math.ceil(left_s)),
                field="jobs", value=waiting + 1, bound=f"at most {most}",
            )  # fmt: skip
        return Outlook(waiting, left_s)

    def accept(self, record: JobRecord, ticket: Ticket | None) -> None:
        """Run a job that is already in the store.

        ticket: the worker's ticket. Without one, the job enters the worker once the model is in memory.
        """
        job = self._hold(record)
        if ticket is not None:
            self._held.move(job, HeldState.IN_WORKER)
        self._tasks.spawn(self._run(job, ticket))

    def take_on(self, claimed: Claimed) -> list[HeldJob]:
        """Run claimed jobs, each from its last snapshot. Return the jobs that were not held before."""
        if claimed.damaged:
            self._metrics.count("tminus_durable_jobs_ended_total", "failed", by=claimed.damaged)
        found = [self._hold(record) for record in claimed.jobs if self._held.find(record.id) is None]
        for job in found:
            with traced("resume", {"tminus.job.id": job.record.id}):  # parent span of the job's task
                if job.record.crashes >= MOST_CRASHES:
                    self._tasks.spawn(self._fail(job, EngineFailed(FAILED_BY_CRASHES)))
                else:
                    self._tasks.spawn(self._run(job, None))
        if found:
            log.info("%d durable jobs that nobody works on are taken on", len(found))
            self._metrics.count("tminus_jobs_resumed_total", by=len(found))
        return found

    def cancel(self, job: HeldJob) -> None:
        """Cancel a job. `job.over` is set when the outcome is stored."""
        if job.state is HeldState.IN_WORKER:
            self._worker.cancel(job.record.id, "deleted")
        else:
            self._tasks.spawn(self._end(job, "cancelled"))

    def lose(self, job: HeldJob) -> None:
        """Stop working on a job that another replica holds or has ended."""
        if not job.may_become(HeldState.LOST):
            return
        log.warning("job %s is not held any more: nothing is made of it here", job.record.id)
        was_in_worker = job.state is HeldState.IN_WORKER
        self._held.move(job, HeldState.LOST)
        if was_in_worker:
            self._worker.cancel(job.record.id, LOST)
        self._metrics.count("tminus_durable_jobs_ended_total", LOST)

    def _hold(self, record: JobRecord) -> HeldJob:
        job = self._held.hold(record)
        if record.webhook is not None and "start" in record.webhook.events:
            self._retention.owe_start(job)
        return job

    async def _leave(self, job: HeldJob) -> None:
        """Leave a job that this process cannot finish to another replica or a later start."""
        if not job.may_become(HeldState.LEFT):  # a client cancelled the job, or the job is no longer held
            return
        self._held.move(job, HeldState.LEFT)
        if self._store.shared:
            with suppress(StorageFailed):  # if the release fails, the lease expires
                await self._store.call(SharedStore.release, job.record.id)
            if job.may_become(HeldState.ENDING):  # the job is still LEFT
                self._held.move(job, HeldState.LOST)

    # --- one job ---

    async def _run(self, job: HeldJob, ticket: Ticket | None) -> None:
        """Run a job to its end and store the outcome. ticket: None if the worker does not have the job yet."""
        try:
            if ticket is None:
                rows = job.record.spec.n
                if rows > self._model.limits.max_rows:
                    log.warning("job %s waits for a start with --max-rows %d or more", job.record.id, rows)
                    await self._leave(job)
                    return
                async with self._resuming:
                    ticket = await self._resume(job)
            result = await asyncio.wrap_future(ticket.future)
            images = await asyncio.to_thread(result.read)  # waits for a GPU, so it must not run in the store's thread
            await self._end(job, "done", images, fingerprint=self._model.info.fingerprint)
        except JobCancelled:
            await self._end(job, "cancelled")
        except (Draining, ModelUnloaded):
            log.info("job %s waits for a start with the weights %s", job.record.id, self._model.info.weights_hash[:16])
            await self._leave(job)
        except ServiceError as error:
            await self._fail(job, error)
        except Exception:
            log.exception("job %s could not be finished", job.record.id)
            await self._fail(job, ServiceError())

    async def _resume(self, job: HeldJob) -> Ticket:
        """Submit a job to the worker once there is room. Raises the error that ends the job."""
        record = job.record
        isolated = record.crashes > 0 or record.suspect
        # Load first: snapshots are looked up by the model's fingerprint, which is unknown before the model is loaded.
        await self._ensure_loaded(job)
        check_table(record.spec, self._model.info)
        work = work_of(record.spec, self._model.info, self._model.number)
        snapshot, inputs = await self._read(record)
        while record.id in self._worker.jobs:  # the job was lost earlier, and the worker has not dropped it yet
            await self._tasks.pause(ROOM_S)
        while True:
            if job.state is not HeldState.WAITING:
                raise JobCancelled("it was deleted")
            deadline_s = None if record.deadline_us is None else (record.deadline_us - self._store.now_us()) / 1e6
            if deadline_s is not None and deadline_s <= 0:
                raise DeadlinePassed(
                    "deadline_s passed before the job could begin", field="deadline_s", value=deadline_s
                )
            try:
                ticket = self._worker.resume(
                    NewJob(
                        record.id, record.spec, work, record.owner, deadline_s,
                        inputs=inputs, durable=True, snapshot=snapshot, isolated=isolated,
                    )
                )  # fmt: skip
            except (NotReady, Overloaded):
                await self._tasks.pause(ROOM_S)
            except ModelUnloaded:
                if self._model.retired:
                    raise
                await self._ensure_loaded(job)
            else:
                break
        step = min(snapshot.steps) if snapshot is not None else record.spec.start
        log.info("job %s goes on from step %d%s", record.id, step, ", in ticks of its own" if isolated else "")
        self._held.move(job, HeldState.IN_WORKER)
        return ticket

    async def _ensure_loaded(self, job: HeldJob) -> None:
        """Wait until the model is in memory or the job has left WAITING. Raises Draining or EngineFailed.

        Any other failure to load the checkpoint is retried.
        """
        while self.is_unloaded and job.state is HeldState.WAITING:
            try:
                await self._load_queue.load(self._model.name)
            except NotReady:
                await self._tasks.pause(ROOM_S)
            except (Draining, EngineFailed):
                raise
            except ServiceError as error:
                log.warning("jobs of %s wait for a retry in %g s: %s", self._model.name, LOAD_RETRY_S, error)
                await self._tasks.pause(LOAD_RETRY_S)

    async def _read(self, record: JobRecord) -> tuple[Snapshot | None, Inputs | None]:
        """Read a job's inputs, and its last snapshot made by this build.

        Raises StorageFailed if they cannot be read. An unreachable store is retried: a shared store indefinitely, a
        store file for FILE_AWAY_S. Damaged data is not retried.
        """
        until_s = math.inf if self._store.shared else time.monotonic() + FILE_AWAY_S
        call, has_inputs = self._store.call, record.spec.image_sha256 is not None
        while True:
            try:
                snapshot = await call(JobStore.snapshot, record.id, self._model.info.fingerprint)
                return snapshot, await call(JobStore.inputs, record.id) if has_inputs else None
            except StorageFailed as error:
                if error.damaged or time.monotonic() > until_s:
                    raise
            await self._tasks.pause(READ_RETRY_S)

    async def _fail(self, job: HeldJob, error: ServiceError) -> None:
        """Record a job as failed.

        If the worker crashed and this job is not known to be the cause, leave the job for the next start instead.
        """
        if isinstance(error, EngineFailed) and self._worker.state.crashed and not await self._causes_crashes(job):
            if job.may_become(HeldState.LEFT):
                job.become(HeldState.LEFT)  # the job stays held, so that only the next start runs it again
            return
        await self._end(job, "failed", problem=error.problem())

    async def _causes_crashes(self, job: HeldJob) -> bool:
        """Return True if this job causes crashes and must fail.

        Otherwise count the worker's crash in the store. Each job that ran at the crash reports the crash for all of
        these jobs, because a call to the store may fail. The store counts the crash only once.
        """
        crashed = self._worker.state.jobs_of_the_crash
        if job.record.id not in crashed:
            return False
        if len(crashed) == 1 and job.record.crashes + 1 >= MOST_CRASHES:
            return True
        with suppress(StorageFailed):
            await self._store.call(JobStore.crashed, crashed)
        return False

    async def _end(self, job: HeldJob, outcome: Outcome, images: Pixels | None = None, **fields: object) -> None:
        """Store the outcome of a job. Do nothing if another task already stores it or the job is no longer held."""
        if not job.may_become(HeldState.ENDING):
            return
        finished_us = self._store.now_us()
        ended = replace(job.record, outcome=outcome, finished_us=finished_us, **fields)  # type: ignore[arg-type]
        try:
            await self._retention.keep_end(job, ended, images)
        except LeaseLost:
            self.lose(job)
        except Draining:  # the job runs again after a restart
            pass
        else:
            self._metrics.count("tminus_durable_jobs_ended_total", outcome)
