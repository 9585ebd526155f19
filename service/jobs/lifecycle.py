"""Run each durable job of a model from acceptance, or from when it was claimed, to its end. Commands are in jobs.py.

One task for each job waits for the worker's result and keeps how the job ended, whatever happens to the client.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence, ValuesView
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
from tminus.service.jobs.crashes import causes_crashes, failure, is_failed
from tminus.service.jobs.leases import CLAIM_S, Leases
from tminus.service.jobs.live import Live
from tminus.service.jobs.resuming import kept_of
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.contract import JobRecord, LeaseLost, Outcome
from tminus.service.jobs.sweeping import sweep_until_closed
from tminus.service.jobs.webhooks.start_notice import notice_start
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.scheduling.admission import Admission
from tminus.service.spec import Images
from tminus.service.tracing import traced
from tminus.service.work import Ticket
from tminus.service.worker.loop import LOST
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

RETRY_S, ROOM_S = 5.0, 0.2  # until a store that failed, or a worker without slots, is asked again


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
        deliver: "Callable[[Lifecycle], Coroutine[None, None, None]] | None" = None,
    ) -> None:
        """model: its number. store: of the jobs of its weights. deliver: sends what their webhooks are to be told."""
        self.store, self.model, self.model_name = store, model, info.name
        self._worker, self._fingerprint, self._weights = worker, info.fingerprint, info.weights_hash[:16]
        self.retired = False  # whether its model is served no more
        self._takes_on = False  # while jobs of an earlier process may still be found
        self._limits, self.metrics, self._deliver = limits, metrics, deliver
        self.leases = Leases(store, worker, admission, model, info, limits, self) if store.shared else None
        self._live: dict[str, Live] = {}  # changed here only
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio holds tasks weakly
        self._renewing, self._beside = set[asyncio.Task[None]](), set[asyncio.Task[None]]()
        self._resuming = asyncio.Lock()  # jobs of an earlier process enter the worker in order of arrival
        self._closing = asyncio.Event()
        self._idle = asyncio.Event()  # while there is no job
        self._idle.set()
        self._store_fails = False  # the last attempt to keep an end failed

    async def start(self, *, take_on: bool = True) -> None:
        """Take on what an earlier process accepted and did not finish; later, if the store cannot be opened yet.

        take_on: False where the jobs of this store that have not ended are another Lifecycle's.
        """
        if self.leases is not None:
            with suppress(StorageFailed):
                await self.leases.renew()  # first, so that others know that it lives
            self._renewing.add(asyncio.create_task(self.leases.renew_until_closed()))
            self._spawn(self.leases.claim_until_closed())
        elif take_on:
            try:
                self.take_on(await self.store.claim_all())
            except StorageFailed:
                self._takes_on = True
                self._idle.clear()
                self._spawn(self._take_on_later())
        self._beside.add(self._spawn(sweep_until_closed(self.store, self._limits, self.pause)))
        if self._deliver is not None:
            self._beside.add(self._spawn(self._deliver(self)))

    def take_on(self, records: Sequence[JobRecord]) -> None:
        """Work on jobs that are held now, from their last snapshots on."""
        for _ in range(self.store.take_damaged()):
            self.metrics.durable_job_ended("failed")
        found = [record for record in records if record.id not in self._live]
        for record in found:
            live = self._add(Live(record, self.model, self.model_name))
            with traced("resume", {"tminus.job.id": record.id}):  # what is done for it is a part of that
                self._spawn(self._fail(live, failure()) if is_failed(record) else self._run(live, None))
        if found:
            log.info("%d durable jobs that nobody works on are taken on", len(found))
            self.metrics.jobs_resumed(len(found))

    def lose(self, live: Live) -> None:
        """Stop working on a job that is another's now, or was ended elsewhere."""
        if live.lost:
            return
        log.warning("job %s is not held any more: nothing is made of it here", live.record.id)
        self._drop(live)
        if live.submitted:
            self._worker.cancel(live.record.id, LOST)
        self.metrics.durable_job_ended(LOST)

    async def _release(self, live: Live) -> None:
        """Leave a job that this process does not end to others, or to a later start."""
        live.release_viewers()
        if self.store.shared:
            with suppress(StorageFailed):  # then its lease ends
                await self.store.release(live.record.id)
            self._drop(live)

    def _drop(self, live: Live) -> None:
        live.lost = True
        self._live.pop(live.record.id, None)
        self._look_idle()
        live.release_viewers()
        live.ended.set()

    async def _take_on_later(self) -> None:
        while True:
            try:
                await self.pause(RETRY_S)
                self.take_on(await self.store.claim_all())
            except StorageFailed:
                continue
            except Draining:
                pass
            self._takes_on = False
            self._look_idle()
            return

    async def close(self) -> None:
        """Keep how jobs ended, as far as the store can. Call it when the worker has ended, or there are no jobs."""
        self._closing.set()
        for task in self._beside:  # which may wait for an object store or a receiver that does not answer
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for task in self._renewing:  # until now: a result may take longer to write than a lease lasts
            task.cancel()
        await asyncio.gather(*self._renewing, return_exceptions=True)

    async def idle(self) -> None:
        """Wait until there is no job that has not ended, or that this process cannot end."""
        with suppress(Draining):
            while True:
                await self._idle.wait()
                if self.leases is None or (await self.leases.last_is_claimed() and self._idle.is_set()):
                    return
                await self.pause(CLAIM_S)

    def _add(self, live: Live) -> Live:
        self._live[live.record.id] = live
        self._idle.clear()
        notice_start(live, self._worker, self.store, self._spawn)
        return live

    def _look_idle(self) -> None:
        if not self._takes_on and all(live.parked for live in self._live.values()):
            self._idle.set()

    # --- for the commands of clients ---

    def find(self, job_id: str) -> Live | None:
        """One job; None if it has ended, or is not durable, or does not exist."""
        return self._live.get(job_id)

    def all(self) -> ValuesView[Live]:
        """Every durable job that has not ended."""
        return self._live.values()

    @property
    def cannot_keep(self) -> bool:
        """Whether jobs have ended whose ends cannot be kept."""
        fails = self._store_fails or self.store.failure  # of two stores one may still take small results
        return bool(fails) and any(live.ending for live in self._live.values())

    def accept(self, record: JobRecord, ticket: Ticket) -> None:
        """Take on a job that the store keeps and the worker has."""
        live = self._add(Live(record, self.model, self.model_name, submitted=True))
        self._spawn(self._run(live, ticket))

    def cancel(self, live: Live) -> None:
        """Give a job up; `live.ended` is set when that is kept."""
        if live.submitted:
            self._worker.cancel(live.record.id, "deleted")
        elif live.ending is None:
            self._spawn(self._end(live, self._ending(live.record, "cancelled")))

    # --- one job ---

    async def _run(self, live: Live, ticket: Ticket | None) -> None:
        """Bring a job to its end, and keep that. Without a ticket the worker does not have it yet."""
        try:
            if ticket is None:
                if live.record.spec.n > self._limits.max_rows:
                    log.warning(
                        "job %s waits for a start with more --max-rows than %d", live.record.id, live.record.spec.n
                    )
                    live.parked = True
                    self._look_idle()
                    return
                async with self._resuming:
                    ticket = await self._resume(live)
            result = await asyncio.wrap_future(ticket.future)
            images = await asyncio.to_thread(result.read)  # waits for a GPU, so not in the store's thread
            await self._end(live, self._ending(live.record, "done", fingerprint=self._fingerprint), images)
        except JobCancelled:
            if not live.lost:
                await self._end(live, self._ending(live.record, "cancelled"))
        except (Draining, ModelUnloaded):
            log.info("job %s waits for a start with the weights %s", live.record.id, self._weights)
            await self._release(live)
        except ServiceError as error:
            await self._fail(live, error)
        except Exception:
            log.exception("job %s could not be finished", live.record.id)
            await self._fail(live, ServiceError("something went wrong on the server; its log has the details"))

    async def _resume(self, live: Live) -> Ticket:
        """Give the worker a job of an earlier process, when it has room. Raises what ends the job."""
        record = live.record
        # What a replica left behind may have ended it: until that has started again, nobody knows.
        alone = record.crashes > 0 or record.left_behind
        snapshot, inputs = await kept_of(self.store, record, self._fingerprint, self.pause)
        while record.id in self._worker.jobs:  # it was lost here, and the worker has not given it up yet
            await self.pause(ROOM_S)
        while True:
            if live.ending is not None or live.lost:
                raise JobCancelled("it was deleted")
            deadline_s = None if record.deadline_us is None else (record.deadline_us - self.store.now_us()) / 1e6
            if deadline_s is not None and deadline_s <= 0:
                raise DeadlinePassed(
                    "deadline_s passed while the server was down", field="deadline_s", value=deadline_s
                )
            try:
                ticket = self._worker.resume(
                    record.id, record.spec, deadline_s, inputs, snapshot,
                    model=self.model, owner=record.owner, alone=alone,
                )  # fmt: skip
            except (NotReady, Overloaded):
                await self.pause(ROOM_S)
            else:
                break
        step = min(snapshot.steps) if snapshot is not None else record.spec.start
        log.info("job %s goes on from step %d%s", record.id, step, ", in ticks of its own" if alone else "")
        live.submitted = True
        for watch, _ in live.viewers:
            self._worker.watch(record.id, watch)
        return ticket

    async def _fail(self, live: Live, error: ServiceError) -> None:
        """Record a job as failed.

        After a crash of the worker leave it for the next start, unless this job causes the crashes.
        """
        of_the_crash = isinstance(error, EngineFailed) and self._worker.crashed
        if of_the_crash and not await causes_crashes(self.store, live.record, self._worker.jobs_of_the_crash):
            live.release_viewers()
            return
        await self._end(live, self._ending(live.record, "failed", problem=error.problem()))

    async def _end(self, live: Live, record: JobRecord, images: Images | None = None) -> None:
        """Keep how a job ended. Until the store can, clients are not told that it has; a restart would run it again."""
        if live.ending is not None:  # another task does this already
            return
        live.ending = record
        while True:
            try:
                await self.store.finish(record, images)
                self._store_fails = False
                break
            except LeaseLost:
                self.lose(live)
                return
            except Exception as error:
                self._store_fails = True
                if not isinstance(error, StorageFailed):  # which the store has logged
                    log.exception("the end of job %s could not be kept", record.id)
                try:
                    await self.pause(RETRY_S)
                except Draining:
                    return
        live.record = record
        del self._live[record.id]
        self._look_idle()
        self.metrics.durable_job_ended(record.outcome or "")
        live.release_viewers()
        live.ended.set()

    # --- the process ---

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._tasks.discard)
        return task

    async def pause(self, seconds: float) -> None:
        """Sleep. Raises Draining when the process ends."""
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return
        raise Draining

    def _ending(self, record: JobRecord, outcome: Outcome, **fields: object) -> JobRecord:
        return replace(record, outcome=outcome, finished_us=self.store.now_us(), **fields)  # type: ignore[arg-type]
