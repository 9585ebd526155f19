"""What clients ask for: to look for jobs, to cancel, delete and follow them. New ones are accepted in new_jobs.py.

A durable job, once accepted, is finished whatever happens to the client or to this process: see lifecycle.py.
"""

import asyncio
import logging
import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace

from tminus.service.errors import Draining, JobNotDone, JobNotFound, NoImages, StorageFailed, short
from tminus.service.jobs.kept import cancel_anywhere, cancelled_elsewhere, kept_views, unless_retired
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.live import Live
from tminus.service.jobs.standings import Standings
from tminus.service.jobs.store.contract import JobRecord, Key, Place
from tminus.service.jobs.views import JobView, kept_view, live_view, passing_view
from tminus.service.jobs.webhooks.webhook import Delivery
from tminus.service.preview import Watch
from tminus.service.spec import Images
from tminus.service.worker.mailbox import Mailbox
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

LOOK_S = 1.0  # how often a job is looked for that another server may hold
CANCEL_S = 10.0  # for a tick to end, and the store to keep that


class Jobs:
    """Answers from the worker for jobs that run, and from the stores for those that ended.

    Owns which models' jobs there are: those of the models that are loaded, and of earlier ones whose jobs are kept. In
    the event loop's thread only.
    """

    def __init__(self, worker: Worker, standings: Standings) -> None:
        self._worker, self._standings = worker, standings
        self._lifecycles: dict[int, Lifecycle] = {}  # by the model's number

    def put(self, lifecycle: Lifecycle) -> None:
        """Take on the jobs of one more model."""
        self._lifecycles[lifecycle.model] = lifecycle

    def of_model(self, model: int) -> Lifecycle:
        """Those of a model."""
        return self._lifecycles[model]

    def all_live(self) -> list[Live]:
        """Every durable job that has not ended, of those that are held here."""
        return [live for each in self._lifecycles.values() for live in each.all()]

    def remove(self, model: int) -> None:
        """Forget the jobs of a model."""
        del self._lifecycles[model]

    def store_failure(self, *, of_shared: bool = True) -> StorageFailed | None:
        """Why nothing can be written at the moment to a store of a model that is served.

        of_shared: also to one that other servers share.
        """
        stores = [each.store for each in list(self._lifecycles.values()) if not each.retired]
        served = (store.failure for store in stores if of_shared or not store.shared)
        return next((failure for failure in served if failure is not None), None)

    def _live(self, job_id: str, sees: str | None = None) -> Live | None:
        """A durable job that has not ended."""
        found = (live for each in self._lifecycles.values() if (live := each.find(job_id)) is not None)
        return next((live for live in found if sees in (None, live.record.owner)), None)

    def by_store(self, job_id: str = "") -> list[Lifecycle]:
        """One for each store, the latest: after a reload of the same weights two have the same one.

        job_id: of the job that is looked for; none where it is of characters that no database takes.
        """
        if "\x00" in job_id:
            return []
        return list({id(each.store): each for each in self._lifecycles.values()}.values())

    # Below, `sees` is the owner whose jobs are looked at, or None for those of all: others' are not found.

    async def view(self, record: JobRecord, lifecycle: Lifecycle) -> JobView:
        """View a durable job that was just read from its store."""
        view = kept_view(record, lifecycle.model, lifecycle.model_name)
        if (live := self._live(record.id)) is not None:
            view = live_view(live, await self._standings.of(record.id))
        (told,) = await self.with_deliveries([view])
        return told

    async def find(self, job_id: str, sees: str | None) -> JobView:
        """Look up one job, durable or not. Raises JobNotFound."""
        view = await self._find(job_id)
        if view is None or sees not in (None, view.record.owner):
            raise _not_found(job_id)
        (told,) = await self.with_deliveries([view])
        return told

    async def id_of_chosen(self, chosen: str, owner: str) -> str:
        """The id of the job that an owner has chosen a UUID for. Raises JobNotFound."""
        key = Key(chosen, "", owner, is_chosen=True)
        for lifecycle in self.by_store():
            with unless_retired(lifecycle):
                if (job_id := await lifecycle.store.id_of(key)) is not None:
                    return job_id
        raise _not_found(chosen)

    async def with_deliveries(self, views: Sequence[JobView]) -> list[JobView]:
        """Say what became of the jobs' webhooks, as far as the stores can say it now."""
        known: dict[str, tuple[Delivery, ...]] = {}
        for model in {view.model for view in views if view.record.webhook is not None}:
            asked = [view.record.id for view in views if view.record.webhook is not None and view.model == model]
            if (lifecycle := self._lifecycles.get(model)) is not None:
                with suppress(StorageFailed):
                    found = await lifecycle.store.deliveries(asked)
                    known |= {job_id: tuple(each) for job_id, each in found.items()}
        return [replace(view, deliveries=known.get(view.record.id, ())) if known else view for view in views]

    async def to_deliver(self, lifecycle: Lifecycle, job_id: str) -> JobView:
        """A job as its webhook is told of it. Raises JobNotFound, and StorageFailed."""
        record = await lifecycle.store.get(job_id)
        if record is None:
            raise _not_found(job_id)
        if record.outcome is None:
            return await self.find(job_id, None)
        # Not by `find`, to which a job that has ended just now may still be one that runs.
        (view,) = await self.with_deliveries([kept_view(record, lifecycle.model, lifecycle.model_name)])
        return view

    async def _find(self, job_id: str) -> JobView | None:
        live, status = self._live(job_id), await self._standings.of(job_id)
        if live is not None:
            return live_view(live, status)
        if status is not None:
            return passing_view(status)
        for lifecycle in self.by_store(job_id):
            record = None
            with unless_retired(lifecycle):
                record = await lifecycle.store.get(job_id)
            if record is not None:
                return kept_view(record, lifecycle.model, lifecycle.model_name)
        return None

    async def find_durable(self, job_id: str, sees: str | None) -> JobView:
        """Look up one durable job. Raises JobNotFound."""
        view = await self.find(job_id, sees)
        if not view.durable:
            raise _not_found(job_id)
        return view

    async def ended(self, job_id: str, sees: str | None) -> JobView:
        """Wait until a durable job has ended. Raises JobNotFound, and Draining where this server ends first."""
        while (view := await self.find_durable(job_id, sees)).record.outcome is None:
            if self._worker.draining:
                raise Draining
            live = self._live(job_id)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await (live.ended if live is not None else asyncio.Event()).wait()
        return view

    async def page(
        self,
        before: Place | None,
        states: Collection[str],
        limit: int,
        sees: str | None,
        model_name: str | None = None,
    ) -> list[JobView]:
        """List jobs in these states, the newest first, from the first that is older than `before`.

        model_name: only those of models of this name.
        """
        lifecycles = [each for each in self.by_store() if model_name in (None, each.model_name)]
        found: dict[str, JobView] = {}
        if "waiting" in states or "running" in states:
            statuses = {status.id: status for status in await self._standings.all()}
            lives = [live for each in self._lifecycles.values() for live in each.all()]
            views = [live_view(live, statuses.pop(live.record.id, None)) for live in lives]
            views += map(passing_view, statuses.values())
            found = {view.record.id: view for view in views if before is None or view.record.place < before}
        for lifecycle in lifecycles:
            with unless_retired(lifecycle):
                for view in await kept_views(lifecycle, before, states, limit, sees):
                    if view.record.id not in found or view.record.outcome is not None:  # here more is known of it
                        found[view.record.id] = view
        views = [
            view
            for view in found.values()
            if view.state in states and model_name in (None, view.model_name) and sees in (None, view.record.owner)
        ]
        return await self.with_deliveries(sorted(views, key=lambda view: view.record.place, reverse=True)[:limit])

    async def images(self, job_id: str, sees: str | None) -> tuple[JobView, Images]:
        """Read what a job has made. Raises JobNotFound, JobNotDone or NoImages."""
        view = await self.find_durable(job_id, sees)
        if view.state in ("waiting", "running"):
            raise JobNotDone(view.state, max(1, math.ceil(view.eta_s or 1)))
        if view.state != "done":
            raise NoImages(
                f"this job was {view.state}" if view.state == "cancelled" else "this job failed", view.record.problem
            )
        lifecycle = self._lifecycles.get(view.model)
        images = await lifecycle.store.images(job_id) if lifecycle is not None else None
        if images is None:  # deleted since it was looked up
            raise _not_found(job_id)
        return view, images

    async def cancel(self, job_id: str, sees: str | None) -> JobView:
        """Give a durable job up, if it has not ended; what has ended stays as it is.

        Raises JobNotFound, and StorageFailed where its end cannot be kept: it may go on at the next start.
        """
        live = self._live(job_id, sees)
        if live is None:
            return await self._cancel_anywhere(job_id, sees)
        self._lifecycles[live.model].cancel(live)
        try:
            async with asyncio.timeout(CANCEL_S):
                await live.ended.wait()
        except TimeoutError:
            if live.ending is not None and live.ending.outcome != "cancelled":  # its result takes long to be kept
                lifecycle = self._lifecycles[live.model]
                if lifecycle.store.shared and await lifecycle.store.cancel(job_id):
                    lifecycle.lose(live)
                if (view := await self.find_durable(job_id, sees)).record.outcome is not None:
                    return view
                raise StorageFailed("the job has ended, and its result cannot be stored at the moment") from None
            raise StorageFailed("the job was cancelled, but this cannot be stored at the moment") from None
        if live.lost:  # another replica has it by now
            return await self._cancel_anywhere(job_id, sees)
        (view,) = await self.with_deliveries([kept_view(live.record, live.model, live.model_name)])
        return view

    async def _cancel_anywhere(self, job_id: str, sees: str | None) -> JobView:
        view = await self.find_durable(job_id, sees)
        if view.record.outcome is None and await cancel_anywhere(self._lifecycles[view.model], view.record):
            view = await self.find_durable(job_id, sees)
        return view

    async def delete(self, job_id: str, sees: str | None) -> None:
        """Cancel a job that has not ended, delete one that has. Raises JobNotFound."""
        if self._live(job_id) is None:
            status = await self._standings.of(job_id)
            seen = status is not None and sees in (None, status.owner)
            if seen and self._worker.cancel(job_id, "deleted"):
                return
            for lifecycle in self.by_store(job_id):
                with unless_retired(lifecycle):
                    if await cancelled_elsewhere(lifecycle, job_id, sees) or await lifecycle.store.delete(job_id, sees):
                        return
            raise _not_found(job_id)
        view = await self.cancel(job_id, sees)
        if view.state != "cancelled":  # it was done before the worker was told
            await self._lifecycles[view.model].store.delete(job_id)

    async def held_at(self, view: JobView) -> str | None:
        """The address of the replica that works on a job, if it is another and can be asked. Raises StorageFailed."""
        lifecycle = self._lifecycles.get(view.model)
        if lifecycle is None or not view.record.held or self.is_here(view.record.id):
            return None
        return await lifecycle.store.holder(view.record.id)

    def is_here(self, job_id: str) -> bool:
        """Whether a durable job has not ended, and is held by this process."""
        return self._live(job_id) is not None

    def watch(self, job_id: str, watch: Watch, mailbox: Mailbox) -> Live | None:
        """Show a job to a viewer, and close the mailbox when it ends; None if it has ended, or does not exist."""
        live = self._live(job_id)
        if live is not None:
            live.viewers.append((watch, mailbox))
            if live.submitted:
                self._worker.watch(job_id, watch)
        return live

    def unwatch(self, live: Live, watch: Watch) -> None:
        """Show a job to a viewer no more."""
        live.viewers = [(each, mailbox) for each, mailbox in live.viewers if each is not watch]
        self._worker.unwatch(live.record.id, watch)


def _not_found(job_id: str) -> JobNotFound:
    detail = f"no job {short(job_id)!r} is here"
    return JobNotFound(detail, field="job_id", value=job_id, bound="a job that GET /jobs lists")
