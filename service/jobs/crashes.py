"""Whether a job is what makes the worker crash."""

from collections.abc import Collection
from contextlib import suppress

from tminus.service.errors import StorageFailed
from tminus.service.jobs.async_store import AsyncStore
from tminus.service.jobs.store import JobRecord


async def causes_crashes(
    store: AsyncStore, record: JobRecord, crashed: Collection[str], live: Collection[JobRecord]
) -> bool:
    """Count a crash if the worker was running this job, unless it was running a suspect, which then caused it.

    crashed: the jobs that the worker was running. live: all that have not ended.
    """
    if record.id not in crashed:
        return False
    if record.crashes:
        return True
    if any(each.crashes for each in live if each.id in crashed):
        return False
    with suppress(StorageFailed):
        await store.crashed(record.id)
    return False
