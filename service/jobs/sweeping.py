"""Delete jobs that ended long ago, or of which there are too many, now and then."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

from tminus.service.errors import Draining, StorageFailed
from tminus.service.jobs.async_store import AsyncStore
from tminus.service.model_info import Limits

SWEEP_S = 10.0


async def sweep_until_closed(store: AsyncStore, limits: Limits, pause: Callable[[float], Awaitable[None]]) -> None:
    """Sweep, as long as the process lives. pause: sleeps, and raises Draining when the process ends."""
    keep_us, keep_bytes = round(limits.keep_jobs_s * 1e6), limits.keep_jobs_bytes
    while True:
        try:
            with suppress(StorageFailed):
                await store.check()
                while await store.sweep(store.now_us() - keep_us, keep_bytes):
                    await pause(0)
            await pause(SWEEP_S)
        except Draining:
            return
