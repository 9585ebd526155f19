"""Client operations on jobs: accept, find, watch, cancel and delete.

An accepted durable job runs to its end, even if the client disconnects or this process ends (lifecycle.py).
"""

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from cachetools import TTLCache

from tminus.service.errors import (
    Draining,
    JobNotDone,
    JobNotFound,
    KeyReused,
    NoImages,
    Overloaded,
    StorageFailed,
    short,
)
from tminus.service.jobs.held_job import HeldJob, HeldState, ModelOfJobs
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import OUTCOMES, JobRecord, Key, Outcome, Place, now_us
from tminus.service.jobs.store.shared_store import SharedStore
from tminus.service.jobs.webhooks.delivery_store import Delivery
from tminus.service.jobs.webhooks.webhook import Webhook
from tminus.service.preview import Mailbox, Watch
from tminus.service.spec import Pixels
from tminus.service.work import JobStatus, Outlook
from tminus.service.worker.running_job import NewJob
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

STATES = ("waiting", "running", *OUTCOMES)
FORECAST_S = 1.0  # maximum age of a forecast in seconds
POLL_INTERVAL_S = 1.0  # seconds between lookups of a job that another server may hold
CANCEL_S = 10.0  # longest wait for the tick to end and the cancellation to be stored
RECENT_BYTES, RECENT_S = 32 * 2**20, 5.0  # size and lifetime of the cache of recently read images
# Undelivered events are limited because each search for due events reads all undelivered events of a receiver.
MOST_OWED = 10_000  # maximum number of undelivered events per owner and receiver
OWED_S = 60  # Retry-After in seconds when MOST_OWED is reached


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as clients see it. A non-durable job has no view after it has ended."""

    record: JobRecord
    model: int  # model number
    model_name: str
    state: str  # one of STATES
    durable: bool
    step: int | None  # number of steps taken, averaged over the job's rows; None if unknown
    position: int | None = None  # number of jobs ahead; None if unknown
    eta_s: float | None = None
    deliveries: tuple[Delivery, ...] = ()  # webhook deliveries; empty if there is no webhook or they are unknown


def kept_view(record: JobRecord, model: ModelOfJobs) -> JobView:
    """Return the view of a durable job, based on its record alone."""
    # If the job is unfinished, either another replica holds it, or it waits for a replica or is being accepted.
    step = record.spec.num_passes if record.outcome == "done" else None if record.outcome or record.held else 0
    state = record.outcome or ("running" if record.held else "waiting")
    return JobView(record, model.number, model.name, state, True, step)


def held_view(job: HeldJob, status: JobStatus | None) -> JobView:
    """Return the view of a durable job that this server held when it read `status` from the worker."""
    record, model = job.record, (job.model.number, job.model.name)
    if record.outcome is not None:  # the job has ended since `status` was read
        return kept_view(record, job.model)
    if status is not None:
        return JobView(record, *model, status.state, True, status.step, status.position, status.eta_s)
    if job.state in (HeldState.IN_WORKER, HeldState.ENDING):  # the job has ended, but its outcome is not stored yet
        step = None if job.ending is not None and job.ending.outcome != "done" else record.spec.num_passes
        return JobView(record, *model, "running", True, step, 0, 0.0)
    return JobView(record, *model, "waiting", True, 0)


def passing_view(status: JobStatus) -> JobView:
    """Return the view of a job that is known only from its status in the worker."""
    record = JobRecord(status.id, status.spec, status.created_us, owner=status.owner)
    stands = (status.state, status.durable, status.step, status.position, status.eta_s)
    return JobView(record, status.model, status.model_name, *stands)


class JobStatuses:
    """Owns the last forecast for waiting and running jobs. Used only in the event loop's thread.

    Each call reads a job's state and step from the worker, which is cheap. A forecast for many jobs is slow, so another
    thread makes one for all jobs, at most once a second. All requests share this forecast.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._forecasting = asyncio.Lock()
        self._forecast: dict[str, JobStatus] = {}
        self._forecast_s = float("-inf")  # time of the forecast on the event loop's clock

    async def of(self, job_id: str) -> JobStatus | None:
        """Return the status of one job, or None if the worker does not have the job."""
        if self._worker.jobs.quick_status(job_id, self._forecast) is None:  # an unknown job needs no forecast
            return None
        return self._worker.jobs.quick_status(job_id, await self._recent_forecast())

    async def all(self) -> list[JobStatus]:
        """Return the status of every job, in order of arrival."""
        return self._worker.jobs.quick_statuses(await self._recent_forecast())

    async def _recent_forecast(self) -> Mapping[str, JobStatus]:
        loop = asyncio.get_running_loop()
        async with self._forecasting:
            if loop.time() - self._forecast_s > FORECAST_S:
                statuses = await loop.run_in_executor(None, self._worker.jobs.statuses)
                self._forecast, self._forecast_s = {status.id: status for status in statuses}, loop.time()
        return self._forecast


