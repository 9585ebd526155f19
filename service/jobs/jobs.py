"""Durable jobs: accepted once, they are finished, whatever happens to the client or to this process.

The store says what was accepted and how it ended, the worker does it; this brings the two together.
"""

import asyncio
import logging
import math
import uuid
from collections.abc import Collection, Coroutine
from dataclasses import replace

from service.errors import (
    DeadlinePassed,
    Draining,
    EngineFailed,
    JobCancelled,
    JobNotDone,
    JobNotFound,
    KeyReused,
    NoImages,
    NotReady,
    Overloaded,
    ServiceError,
    StorageFailed,
    short,
)
from service.jobs.store import OUTCOMES, JobRecord, Key, Outcome, Place, now_us
from service.jobs.store_thread import StoreThread
from service.jobs.views import JobView, Live, ended_view, live_view, passing_view
from service.metrics import Metrics
from service.model_info import Limits, ModelInfo
from service.preview import Watch
from service.spec import Images, Inputs, SampleSpec
from service.work import JobStatus, Ticket
from service.worker.mailbox import Mailbox
from service.worker.worker import Worker

log = logging.getLogger(__name__)

SWEEP_S = 10.0
RETRY_S = 5.0  # until a store that failed is tried again
ROOM_S = 0.2  # until a worker that warms up, or has no slots, is asked again
CANCEL_S = 10.0  # for a tick to end, and the store to keep that
MAX_CRASHES = 3  # of the worker while it had the job in hand; then it is the job


