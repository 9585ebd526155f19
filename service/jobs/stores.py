"""The stores of durable jobs that are open, one for each set of weights, and who uses them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from tminus.service.jobs.crash_report import CrashReport, count_crashes
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.results import Results, ResultStore


class Stores:
    """Owns the stores. Models of the same weights share one, as after a reload of the same weights.

    Each store counts the crashes of earlier processes once, before any of its jobs goes on.
    """

    def __init__(
        self,
        open_store: Callable[[str], JobStore],
        results: Results | None = None,
        first: Mapping[str, JobStore] | None = None,
        crash_reports: Sequence[CrashReport] = (),
    ) -> None:
        """open_store: opens one, by the hash of the weights. results: where large ones go, if not there.

        first: those that are open already, by their weights. crash_reports: of earlier processes.
        """
        self._open, self._results, self._crash_reports = open_store, results, crash_reports
        self._counted: set[str] = set()
        self._users: Counter[str] = Counter()
        self._turn = asyncio.Lock()  # a file is not opened before it has been closed
        self._stores = {weights_hash: self._made(weights_hash, store) for weights_hash, store in (first or {}).items()}

    def take_first(self, weights_hash: str) -> AsyncStore:
        """Return the store of weights that the server begins with, to be given back by `release`; blocks."""
        if weights_hash not in self._stores:
            self._stores[weights_hash] = self._made(weights_hash, self._open(weights_hash))
        self._users[weights_hash] += 1
        return self._stores[weights_hash]

    async def take(self, weights_hash: str) -> AsyncStore:
        """Return the store of weights as `take_first` does, beside the event loop. Raises ValueError."""
        async with self._turn:
            return await asyncio.to_thread(self.take_first, weights_hash)

    def _made(self, weights_hash: str, store: JobStore) -> AsyncStore:
        if weights_hash not in self._counted:
            self._counted.add(weights_hash)
            count_crashes(self._crash_reports, store)
        return AsyncStore(store) if self._results is None else ResultStore(store, self._results, weights_hash[:16])

    def is_shared(self, weights_hash: str) -> bool:
        """Whether several models use the store of these weights."""
        return self._users[weights_hash] > 1

    async def release(self, weights_hash: str) -> None:
        """Give a store back; without users it is closed."""
        async with self._turn:
            self._users[weights_hash] -= 1
            if not self._users[weights_hash]:
                del self._users[weights_hash]
                await asyncio.to_thread(self._stores.pop(weights_hash).close)

    async def count_crash(self, job_ids: Collection[str]) -> None:
        """Count a crash of this process against jobs in any store. Failures are logged."""
        if job_ids:
            calls = [store.call(JobStore.crashed, job_ids) for store in self._stores.values()]
            await asyncio.gather(*calls, return_exceptions=True)

    def close(self) -> None:
        """Close all, when nobody uses them any more. Blocks."""
        for store in list(self._stores.values()):  # one that a thread is opening may be put in meanwhile
            store.close()