class Jobs:
    """Looks up running jobs in the worker, and ended jobs in the stores.

    Owns the lifecycles of all models that have jobs: loaded models, and earlier models whose jobs are still stored.
    Used only in the event loop's thread.
    """

    def __init__(self, worker: Worker, statuses: JobStatuses) -> None:
        self._worker, self._statuses = worker, statuses
        self._lifecycles: dict[int, Lifecycle] = {}  # keyed by model number
        # Each lock is held while a job's images are read. Keyed by job id.
        self._readings: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._recent: TTLCache[str, Pixels] = TTLCache(RECENT_BYTES, RECENT_S, getsizeof=lambda images: images.nbytes)

    def put(self, lifecycle: Lifecycle) -> None:
        self._lifecycles[lifecycle.served.number] = lifecycle

    def of_model(self, model: int) -> Lifecycle:
        return self._lifecycles[model]

    def all_held(self) -> list[HeldJob]:
        return [job for each in self._lifecycles.values() for job in each.held]

    def remove(self, model: int) -> None:
        del self._lifecycles[model]

    def store_failure(self, *, of_shared: bool = True) -> StorageFailed | None:
        """Return a failure of any served model's store, or None if all these stores can be written.

        of_shared: also check stores that are shared with other servers.
        """
        stores = [each.store for each in list(self._lifecycles.values()) if not each.served.retired]
        served = (store.failure for store in stores if of_shared or not store.shared)
        return next((failure for failure in served if failure is not None), None)

    def _held(self, job_id: str, sees: str | None = None) -> HeldJob | None:
        found = (job for each in self._lifecycles.values() if (job := each.held.find(job_id)) is not None)
        return next((job for job in found if sees in (None, job.record.owner)), None)

    def by_store(self, job_id: str = "") -> list[Lifecycle]:
        """Return the latest lifecycle of each store.

        Two lifecycles share a store after a reload of the same weights.

        job_id: the job to look for. If the id has a NUL character, which no database accepts, the list is empty.
        """
        if "\x00" in job_id:
            return []
        return list({id(each.store): each for each in self._lifecycles.values()}.values())

    # In the methods below, `sees` is the only owner whose jobs are visible; None makes all jobs visible. A job that is
    # not visible is reported as not found.

    async def view(self, record: JobRecord, lifecycle: Lifecycle) -> JobView:
        """Return the view of a durable job whose record was just read from its store."""
        view = kept_view(record, lifecycle.served)
        if (job := self._held(record.id)) is not None:
            view = held_view(job, await self._statuses.of(record.id))
        (told,) = await self.with_deliveries([view])
        return told

    async def find(self, job_id: str, sees: str | None) -> JobView:
        """Return the view of a job, durable or not. Raises JobNotFound."""
        view = await self._find(job_id)
        if view is None or sees not in (None, view.record.owner):
            raise _not_found(job_id)
        (told,) = await self.with_deliveries([view])
        return told

    async def with_deliveries(self, views: Sequence[JobView]) -> list[JobView]:
        """Add webhook deliveries to the views. If a store cannot be read, its views stay unchanged."""
        known: dict[str, tuple[Delivery, ...]] = {}
        for model in {view.model for view in views if view.record.webhook is not None}:
            asked = [view.record.id for view in views if view.record.webhook is not None and view.model == model]
            if (lifecycle := self._lifecycles.get(model)) is not None:
                with suppress(StorageFailed):
                    found = await lifecycle.store.call(JobStore.deliveries, asked)
                    known |= {job_id: tuple(each) for job_id, each in found.items()}
        return [replace(view, deliveries=known.get(view.record.id, ())) if known else view for view in views]

    async def to_deliver(self, lifecycle: Lifecycle, job_id: str) -> JobView:
        """Return the view of a job, to be sent to its webhook. Raises JobNotFound and StorageFailed."""
        record = await lifecycle.store.call(JobStore.get, job_id)
        if record is None:
            raise _not_found(job_id)
        if record.outcome is None:
            return await self.find(job_id, None)
        # Do not call `find`, which may still show a job that has just ended as running.
        (view,) = await self.with_deliveries([kept_view(record, lifecycle.served)])
        return view

    async def _find(self, job_id: str) -> JobView | None:
        job, status = self._held(job_id), await self._statuses.of(job_id)
        if job is not None:
            return held_view(job, status)
        if status is not None:
            return passing_view(status)
        for lifecycle in self.by_store(job_id):
            record = None
            with unless_retired(lifecycle):
                record = await lifecycle.store.call(JobStore.get, job_id)
            if record is not None:
                return kept_view(record, lifecycle.served)
        return None

    async def find_durable(self, job_id: str, sees: str | None) -> JobView:
        """Return the view of a durable job. Raises JobNotFound."""
        view = await self.find(job_id, sees)
        if not view.durable:
            raise _not_found(job_id)
        return view

    async def ended(self, job_id: str, sees: str | None) -> JobView:
        """Wait until a durable job has ended. Raises JobNotFound, or Draining if this server shuts down first."""
        while (view := await self.find_durable(job_id, sees)).record.outcome is None:
            if self._worker.state.draining:
                raise Draining
            job = self._held(job_id)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_INTERVAL_S):
                    await (job.over if job is not None else asyncio.Event()).wait()
        return view

    async def page(
        self, before: Place | None, states: Collection[str], limit: int, sees: str | None, model_name: str | None = None
    ) -> list[JobView]:
        """Return at most `limit` jobs in these states that were created before `before`, newest first.

        model_name: return only jobs of models with this name.
        """
        lifecycles = [each for each in self.by_store() if model_name in (None, each.served.name)]
        found: dict[str, JobView] = {}
        if "waiting" in states or "running" in states:
            statuses = {status.id: status for status in await self._statuses.all()}
            views = [held_view(job, statuses.pop(job.record.id, None)) for job in self.all_held()]
            views += map(passing_view, statuses.values())
            found = {view.record.id: view for view in views if before is None or view.record.place < before}
        for lifecycle in lifecycles:
            with unless_retired(lifecycle):
                for view in await _kept_views(lifecycle, before, states, limit, sees):
                    # As long as a held job has not ended, its view in `found` has more details.
                    if view.record.id not in found or view.record.outcome is not None:
                        found[view.record.id] = view
        views = [
            view
            for view in found.values()
            if view.state in states and model_name in (None, view.model_name) and sees in (None, view.record.owner)
        ]
        return await self.with_deliveries(sorted(views, key=lambda view: view.record.place, reverse=True)[:limit])

    async def done(self, job_id: str, sees: str | None) -> JobView:
        """Return the view of a durable job that has images. Raises JobNotFound, JobNotDone or NoImages."""
        view = await self.find_durable(job_id, sees)
        if view.state in ("waiting", "running"):
            raise JobNotDone(view.state, max(1, math.ceil(view.eta_s or 1)))
        if view.state != "done":
            raise NoImages(
                f"this job was {view.state}" if view.state == "cancelled" else "this job failed", view.record.problem
            )
        return view

    async def images(self, view: JobView) -> Pixels:
        """Read the images of a finished job. Concurrent requests share one read. Raises JobNotFound."""
        job_id, lifecycle = view.record.id, self._lifecycles.get(view.model)
        async with self._readings.setdefault(job_id, asyncio.Lock()):
            images = self._recent.get(job_id)
            if images is None and lifecycle is not None:
                images = await lifecycle.store.images(job_id)
            if images is None:  # the job was deleted after it was looked up
                raise _not_found(job_id)
            with suppress(ValueError):  # the images may be larger than the cache
                self._recent[job_id] = images
        return images

    async def cancel(self, job_id: str, sees: str | None) -> JobView:
        """Cancel a durable job. Do nothing if the job has ended.

        Raises JobNotFound. Raises StorageFailed if the cancellation cannot be stored. In that case, the job may
        continue at the next start.
        """
        job = self._held(job_id, sees)
        if job is None:
            return await self._cancel_elsewhere(job_id, sees)
        lifecycle = self._lifecycles[job.model.number]
        lifecycle.runner.cancel(job)
        try:
            async with asyncio.timeout(CANCEL_S):
                await job.over.wait()
        except TimeoutError:
            # The job ended before it was cancelled, but its result is not stored yet.
            if job.ending is not None and job.ending.outcome != "cancelled":
                if lifecycle.leases is not None:
                    await lifecycle.leases.cancel(job.record)
                if (view := await self.find_durable(job_id, sees)).record.outcome is not None:
                    return view
                raise StorageFailed("the job has ended, and its result cannot be stored at the moment") from None
            raise StorageFailed("the job was cancelled, but this cannot be stored at the moment") from None
        if job.state is HeldState.LOST:  # another replica holds or has ended the job
            return await self._cancel_elsewhere(job_id, sees)
        (view,) = await self.with_deliveries([kept_view(job.record, job.model)])
        return view

    async def _cancel_elsewhere(self, job_id: str, sees: str | None) -> JobView:
        view = await self.find_durable(job_id, sees)
        leases = self._lifecycles[view.model].leases
        if leases is not None and view.record.outcome is None and await leases.cancel(view.record):
            view = await self.find_durable(job_id, sees)
        return view

    async def delete(self, job_id: str, sees: str | None) -> None:
        """Delete a job. Cancel the job first if it has not ended. Raises JobNotFound."""
        if self._held(job_id) is not None:
            view = await self.cancel(job_id, sees)
            await self._lifecycles[view.model].store.delete(job_id)
            return
        status = await self._statuses.of(job_id)
        if status is not None and sees in (None, status.owner) and self._worker.cancel(job_id, "deleted"):
            return
        for lifecycle in self.by_store(job_id):
            with unless_retired(lifecycle):
                await _cancel_in_store(lifecycle, job_id, sees)
                if await lifecycle.store.delete(job_id, sees):
                    return
        raise _not_found(job_id)

    async def held_at(self, view: JobView) -> str | None:
        """Return the address of the other replica that works on a job, or None. Raises StorageFailed."""
        lifecycle = self._lifecycles.get(view.model)
        # A file store never marks records as held.
        if lifecycle is None or not view.record.held or self._held(view.record.id):
            return None
        return await lifecycle.store.call(SharedStore.holder, view.record.id)

    def watch(self, job_id: str, watch: Watch, mailbox: Mailbox) -> HeldJob | None:
        """Add a viewer to a job and return the job. Return None if this process no longer holds the job.

        The mailbox closes after the last step of the job in this process.
        """
        job = self._held(job_id)
        if job is not None:
            self._lifecycles[job.model.number].held.watch(job, watch, mailbox)
        return job

    def unwatch(self, job: HeldJob, watch: Watch) -> None:
        job.viewers.pop(watch, None)  # the job's lifecycle may have been removed already
        self._worker.unwatch(job.record.id, watch)


