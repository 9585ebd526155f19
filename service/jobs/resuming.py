"""What a job that goes on needs of the store."""

from collections.abc import Awaitable, Callable

from tminus.service.errors import StorageFailed
from tminus.service.jobs.async_store import AsyncStore
from tminus.service.jobs.store import JobRecord
from tminus.service.spec import Inputs, Snapshot

RETRY_S = 1.0  # until a shared store that is away is asked again


async def kept_of(
    store: AsyncStore, record: JobRecord, fingerprint: str, pause: Callable[[float], Awaitable[None]]
) -> tuple[Snapshot | None, Inputs | None]:
    """A job's last snapshot by this build, and its inputs. Raises StorageFailed where they cannot be read.

    A shared store that is away is waited for: the job is held, and what is kept of it is not damaged. pause: sleeps.
    """
    while True:
        try:
            snapshot = await store.snapshot(record.id, fingerprint)
            return snapshot, await store.inputs(record.id) if record.spec.image_sha256 else None
        except StorageFailed as error:
            if error.damaged or not store.shared:
                raise
        await pause(RETRY_S)
