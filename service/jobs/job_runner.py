"""Runs each durable job of a model from acceptance, or from when it was claimed, to its end. Commands are in jobs.py.

One task for each job waits for the worker's result and keeps how the job ended, whatever happens to the client.

A job may end the server, by a crash of the worker or of the whole process. The store counts such a crash against the
jobs that were worked on then. A job with a count steps in ticks of its own: the next crash shows whether it is the
cause. A kill from outside counts nothing, unless the server hung.

Servers that share a store take over each other's jobs before a restart has counted anything. Those jobs are suspects:
they step in ticks of their own too, and a server takes on one after another (shared_store.py).
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

ROOM_S = 0.2  # until a worker without slots is asked again
LOAD_RETRY_S = 15.0  # until a model that could not be loaded is tried again
READ_RETRY_S = 1.0  # until a store that is away is asked again for a job that goes on
FILE_AWAY_S = 60.0  # for a file to come back: the other jobs of an earlier process wait behind this one
MOST_CRASHES = 2  # of the server, after which a job fails
FAILED_BY_CRASHES = f"the server ended {MOST_CRASHES} times while it worked on this job"


class JobRunner:
    """Takes each held job from one state to the next. In the event loop's thread only."""

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
        """load_queue: where jobs of an unloaded model wait."""
        self._store, self._worker, self._model, self._held = store, worker, model, held
        self._retention, self._tasks, self._metrics, self._load_queue = retention, tasks, metrics, load_queue
        self._resuming = asyncio.Lock()  # jobs of an earlier process enter the worker in order of arrival

    # --- jobs that come and go ---

    @property
    def is_unloaded(self) -> bool:
        """Whether the model is served and not in memory, so that a job waits for it."""
        return not self._model.retired and self._load_queue.is_unloaded(self._model.name)

    def check_room(self) -> Outlook:
        """Return the outlook of a job that waits until the model is in memory. Raises Overloaded if too many wait."""
        left_s = self._load_queue.expected_s(self._model.name)
        waiting, most = len(self._held), self._model.limits.max_jobs
        if waiting >= most:
            raise Overloaded(
                f"{waiting} jobs wait until the model is in memory", retry_after_s=max(1, math.ceil(left_s)),
                field="jobs", value=waiting + 1, bound=f"at most {most}",
            )  # fmt: skip
        return Outlook(waiting, left_s)

    def accept(self, record: JobRecord, ticket: Ticket | None) -> None:
        """Run a job that the store keeps.

        ticket: of the worker. Without one the job enters the worker when the model is in memory.
        """
        job = self._hold(record)
        if ticket is not None:
            self._held.move(job, HeldState.IN_WORKER)
        self._tasks.spawn(self._run(job, ticket))

    def take_on(self, claimed: Claimed) -> list[HeldJob]:
        """Run jobs that were claimed, from their last snapshots on. Returns the jobs that were not held before."""
        if claimed.damaged:
            self._metrics.count("tminus_durable_jobs_ended_total", "failed", by=claimed.damaged)
        found = [self._hold(record) for record in claimed.jobs if self._held.find(record.id) is None]
        for job in found:
            with traced("resume", {"tminus.job.id": job.record.id}):  # the spans of the job's task are parts of this
                if job.record.crashes >= MOST_CRASHES:
                    self._tasks.spawn(self._fail(job, EngineFailed(FAILED_BY_CRASHES)))
                else:
                    self._tasks.spawn(self._run(job, None))
        if found:
            log.info("%d durable jobs that nobody works on are taken on", len(found))
            self._metrics.count("tminus_jobs_resumed_total", by=len(found))
        return found

    def cancel(self, job: HeldJob) -> None:
        """Give a job up. `job.over` is set when its end is kept."""
        if job.state is HeldState.IN_WORKER:
            self._worker.cancel(job.record.id, "deleted")
        else:
            self._tasks.spawn(self._end(job, "cancelled"))

    def lose(self, job: HeldJob) -> None:
        """Stop working on a job that another replica has now, or has ended."""
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
        """Leave a job that this process does not end to others, or to a later start."""
        if not job.may_become(HeldState.LEFT):  # a client has cancelled it, or it is not held any more
            return
        self._held.move(job, HeldState.LEFT)
        if self._store.shared:
            with suppress(StorageFailed):  # then its lease ends
                await self._store.call(SharedStore.release, job.record.id)
            if job.may_become(HeldState.ENDING):  # nothing else has become of it meanwhile
                self._held.move(job, HeldState.LOST)

    # --- one job ---

    async def _run(self, job: HeldJob, ticket: Ticket | None) -> None:
        """Bring a job to its end, and keep that. Without a ticket the worker does not have it yet."""
        try:
            if ticket is None:
                rows = job.record.spec.n
                if rows > self._model.limits.max_rows:
                    log.warning("job %s waits for a start with more --max-rows than %d", job.record.id, rows)
                    await self._leave(job)
                    return
                async with self._resuming:
                    ticket = await self._resume(job)
            result = await asyncio.wrap_future(ticket.future)
            images = await asyncio.to_thread(result.read)  # waits for a GPU, so not in the store's thread
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
        """Give the worker a job of an earlier process, when it has room. Raises what ends the job."""
        record = job.record
        isolated = record.crashes > 0 or record.suspect
        await self._ensure_loaded(job)  # a snapshot is found by the fingerprint, which is known only then
        check_table(record.spec, self._model.info)
        work = work_of(record.spec, self._model.info, self._model.number)
        snapshot, inputs = await self._read(record)
        while record.id in self._worker.jobs:  # it was lost here, and the worker has not given it up yet
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
        """Wait until the model is in memory, or the job is not to be worked on any more. Raises Draining.

        A checkpoint that cannot be loaded is tried again.
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
        """Read a job's last snapshot by this build, and its inputs. Raises StorageFailed where they cannot be read.

        A store that is away is waited for: the job is held, and what is kept of it is not damaged.
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

        After a crash of the worker leave it for the next start, unless this job causes the crashes.
        """
        if isinstance(error, EngineFailed) and self._worker.state.crashed and not await self._causes_crashes(job):
            if job.may_become(HeldState.LEFT):
                job.become(HeldState.LEFT)  # it stays held, so that it does not begin again before the next start
            return
        await self._end(job, "failed", problem=error.problem())

    async def _causes_crashes(self, job: HeldJob) -> bool:
        """Count the crash of the worker. Return whether this job causes the crashes, and must fail.

        Each job of the crash counts it for all, since the store may fail for one; the store counts it once.
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
        """Keep how a job ended, unless another task does, or the job is not held any more."""
        if not job.may_become(HeldState.ENDING):
            return
        finished_us = self._store.now_us()
        ended = replace(job.record, outcome=outcome, finished_us=finished_us, **fields)  # type: ignore[arg-type]
        try:
            await self._retention.keep_end(job, ended, images)
        except LeaseLost:
            self.lose(job)
        except Draining:  # a restart runs it again
            pass
        else:
            self._metrics.count("tminus_durable_jobs_ended_total", outcome)