@contextmanager
def unless_retired(lifecycle: Lifecycle) -> Iterator[None]:
    """Log StorageFailed instead of raising it if the store's model is no longer served.

    Jobs of other models thus stay reachable.
    """
    try:
        yield
    except StorageFailed as error:
        if not lifecycle.served.retired:
            raise
        log.warning("the jobs of earlier weights of %s cannot be read: %s", lifecycle.served.name, error.detail)


async def _kept_views(
    lifecycle: Lifecycle, before: Place | None, states: Collection[str], limit: int, owner: str | None
) -> list[JobView]:
    """Return views of a store's ended jobs and, if shared, its unfinished jobs. Raises StorageFailed."""
    outcomes: list[Outcome | None] = [outcome for outcome in OUTCOMES if outcome in states]
    is_open = {"waiting", "running"} & set(states) if lifecycle.store.shared else set[str]()
    if is_open:
        outcomes.append(None)
    if not outcomes:
        return []
    held = None if len(is_open) != 1 else "running" in is_open
    records = await lifecycle.store.call(JobStore.page, before, outcomes, limit, owner, held=held)
    return [kept_view(record, lifecycle.served) for record in records]


async def _cancel_in_store(lifecycle: Lifecycle, job_id: str, sees: str | None) -> None:
    """Cancel an unfinished job in a shared store. Do nothing if the job is missing or damaged."""
    if lifecycle.leases is None:
        return
    try:
        record = await lifecycle.store.call(JobStore.get, job_id)
    except StorageFailed as error:
        if error.damaged:
            return
        raise
    if record is not None and record.outcome is None and sees in (None, record.owner):
        await lifecycle.leases.cancel(record)


