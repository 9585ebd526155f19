"""Run each durable job of a model from acceptance, or from when it was claimed, to its end. Commands are in jobs.py.

One task for each job waits for the worker's result and keeps how the job ended, whatever happens to the client.

Some jobs end the server, by a crash of the worker or by the end of the whole process. Both count in the store against
the jobs that were worked on then. A job with a count steps in ticks of its own, so that the next such end is its own
doing or is not. Being killed from outside counts nothing, unless the server hung.

Servers that share a store take over each other's jobs before a restart has counted anything. Those jobs are suspects:
they step in ticks of their own too, and a server takes on one after another (postgres_store.py).
"""

import asyncio
import logging
import math
import time
from collections.abc import Coroutine, ValuesView
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
from tminus.service.jobs.held_job import HeldJob, HeldState
from tminus.service.jobs.leases import CLAIM_S, Leases
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import Claimed, JobRecord, LeaseLost, Outcome
from tminus.service.jobs.webhooks.deliverer import DELIVERY_S
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.preview import Mailbox, Pace, Watch
from tminus.service.scheduling.admission import Admission
from tminus.service.spec import Inputs, Pixels, Snapshot
from tminus.service.tracing import traced
from tminus.service.work import Outlook, Ticket, check_table, work_of
from tminus.service.worker.load_queue import LoadQueue
from tminus.service.worker.loop import LOST
from tminus.service.worker.running_job import NewJob
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

RETRY_S, ROOM_S = 5.0, 0.2  # until a store that failed, or a worker without slots, is asked again
LOAD_RETRY_S = 15.0  # until a model that could not be loaded is tried again
READ_RETRY_S = 1.0  # until a store that is away is asked again for a job that goes on
FILE_AWAY_S = 60.0  # that a file may be away: the other jobs of an earlier process wait behind this one
SWEEP_S = 10.0
LATE_S = 60.0  # for the last attempt to deliver a webhook to end
MOST_CRASHES = 2  # ends of the server, after which a job fails
FAILED_BY_CRASHES = f"the server ended {MOST_CRASHES} times while it worked on this job"


