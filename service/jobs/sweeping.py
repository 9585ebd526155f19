"""Delete jobs that ended long ago, or of which there are too many, now and then."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

from tminus.service.errors import Draining, StorageFailed
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.model_info import Limits

SWEEP_S = 10.0
LATE_S = 60.0  # for the last attempt to end


async def sweep_until_closed(store: AsyncStore, limits: Limits, pause: Callable[[float], Awaitable[None]]) -> None:
    """Sweep, as long as the process lives. pause: sleeps, and raises Draining when the process ends."""
    keep_us, keep_bytes = round(limits.keep_jobs_s * 1e6), limits.keep_jobs_bytes
    owed_us = round((limits.webhook_retry_s + LATE_S) * 1e6)
    while True:
        try:
            with suppress(StorageFailed):
                await store.check()
                now_us = store.now_us()
                while await store.sweep(now_us - keep_us, keep_bytes, now_us - owed_us):
                    await pause(0)
            await pause(SWEEP_S)
        except Draining:
            return