def _not_found(job_id: str) -> JobNotFound:
    detail = f"no job {short(job_id)!r} is here"
    return JobNotFound(detail, field="job_id", value=job_id, bound="a job that GET /jobs lists")


class _KeyTaken(Exception):
    """Raised if another job has the Idempotency-Key. Makes `charged` refund the quota."""


class NewJobs:
    """Accepts jobs, or leaves them to a replica with room. Used only in the event loop's thread."""

    def __init__(self, worker: Worker, jobs: Jobs) -> None:
        self._worker, self._jobs = worker, jobs
        self._entering: dict[str, str] = {}  # owners of jobs that are being accepted, by job id
        # One lock per Idempotency-Key, held while the key's job is looked up and added. A slow store thus delays only
        # requests with the same key.
        self._keyed = WeakValueDictionary[str, asyncio.Lock]()
        self._counts: list[tuple[str, set[str]]] = []  # running counts of `open_jobs`: owner, and job ids found so far

    async def open_jobs(self, owner: str, most: int | None) -> int:
        """Count an owner's unfinished jobs. Return 0 if `most` is None.

        Jobs that this server does not hold are counted only if it has fewer than `most`. Stores that cannot be reached
        are skipped.
        """
        if most is None:
            return 0
        found = set[str]()
        if self._here(owner) < most:
            self._counts.append(count := (owner, found))
            try:
                for store in [each.store for each in self._jobs.by_store()]:
                    if store.shared and store.failure is None:
                        with suppress(StorageFailed):
                            found.update(await store.call(SharedStore.open_jobs, owner))
            finally:
                self._counts = [each for each in self._counts if each is not count]
        return self._here(owner) + len(found - self._known(owner))

    def _here(self, owner: str) -> int:
        return self._worker.jobs.number_of(owner, durable=False) + len(self._known(owner))

    def _known(self, owner: str) -> set[str]:
        held = {job.record.id for job in self._jobs.all_held() if job.record.owner == owner}
        return held | {job_id for job_id, whose in self._entering.items() if whose == owner}

    async def create(
        self,
        new: NewJob,
        key: Key | None,
        webhook: Webhook | None = None,
        *,
        charged: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> tuple[JobView, bool]:
        """Accept a durable job. Return its view and False, or the view of the key's earlier job and True.

        charged: makes the context in which a new job is accepted. A repeated request does not enter it. If the job is
        not accepted, the context gets the exception. Raises KeyReused, StorageFailed and the errors of Worker.submit.
        """
        lifecycle = self._jobs.of_model(new.work.model)

        async def create() -> JobView:
            async with charged():
                return await self._create(lifecycle, new, key, webhook)

        if key is None:
            return await create(), False
        # A lock in each store would not be enough, because stores of different weights do not share keys.
        async with self._keyed.setdefault(key.kept_as, asyncio.Lock()):
            if (found := await self.find_by_key(key, lifecycle.served.name)) is not None:
                return found, True
            try:
                return await create(), False
            except _KeyTaken:  # another server added a job with this key at the same time
                found = await self.find_by_key(key, lifecycle.served.name)
        if found is None:
            raise StorageFailed("the job of this Idempotency-Key was deleted just now")
        return found, True

    async def soonest(self, error: Overloaded, new: NewJob) -> Overloaded:
        """Return `error` with the shortest Retry-After of all servers of the store. For non-durable jobs."""
        leases = self._jobs.of_model(new.work.model).leases
        return error if leases is None else await leases.soonest(error, new.work)

    async def _create(self, lifecycle: Lifecycle, new: NewJob, key: Key | None, webhook: Webhook | None) -> JobView:
        """Create the record of a job and accept the job. Raises _KeyTaken and the errors of `create`."""
        if lifecycle.retention.cannot_keep:
            raise StorageFailed(
                "the results of finished jobs cannot be stored at the moment, so no new durable job is accepted"
            )
        created_us = lifecycle.store.now_us()
        deadline_us = None if new.deadline_s is None else created_us + round(new.deadline_s * 1e6)
        record = JobRecord(
            new.id, new.spec, created_us, deadline_us,
            owner=new.owner, webhook=webhook, ahead_us=created_us - now_us(),
        )  # fmt: skip
        self._entering[new.id] = new.owner  # set before the first await, so that every count includes the job
        try:
            if webhook is not None:
                receiver = webhook.receiver  # only this owner's events count
                if await lifecycle.store.call(JobStore.number_owed, new.owner, receiver, MOST_OWED) >= MOST_OWED:
                    raise Overloaded(
                        f"{MOST_OWED} events wait for the receiver {receiver} to take them",
                        retry_after_s=OWED_S, field="webhook", value=receiver, bound="a receiver that answers",
                    )  # fmt: skip
            outlook = await self._let_in(lifecycle, record, new, key)
        finally:
            del self._entering[new.id]
        if outlook is None:
            raise _KeyTaken
        if new.id not in self._known(new.owner):  # left to other replicas, so a running count may miss this job
            for whose, found in self._counts:
                if whose == new.owner:
                    found.add(new.id)
        model = lifecycle.served
        return JobView(record, model.number, model.name, "waiting", True, 0, outlook.position, outlook.eta_s)

    async def _let_in(self, lifecycle: Lifecycle, record: JobRecord, new: NewJob, key: Key | None) -> Outlook | None:
        """Submit a new job or leave it to other replicas, and store it. Return None if its key has a job."""
        ticket, leases = None, lifecycle.leases
        if lifecycle.runner.is_unloaded:  # the job waits in the store until the model is loaded
            self._worker.state.check_open()
            outlook = lifecycle.runner.check_room()
            if not await lifecycle.store.add(record, key, new.inputs):
                return None
            lifecycle.runner.accept(record, None)
            return outlook
        if leases is None or leases.takes(new.work):
            try:
                ticket = self._worker.submit(replace(new, durable=True))
            except Overloaded as error:
                if leases is None or error.of_owner:
                    raise
        if ticket is None:
            assert leases is not None
            return await leases.leave_to_any(record, key, new)
        kept = False
        try:
            kept = await lifecycle.store.add(record, key, new.inputs)
        finally:
            if not kept:
                self._worker.cancel(new.id, "not_kept")
        if not kept:
            return None
        lifecycle.runner.accept(record, ticket)
        return ticket.outlook

    async def find_by_key(self, key: Key, model_name: str) -> JobView | None:
        """Return the job that was created with this key, or None.

        Raises KeyReused if the request or the model differs.
        """
        for lifecycle in self._jobs.by_store():
            found = None
            with unless_retired(lifecycle):
                found = await lifecycle.store.call(JobStore.find, key)
            if found is None:
                continue
            record, same = found
            if not same or not (key.any_model or lifecycle.served.name == model_name):
                raise KeyReused(
                    f"the Idempotency-Key {key.name!r} came with another request before",
                    field="Idempotency-Key", value=key.name, bound="a new key for a new request",
                )  # fmt: skip
            return await self._jobs.view(record, lifecycle)
        return None