class Lifecycle:
    """Owns the durable jobs of one model that have not ended, and their tasks. In the event loop's thread only."""

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
        """model: its number. store: of the jobs of its weights. load_queue: where jobs of an unloaded model wait."""
        self.store, self.model, self.model_name = store, model, info.name
        self._worker = worker
        self._info = info  # what is told of the model, which may change while no job runs
        self.retired = False  # whether its model is served no more
        self._takes_on = False  # while jobs of an earlier process may still be found
        self._limits, self.metrics, self._load_queue = limits, metrics, load_queue
        self._held: dict[str, HeldJob] = {}  # changed here only
        self.leases = Leases(store, worker, admission, model, info, limits, self._held) if store.shared else None
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio holds tasks weakly
        self._beside = set[asyncio.Task[None]]()  # those of the tasks that are given up when the process ends
        self._renewing: asyncio.Task[None] | None = None
        self._resuming = asyncio.Lock()  # jobs of an earlier process enter the worker in order of arrival
        self._closing = asyncio.Event()
        self._idle = asyncio.Event()  # while there is no job
        self._idle.set()
        self._store_fails = False  # the last attempt to keep an end failed

    def change(self, info: ModelInfo, limits: Limits | None = None) -> None:
        """Note something else of the model from now on: its fingerprint is that of the jobs that end."""
        self._info, self._limits = info, limits or self._limits
        if self.leases is not None:
            self.leases.change(self._info, self._limits)

    @property
    def needs_model(self) -> bool:
        """Whether a job is in the worker, or waits for it and not until the model is back in memory."""
        states = (HeldState.IN_WORKER,) if self.is_unloaded else (HeldState.IN_WORKER, HeldState.WAITING)
        return any(job.state in states for job in self._held.values())

    async def start(self, *, take_on: bool = True) -> None:
        """Take on what an earlier process accepted and did not finish; later, if the store cannot be opened yet.

        take_on: False where the jobs of this store that have not ended are another Lifecycle's.
        """
        if self.leases is not None:
            with suppress(StorageFailed):
                await self._renew(self.leases)  # first, so that others know that it lives
            self._renewing = asyncio.create_task(self._renew_until_closed(self.leases))
            self._spawn(self._claim_until_closed(self.leases))
        elif take_on:
            try:
                self.take_on(await self.store.claim_all())
            except StorageFailed:
                self._takes_on = True
                self._idle.clear()
                self.do_beside(self._take_on_later())
        self.do_beside(self._sweep_until_closed())

    def take_on(self, claimed: Claimed) -> None:
        """Work on jobs that are held now, from their last snapshots on."""
        for _ in range(claimed.damaged):
            self.metrics.durable_job_ended("failed")
        found = [record for record in claimed.jobs if record.id not in self._held]
        for record in found:
            job = self._hold(record)
            with traced("resume", {"tminus.job.id": record.id}):  # what is done for it is a part of that
                if record.crashes >= MOST_CRASHES:
                    self._spawn(self._fail(job, EngineFailed(FAILED_BY_CRASHES)))
                else:
                    self._spawn(self._run(job, None))
        if found:
            log.info("%d durable jobs that nobody works on are taken on", len(found))
            self.metrics.jobs_resumed(len(found))

    async def _take_on_later(self) -> None:
        while self._takes_on:
            await asyncio.sleep(RETRY_S)
            with suppress(StorageFailed):
                self.take_on(await self.store.claim_all())
                self._takes_on = False
        self._look_idle()

    async def close(self) -> None:
        """Keep how jobs ended, as far as the store can. Call it when the worker has ended, or there are no jobs."""
        self._closing.set()
        for task in self._beside:  # which may wait for an object store or a receiver that does not answer
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._renewing is not None:  # until now: a result may take longer to write than a lease lasts
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)

    async def idle(self) -> None:
        """Wait until there is no job that has not ended, or that this process cannot end."""
        with suppress(Draining):
            while True:
                await self._idle.wait()
                if self.leases is None or (await self.leases.last_is_claimed() and self._idle.is_set()):
                    return
                await self.pause(CLAIM_S)

    def _look_idle(self) -> None:
        if not self._takes_on and all(job.state is HeldState.LEFT for job in self._held.values()):
            self._idle.set()

    # --- jobs that come and go ---

    def accept(self, record: JobRecord, ticket: Ticket) -> None:
        """Take on a job that the store keeps and the worker has."""
        job = self._hold(record)
        self._enter_worker(job)
        self._spawn(self._run(job, ticket))

    @property
    def is_unloaded(self) -> bool:
        """Whether the model is served and not in memory, so that `accept_later` takes its jobs."""
        return not self.retired and self._load_queue.is_unloaded(self.model_name)

    def check_room(self) -> Outlook:
        """Return what a job is told that waits for the model to come in. Raises Overloaded where too many do."""
        left_s, most, waiting = self._load_queue.expected_s(self.model_name), self._limits.max_jobs, len(self._held)
        if waiting >= most:
            raise Overloaded(
                f"{waiting} jobs wait until the model is in memory", retry_after_s=max(1, math.ceil(left_s)),
                field="jobs", value=waiting + 1, bound=f"at most {most}",
            )  # fmt: skip
        return Outlook(waiting, left_s)

    def accept_later(self, record: JobRecord) -> None:
        """Take on a job that the store keeps, and that enters the worker when the model is in memory."""
        self._spawn(self._run(self._hold(record), None))

    def _hold(self, record: JobRecord) -> HeldJob:
        job = self._held[record.id] = HeldJob(record, self.model, self.model_name)
        self._idle.clear()
        if record.webhook is not None and "start" in record.webhook.events:
            mailbox = Mailbox(asyncio.get_running_loop(), lambda: None)
            watch = Watch(Pace(every=1), (), mailbox.put)
            self.watch(job, watch, mailbox)
            self.do_beside(self._owe_start(job, watch, mailbox))
        return job

    def _enter_worker(self, job: HeldJob) -> None:
        job.become(HeldState.IN_WORKER)
        for watch in job.viewers:
            self._worker.watch(job.record.id, watch)

    def _drop(self, job: HeldJob, state: HeldState) -> None:
        """Hold a job no more, in its last state."""
        self._held.pop(job.record.id, None)
        job.become(state)
        self._look_idle()

    def _lose(self, job: HeldJob) -> None:
        """Stop working on a job that is another's now, or was ended elsewhere."""
        if not job.may_become(HeldState.LOST):
            return
        log.warning("job %s is not held any more: nothing is made of it here", job.record.id)
        was_in_worker = job.state is HeldState.IN_WORKER
        self._drop(job, HeldState.LOST)
        if was_in_worker:
            self._worker.cancel(job.record.id, LOST)
        self.metrics.durable_job_ended(LOST)

    async def _leave(self, job: HeldJob) -> None:
        """Leave a job that this process does not end to others, or to a later start."""
        if not job.may_become(HeldState.LEFT):  # a client has cancelled it, or it is not held any more
            return
        job.become(HeldState.LEFT)
        self._look_idle()
        if self.store.shared:
            with suppress(StorageFailed):  # then its lease ends
                await self.store.call(JobStore.release, job.record.id)
            if job.may_become(HeldState.ENDING):  # nothing else has become of it meanwhile
                self._drop(job, HeldState.LOST)

    async def _owe_start(self, job: HeldJob, watch: Watch, mailbox: Mailbox) -> None:
        """Owe it to a job's webhook that the job has begun, once it has taken a step."""
        begun = await mailbox.take() is not None  # else it has ended, or is another server's
        self.unwatch(job, watch)
        if begun:
            with suppress(StorageFailed):  # then it is owed when the job is done
                await self.store.call(JobStore.started, job.record)

    # --- for the commands of clients ---

    def find(self, job_id: str) -> HeldJob | None:
        """Look up one job; None if it has ended, or is not durable, or does not exist."""
        return self._held.get(job_id)

    def all(self) -> ValuesView[HeldJob]:
        """Return every durable job that has not ended and is held here."""
        return self._held.values()

    @property
    def cannot_keep(self) -> bool:
        """Whether jobs have ended whose ends cannot be kept."""
        fails = self._store_fails or self.store.failure  # of two stores one may still take small results
        return bool(fails) and any(job.state is HeldState.ENDING for job in self._held.values())

    def cancel(self, job: HeldJob) -> None:
        """Give a job up; `job.over` is set when that is kept."""
        if job.state is HeldState.IN_WORKER:
            self._worker.cancel(job.record.id, "deleted")
        else:
            self._spawn(self._end(job, "cancelled"))

    async def cancel_elsewhere(self, record: JobRecord) -> bool:
        """End a job that another replica holds, or nobody; False if it has ended. Its holder learns it by renewing."""
        cancelled = self.store.shared and await self.store.call(JobStore.cancel, record.id)
        if not cancelled:
            return False
        if (job := self.find(record.id)) is not None:
            self._lose(job)
        elif not record.held:  # else its holder counts it as lost
            self.metrics.durable_job_ended("cancelled")
        return True

    def watch(self, job: HeldJob, watch: Watch, mailbox: Mailbox) -> None:
        """Show a job to a viewer, whose mailbox is closed when nothing more is made of it here."""
        job.viewers[watch] = mailbox
        if job.state is HeldState.IN_WORKER:
            self._worker.watch(job.record.id, watch)

    def unwatch(self, job: HeldJob, watch: Watch) -> None:
        """Show a job to a viewer no more."""
        job.viewers.pop(watch, None)
        self._worker.unwatch(job.record.id, watch)

    # --- one job ---

    async def _run(self, job: HeldJob, ticket: Ticket | None) -> None:
        """Bring a job to its end, and keep that. Without a ticket the worker does not have it yet."""
        try:
            if ticket is None:
                rows = job.record.spec.n
                if rows > self._limits.max_rows:
                    log.warning("job %s waits for a start with more --max-rows than %d", job.record.id, rows)
                    await self._leave(job)
                    return
                async with self._resuming:
                    ticket = await self._resume(job)
            result = await asyncio.wrap_future(ticket.future)
            images = await asyncio.to_thread(result.read)  # waits for a GPU, so not in the store's thread
            await self._end(job, "done", images, fingerprint=self._info.fingerprint)
        except JobCancelled:
            await self._end(job, "cancelled")
        except (Draining, ModelUnloaded):
            log.info("job %s waits for a start with the weights %s", job.record.id, self._info.weights_hash[:16])
            await self._leave(job)
        except ServiceError as error:
            await self._fail(job, error)
        except Exception:
            log.exception("job %s could not be finished", job.record.id)
            await self._fail(job, ServiceError())

    async def _resume(self, job: HeldJob) -> Ticket:
        """Give the worker a job of an earlier process, when it has room. Raises what ends the job."""
        record = job.record
        alone = record.crashes > 0 or record.suspect
        await self._ensure_loaded(job)  # only then its fingerprint is known, by which there may be a snapshot
        check_table(record.spec, self._info)
        work = work_of(record.spec, self._info, self.model)
        snapshot, inputs = await self._read(record)
        while record.id in self._worker.jobs:  # it was lost here, and the worker has not given it up yet
            await self.pause(ROOM_S)
        while True:
            if job.state is not HeldState.WAITING:
                raise JobCancelled("it was deleted")
            deadline_s = None if record.deadline_us is None else (record.deadline_us - self.store.now_us()) / 1e6
            if deadline_s is not None and deadline_s <= 0:
                raise DeadlinePassed(
                    "deadline_s passed before the job could begin", field="deadline_s", value=deadline_s
                )
            try:
                ticket = self._worker.resume(
                    NewJob(
                        record.id, record.spec, work, record.owner, deadline_s,
                        inputs=inputs, durable=True, snapshot=snapshot, alone=alone,
                    )
                )  # fmt: skip
            except (NotReady, Overloaded):
                await self.pause(ROOM_S)
            except ModelUnloaded:
                if self.retired:
                    raise
                await self._ensure_loaded(job)
            else:
                break
        step = min(snapshot.steps) if snapshot is not None else record.spec.start
        log.info("job %s goes on from step %d%s", record.id, step, ", in ticks of its own" if alone else "")
        self._enter_worker(job)
        return ticket

    async def _ensure_loaded(self, job: HeldJob) -> None:
        """Wait until the model is in memory, or the job is not to be worked on any more. Raises Draining.

        A checkpoint that cannot be loaded is tried again.
        """
        while self.is_unloaded and job.state is HeldState.WAITING:
            try:
                await self._load_queue.load(self.model_name)
            except NotReady:
                await self.pause(ROOM_S)
            except (Draining, EngineFailed):
                raise
            except ServiceError as error:
                log.warning("jobs of %s wait, and it is tried again in %g s: %s", self.model_name, LOAD_RETRY_S, error)
                await self.pause(LOAD_RETRY_S)

    async def _read(self, record: JobRecord) -> tuple[Snapshot | None, Inputs | None]:
        """Read a job's last snapshot by this build, and its inputs. Raises StorageFailed where they cannot be read.

        A store that is away is waited for: the job is held, and what is kept of it is not damaged.
        """
        until_s = math.inf if self.store.shared else time.monotonic() + FILE_AWAY_S
        while True:
            try:
                snapshot = await self.store.call(JobStore.snapshot, record.id, self._info.fingerprint)
                return snapshot, await self.store.call(JobStore.inputs, record.id) if record.spec.image_sha256 else None
            except StorageFailed as error:
                if error.damaged or time.monotonic() > until_s:
                    raise
            await self.pause(READ_RETRY_S)

    async def _fail(self, job: HeldJob, error: ServiceError) -> None:
        """Record a job as failed.

        After a crash of the worker leave it for the next start, unless this job causes the crashes.
        """
        if isinstance(error, EngineFailed) and self._worker.state.crashed and not await self._causes_crashes(job):
            if job.may_become(HeldState.LEFT):
                job.become(HeldState.LEFT)  # it stays held, so that it is not begun anew before the next start
            return
        await self._end(job, "failed", problem=error.problem())

    async def _causes_crashes(self, job: HeldJob) -> bool:
        """Count the crash of the worker. Return whether this job is convicted by it and must fail.

        Each of its jobs counts it for all, as the store may fail for one; of several, the store counts it once.
        """
        crashed = self._worker.state.jobs_of_the_crash
        if job.record.id not in crashed:
            return False
        if len(crashed) == 1 and job.record.crashes + 1 >= MOST_CRASHES:
            return True
        with suppress(StorageFailed):
            await self.store.call(JobStore.crashed, crashed)
        return False

    async def _end(self, job: HeldJob, outcome: Outcome, images: Pixels | None = None, **fields: object) -> None:
        """Keep how a job ended. Until the store can, clients are not told that it has; a restart would run it again."""
        if not job.may_become(HeldState.ENDING):  # another task does this already, or it is not held any more
            return
        finished_us = self.store.now_us()
        record = replace(job.record, outcome=outcome, finished_us=finished_us, **fields)  # type: ignore[arg-type]
        job.ending = record
        job.become(HeldState.ENDING)
        while True:
            try:
                await self.store.finish(record, images)
                self._store_fails = False
                break
            except LeaseLost:
                self._lose(job)
                return
            except Exception as error:
                self._store_fails = True
                if not isinstance(error, StorageFailed):  # which the store has logged
                    log.exception("the end of job %s could not be kept", record.id)
                try:
                    await self.pause(RETRY_S)
                except Draining:
                    return
        job.record = record
        self._drop(job, HeldState.ENDED)
        self.metrics.durable_job_ended(outcome)
        if record.suspect and self.leases is not None:  # the next of them waits for this
            self._spawn(self._claim(self.leases))

    # --- what goes on beside the jobs ---

    async def _renew(self, leases: Leases) -> None:
        for job in await leases.renew():
            self._lose(job)
        await leases.look()

    async def _renew_until_closed(self, leases: Leases) -> None:
        """Renew in time until the model is unloaded, or this is cancelled."""
        while not leases.ended:
            await asyncio.sleep(leases.renewed_every_s)
            try:
                if not leases.ended:
                    await self._renew(leases)
            except StorageFailed:
                leases.load = None
            except Exception:  # a replica that does not renew works for nothing
                log.exception("the leases of jobs could not be renewed")

    async def _claim_until_closed(self, leases: Leases) -> None:
        """Take on what nobody holds, until the process ends or the model is to be unloaded."""
        with suppress(Draining):
            while not leases.ended:
                await self._claim(leases)
                await self.pause(CLAIM_S)

    async def _claim(self, leases: Leases) -> None:
        try:
            # A replica that cannot store results would claim jobs and finish none.
            if not (leases.ended or self.cannot_keep or (self.retired and leases.others_serve)):
                async with self.store.turn:
                    self.take_on(await leases.claim())
        except StorageFailed:
            pass
        except Exception:
            log.exception("jobs could not be claimed")

    async def _sweep_until_closed(self) -> None:
        """Delete jobs that ended long ago, or of which there are too many, now and then."""
        keep_us, keep_bytes = round(self._limits.keep_jobs_s * 1e6), self._limits.keep_jobs_bytes
        owed_us = round((DELIVERY_S + LATE_S) * 1e6)
        while True:
            with suppress(StorageFailed):
                await self.store.check()
                now_us, again = self.store.now_us(), True
                while again:  # in parts, so that other calls of the store come between
                    again = await self.store.sweep(now_us - keep_us, keep_bytes, now_us - owed_us)
            await asyncio.sleep(SWEEP_S)

    # --- the process ---

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._tasks.discard)
        return task

    def do_beside(self, work: Coroutine[None, None, None]) -> None:
        """Do what is given up when the process ends."""
        self._beside.add(task := self._spawn(work))
        task.add_done_callback(self._beside.discard)

    async def pause(self, seconds: float) -> None:
        """Sleep. Raises Draining when the process ends."""
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return
        raise Draining
