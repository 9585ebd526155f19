"""The one thread in which the job store is called: nobody waits for a disk but who asked for it."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from service.errors import StorageFailed
from service.jobs.store import JobStore
from service.metrics import Metrics
from service.worker.snapshot_pace import READ, SnapshotPace

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class StoreThread:
    """Owns the store. It is the worker's Keeper too: rounds of snapshots are spaced by what they cost."""

    def __init__(self, store: JobStore, fingerprint: str, metrics: Metrics) -> None:
        self.store, self._fingerprint, self._metrics = store, fingerprint, metrics
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tminus-store")
        self._pace = SnapshotPace()

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call one of the store's functions. Raises StorageFailed."""
        return await asyncio.wrap_future(self._pool.submit(function, *args, **kwargs))

    def close(self) -> None:
        """Do what was asked for, and let go of the store."""
        self._pool.submit(self.store.close)
        self._pool.shutdown()

    # --- Keeper ---

    def due(self, now_s: float) -> bool:
        """See Keeper."""
        return self._pace.due(now_s)

    def keep(self, snapshots: Mapping[str, READ], began_s: float, cost_s: float) -> None:
        """See Keeper."""
        self._pace.begun()
        self._pool.submit(self._save, snapshots, began_s, cost_s)

    def _save(self, snapshots: Mapping[str, READ], began_s: float, cost_s: float) -> None:
        started_s = time.thread_time()  # waiting for the disk takes nothing from a tick
        try:
            self.store.save({job_id: read() for job_id, read in snapshots.items()}, self._fingerprint)
            self._metrics.snapshotted(len(snapshots))
        except StorageFailed:  # it said so itself; a crash now costs the steps since the last snapshot
            pass
        except Exception:
            log.exception("snapshots could not be kept")
        self._pace.ended(began_s, cost_s + time.thread_time() - started_s)