class Jobs:
    """Owns the durable jobs that have not ended. In the event loop's thread only."""

    def __init__(self, thread: StoreThread, worker: Worker, model: ModelInfo, limits: Limits, metrics: Metrics) -> None:
        self._thread, self._store, self._worker = thread, thread.store, worker
        self._model, self._limits, self._metrics = model, limits, metrics
        self._live: dict[str, Live] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio holds tasks weakly
        self._door = asyncio.Lock()  # who was accepted by an earlier process enters in the order of arrival
        self._closing = asyncio.Event()
        self._store_fails = False  # it could not keep an end when it was last asked to

    # --- the process's life ---

    async def start(self) -> None:
        """Take on what an earlier process accepted and did not finish."""
        for record in await self._thread.call(self._store.unfinished):
            self._live[record.id] = live = Live(record)
            self._spawn(self._see_through(live, None))
        if self._live:
            log.info("%d durable jobs of an earlier start go on", len(self._live))
            self._metrics.jobs_resumed(len(self._live))
        self._spawn(self._sweep_now_and_then())

    async def close(self) -> None:
        """Let what has ended be kept, as far as the store can. Call it when the worker has ended."""
        self._closing.set()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            self._thread.close()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pause(self, seconds: float) -> None:
        """Sleep. Raises Draining when the process ends."""
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return
        raise Draining

    async def _sweep_now_and_then(self) -> None:
        keep_us, keep_bytes = round(self._limits.keep_jobs_s * 1e6), self._limits.keep_jobs_bytes
        while not self._closing.is_set():
            try:
                while await self._thread.call(self._store.sweep, now_us() - keep_us, keep_bytes):
                    if self._closing.is_set():
                        return
            except StorageFailed:
                pass
            try:
                await self._pause(SWEEP_S)
            except Draining:
                return

    # --- what clients ask for ---

    async def create(
        self, spec: SampleSpec, deadline_s: float | None, key: Key | None, inputs: Inputs | None = None
    ) -> tuple[JobView, bool]:
        """Accept a durable job, and say whether it was asked for with this key before; then it is that one.

        Raises KeyReused, StorageFailed, and what Worker.submit does.
        """
        if key is not None and (found := await self._find_again(key)) is not None:
            return found, True
        if any(live.ending for live in self._live.values()) and self._store_fails:
            raise StorageFailed("the ends of jobs cannot be kept at the moment, so no more are taken")
        created_us = now_us()
        deadline_us = None if deadline_s is None else created_us + round(deadline_s * 1e6)
        record = JobRecord(uuid.uuid4().hex, spec, created_us, deadline_us)
        ticket = self._worker.submit(record.id, spec, deadline_s, inputs=inputs, durable=True)
        kept = None
        try:
            kept = await self._thread.call(self._store.add, record, key, inputs)
        finally:
            if kept is None:
                self._worker.cancel(record.id, "not_kept")
        if kept is None:  # two with one key at the same time
            assert key is not None
            found = await self._find_again(key)
            if found is None:  # the other has come and gone
                raise StorageFailed("the job of this Idempotency-Key was deleted just now")
            return found, True
        self._live[record.id] = live = Live(record, submitted=True)
        self._spawn(self._see_through(live, ticket))
        return JobView(record, "waiting", True, 0, ticket.position, ticket.eta_s), False

    async def _find_again(self, key: Key) -> JobView | None:
        found = await self._thread.call(self._store.find, key)
        if found is None:
            return None
        record, same = found
        if not same:
            raise KeyReused(
                f"the Idempotency-Key {key.name!r} came with another request before",
                field="Idempotency-Key", value=key.name, bound="a new key for a new request",
            )  # fmt: skip
        live = self._live.get(record.id)
        return live_view(live, await self._status(record.id)) if live is not None else ended_view(record)

    async def find(self, job_id: str) -> JobView:
        """One job, durable or not. Raises JobNotFound."""
        live, status = self._live.get(job_id), await self._status(job_id)
        if live is not None:
            return live_view(live, status)
        if status is not None:
            return passing_view(status)
        record = await self._thread.call(self._store.get, job_id)
        if record is None:
            raise _not_found(job_id)
        return ended_view(record)

    async def find_durable(self, job_id: str) -> JobView:
        """One durable job. Raises JobNotFound."""
        view = await self.find(job_id)
        if not view.durable:
            raise _not_found(job_id)
        return view

    async def page(self, before: Place | None, states: Collection[str], limit: int) -> list[JobView]:
        """Jobs in these states, the newest first, from the first that is older than `before`."""
        found: dict[str, JobView] = {}
        if "waiting" in states or "running" in states:
            found_statuses = await asyncio.get_running_loop().run_in_executor(None, self._worker.statuses)
            statuses = {status.id: status for status in found_statuses}
            views = [live_view(live, statuses.pop(live.record.id, None)) for live in self._live.values()]
            views += map(passing_view, statuses.values())
            found = {view.record.id: view for view in views if before is None or view.record.place < before}
        outcomes: list[Outcome] = [outcome for outcome in OUTCOMES if outcome in states]
        if outcomes:
            for record in await self._thread.call(self._store.finished, before, outcomes, limit):
                found[record.id] = ended_view(record)
        views = [view for view in found.values() if view.state in states]
        return sorted(views, key=lambda view: view.record.place, reverse=True)[:limit]

    async def images(self, job_id: str) -> tuple[JobRecord, Images]:
        """What a job has made. Raises JobNotFound, JobNotDone or NoImages."""
        view = await self.find_durable(job_id)
        if view.state in ("waiting", "running"):
            raise JobNotDone(view.state, max(1, math.ceil(view.eta_s or 1)))
        if view.state != "done":
            raise NoImages(
                f"this job was {view.state}" if view.state == "cancelled" else "this job failed", view.record.problem
            )
        images = await self._thread.call(self._store.images, job_id)
        if images is None:  # forgotten just now
            raise _not_found(job_id)
        return view.record, images

    async def cancel(self, job_id: str) -> JobView:
        """Give a durable job up, if it has not ended; what has ended stays as it is.

        Raises JobNotFound, and StorageFailed where its end cannot be kept: it may go on at the next start.
        """
        live = self._live.get(job_id)
        if live is None:
            return await self.find_durable(job_id)
        if live.submitted:
            self._worker.cancel(job_id, "deleted")
        elif live.ending is None:
            self._spawn(self._end(live, _ending(live.record, "cancelled")))
        try:
            async with asyncio.timeout(CANCEL_S):
                await live.ended.wait()
        except TimeoutError:
            raise StorageFailed("it is given up, but that cannot be kept at the moment") from None
        return ended_view(live.record)

    async def delete(self, job_id: str) -> None:
        """Cancel a job that has not ended, forget one that has. Raises JobNotFound."""
        if job_id not in self._live:
            if not self._worker.cancel(job_id, "deleted") and not await self._thread.call(self._store.delete, job_id):
                raise _not_found(job_id)
            return
        view = await self.cancel(job_id)
        if view.state != "cancelled":  # it was done before the worker heard of it
            await self._thread.call(self._store.delete, job_id)

    def watch(self, job_id: str, watch: Watch, mailbox: Mailbox) -> Live | None:
        """Show a job to one more, and close the mailbox when it ends; None if it has ended, or never was."""
        live = self._live.get(job_id)
        if live is not None:
            live.viewers.append((watch, mailbox))
            if live.submitted:
                self._worker.watch(job_id, watch)
        return live

    def unwatch(self, live: Live, watch: Watch) -> None:
        """Show it no more to somebody who was."""
        live.viewers = [(each, mailbox) for each, mailbox in live.viewers if each is not watch]
        self._worker.unwatch(live.record.id, watch)

    # --- the way of a job ---

    async def _see_through(self, live: Live, ticket: Ticket | None) -> None:
        """Bring a job to its end, and keep that. Without a ticket it has yet to enter."""
        try:
            if ticket is None:
                if live.record.spec.n > self._limits.max_rows:
                    log.warning(
                        "job %s waits for a start with more --max-rows than %d", live.record.id, live.record.spec.n
                    )
                    return
                async with self._door:
                    ticket = await self._enter(live)
            result = await asyncio.wrap_future(ticket.future)
            images = await self._thread.call(result.read)
            await self._end(live, _ending(live.record, "done", fingerprint=self._model.fingerprint), images)
        except JobCancelled:
            await self._end(live, _ending(live.record, "cancelled"))
        except Draining:
            log.info("job %s waits for the next start", live.record.id)
            self._let_viewers_go(live)
        except ServiceError as error:
            await self._fail(live, error)
        except Exception:
            log.exception("job %s could not be seen through", live.record.id)
            await self._fail(live, ServiceError("something went wrong on the server; its log has the details"))

    async def _enter(self, live: Live) -> Ticket:
        """Give the worker a job of an earlier process, when it has room. Raises what ends the job."""
        record = live.record
        snapshot = await self._thread.call(self._store.snapshot, record.id, self._model.fingerprint)
        inputs = await self._thread.call(self._store.inputs, record.id) if record.spec.image_sha256 else None
        while True:
            if live.ending is not None:
                raise JobCancelled("it was deleted")
            deadline_s = None if record.deadline_us is None else (record.deadline_us - now_us()) / 1e6
            if deadline_s is not None and deadline_s <= 0:
                raise DeadlinePassed(
                    "deadline_s passed while the server was down", field="deadline_s", value=deadline_s
                )
            try:
                ticket = self._worker.resume(record.id, record.spec, deadline_s, inputs, snapshot)
            except (NotReady, Overloaded):
                await self._pause(ROOM_S)
            else:
                break
        log.info(
            "job %s goes on from step %d", record.id, min(snapshot.steps) if snapshot is not None else record.spec.start
        )
        live.submitted = True
        for watch, _ in live.viewers:
            self._worker.watch(record.id, watch)
        return ticket

    async def _fail(self, live: Live, error: ServiceError) -> None:
        if isinstance(error, EngineFailed) and self._worker.crashed:
            suspect = live.record.id in self._worker.jobs_of_the_crash
            try:
                if suspect:
                    await self._thread.call(self._store.crashed, live.record.id)
            except StorageFailed:
                suspect = False
            if not suspect or live.record.crashes + 1 < MAX_CRASHES:
                self._let_viewers_go(live)  # the next start goes on with it
                return
        await self._end(live, _ending(live.record, "failed", problem=error.problem()))

    async def _end(self, live: Live, record: JobRecord, images: Images | None = None) -> None:
        """Keep how a job ended. While the store cannot, it is not told as ended; after a restart it is done again."""
        if live.ending is not None:  # somebody else is at it
            return
        live.ending = record
        while True:
            try:
                await self._thread.call(self._store.finish, record, images)
                self._store_fails = False
                break
            except Exception as error:
                self._store_fails = True
                if not isinstance(error, StorageFailed):  # which says so itself
                    log.exception("the end of job %s could not be kept", record.id)
                try:
                    await self._pause(RETRY_S)
                except Draining:
                    return
        live.record = record
        del self._live[record.id]
        self._metrics.durable_job_ended(record.outcome or "")
        self._let_viewers_go(live)
        live.ended.set()

    def _let_viewers_go(self, live: Live) -> None:
        for _, mailbox in live.viewers:
            mailbox.close()

    async def _status(self, job_id: str) -> JobStatus | None:
        """What the worker foresees of a job; among many that takes a while, so another thread does it."""
        return await asyncio.get_running_loop().run_in_executor(None, self._worker.status, job_id)


def _ending(record: JobRecord, outcome: Outcome, **fields: object) -> JobRecord:
    return replace(record, outcome=outcome, finished_us=now_us(), **fields)  # type: ignore[arg-type]


def _not_found(job_id: str) -> JobNotFound:
    detail = f"no job {short(job_id)!r} is here"
    return JobNotFound(detail, field="job_id", value=job_id, bound="a job that GET /jobs lists")
