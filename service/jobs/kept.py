"""What clients' commands ask of one store: a page of its jobs, and the end of one that another replica has."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from tminus.service.errors import StorageFailed
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.store.contract import OUTCOMES, JobRecord, Outcome, Place
from tminus.service.jobs.views import JobView, kept_view

log = logging.getLogger(__name__)


async def kept_views(
    lifecycle: Lifecycle, before: Place | None, states: Collection[str], limit: int, owner: str | None
) -> list[JobView]:
    """Those that have ended, and in a shared store those that have not, wherever they are. Raises StorageFailed."""
    outcomes: list[Outcome | None] = [outcome for outcome in OUTCOMES if outcome in states]
    is_open = {"waiting", "running"} & set(states) if lifecycle.store.shared else set[str]()
    if is_open:
        outcomes.append(None)
    if not outcomes:
        return []
    held = None if len(is_open) != 1 else "running" in is_open
    records = await lifecycle.store.page(before, outcomes, limit, owner, held=held)
    return [kept_view(record, lifecycle.model, lifecycle.model_name) for record in records]


@contextmanager
def unless_retired(lifecycle: Lifecycle) -> Iterator[None]:
    """Go on without a store that fails, if its model is served no more: others are not to suffer from it."""
    try:
        yield
    except StorageFailed as error:
        if not lifecycle.retired:
            raise
        log.warning("the jobs of earlier weights of %s cannot be read: %s", lifecycle.model_name, error.detail)


async def cancelled_elsewhere(lifecycle: Lifecycle, job_id: str, sees: str | None) -> bool:
    """End a job of a shared store that has not ended; False if there is none, or what is kept of it is damaged."""
    if not lifecycle.store.shared:
        return False
    try:
        record = await lifecycle.store.get(job_id)
    except StorageFailed as error:
        if error.damaged:
            return False
        raise
    if record is None or record.outcome is not None or sees not in (None, record.owner):
        return False
    return await cancel_anywhere(lifecycle, record)


async def cancel_anywhere(lifecycle: Lifecycle, record: JobRecord) -> bool:
    """End a job that another replica holds, or nobody; False if it has ended. Its holder learns it when it renews."""
    cancelled = lifecycle.store.shared and await lifecycle.store.cancel(record.id)
    if cancelled and not record.held:  # else its holder counts it as lost
        lifecycle.metrics.durable_job_ended("cancelled")
    return cancelled
