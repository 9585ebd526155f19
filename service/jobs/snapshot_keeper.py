"""Writes the snapshots that the worker takes of durable jobs to the store, in rounds spaced by what they cost.

A round at most every 2 s, and for at most 0.5 % of a core.
"""

import logging
import time
from collections.abc import Mapping

from tminus.service.errors import StorageFailed
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.metrics import Metrics
from tminus.service.threads import started_pool
from tminus.service.worker.loaded_model import ReadSnapshot

log = logging.getLogger(__name__)

SHARE = 0.005  # how much of the time snapshots may cost
LEAST_S = 2.0  # between two rounds


class SnapshotKeeper:
    """The worker's Keeper. Its own thread waits for copies from a GPU and for the store.

    A round costs the worker's wall time plus the CPU time of this thread and the store's. Waits for a GPU or a
    disk do not count, since they take nothing from a tick.
    """

    def __init__(self, store: AsyncStore, fingerprint: str, metrics: Metrics) -> None:
        self._store, self._fingerprint, self._metrics = store, fingerprint, metrics
        self._thread = started_pool(1, "tminus-snapshots")
        self._next_s = 0.0
        self._busy = False  # while a round is under way

    def change(self, fingerprint: str) -> None:
        """Keep snapshots under another fingerprint from now on."""
        self._fingerprint = fingerprint

    def due(self, now_s: float) -> bool:
        """Whether to take snapshots now."""
        return not self._busy and now_s >= self._next_s

    def keep(self, snapshots: Mapping[str, ReadSnapshot], began_s: float, cost_s: float) -> None:
        """Keep a round of snapshots, by job id; cost_s: what it has cost the worker's thread already."""
        self._busy = True
        self._thread.submit(self._keep, snapshots, began_s, cost_s)

    def close(self) -> None:
        """Keep what was taken. Blocks until then; call it before the store is closed."""
        self._thread.shutdown()

    def _keep(self, snapshots: Mapping[str, ReadSnapshot], began_s: float, cost_s: float) -> None:
        started_s = time.thread_time()
        try:
            read_snapshots = {job_id: read() for job_id, read in snapshots.items()}
        except Exception:
            log.exception("snapshots could not be read")
        else:
            # After an error, a crash costs the steps since the last snapshot that was kept.
            error, save_s = self._store.save(read_snapshots, self._fingerprint)
            cost_s += save_s
            if error is None:
                self._metrics.snapshotted(len(read_snapshots))
            elif not isinstance(error, StorageFailed):  # which the store has logged
                log.error("snapshots could not be kept", exc_info=error)
        cost_s += time.thread_time() - started_s
        self._next_s = began_s + max(LEAST_S, cost_s / SHARE)
        self._busy = False  # last: from here on the worker's thread reads the time
