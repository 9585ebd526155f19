"""What a job that goes on needs of the store."""

import math
import time
from collections.abc import Awaitable, Callable

from tminus.service.errors import StorageFailed
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.contract import JobRecord
from tminus.service.spec import Inputs, Snapshot

RETRY_S = 1.0  # until a store that is away is asked again
FILE_S = 60.0  # that a file may be away: the other jobs of an earlier process wait behind this one


async def kept_of(
    store: AsyncStore, record: JobRecord, fingerprint: str, pause: Callable[[float], Awaitable[None]]
) -> tuple[Snapshot | None, Inputs | None]:
    """A job's last snapshot by this build, and its inputs. Raises StorageFailed where they cannot be read.

    A store that is away is waited for: the job is held, and what is kept of it is not damaged. pause: sleeps.
    """
    until_s = math.inf if store.shared else time.monotonic() + FILE_S
    while True:
        try:
            snapshot = await store.snapshot(record.id, fingerprint)
            return snapshot, await store.inputs(record.id) if record.spec.image_sha256 else None
        except StorageFailed as error:
            if error.damaged or time.monotonic() > until_s:
                raise
        await pause(RETRY_S)
