"""Which jobs end the server: by a crash of the worker, or by the end of the whole process.

Both count in the store against the jobs that were worked on then. A job with a count steps in ticks of its own, so that
the next such end is its own doing or is not. Being killed from outside counts nothing.
"""

import logging
from collections.abc import Collection, Sequence
from contextlib import suppress

from tminus.service.errors import EngineFailed, StorageFailed
from tminus.service.jobs.process_end import End
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.contract import JobRecord, JobStore, listed

log = logging.getLogger(__name__)

MOST = 2  # ends, after which a job fails


def is_failed(record: JobRecord) -> bool:
    """Whether a job has ended the server so often that it is not tried again."""
    return record.crashes >= MOST


def failure() -> EngineFailed:
    """Why such a job fails."""
    return EngineFailed(f"the server ended {MOST} times while it worked on this job")


async def causes_crashes(store: AsyncStore, record: JobRecord, crashed: Collection[str]) -> bool:
    """Count a crash of the worker. Return whether this job is convicted by it and must fail.

    crashed: the jobs that the worker worked on.
    """
    if record.id not in crashed:
        return False
    if len(crashed) == 1 and record.crashes + 1 >= MOST:
        return True
    with suppress(StorageFailed):
        await store.crashed(crashed)
    return False


def tell_ends(ends: Sequence[End]) -> None:
    """Log how processes before this one ended."""
    for end in ends:
        jobs = listed(sorted(end.jobs))
        if end.cause is None:
            log.info("a server before this one was killed, or the machine went, as it worked on %s", jobs or "nothing")
            continue
        log.error(
            "a server before this one has ended by itself: %s. It worked on %s%s",
            end.cause, jobs or "no job", f"\n{end.traceback.rstrip()}" if end.traceback else "",
        )  # fmt: skip


def count_ends(ends: Sequence[End], store: JobStore) -> None:
    """Count how processes before this one ended, before a job of the store goes on."""
    for end in ends:
        if end.cause is not None:
            with suppress(StorageFailed):  # which the store has logged
                store.crashed(end.jobs)
