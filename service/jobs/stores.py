"""The stores that are open, one for each set of weights, and who uses them. In the event loop's thread only."""

import asyncio
from collections import Counter
from collections.abc import Callable

from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.results import Results, ResultStore


class Stores:
    """Owns the stores. Models of the same weights share one, as after a reload of the same weights."""

    def __init__(self, open_store: Callable[[str], JobStore], results: Results | None = None) -> None:
        """open_store: opens one, by the hash of the weights. results: where large ones go, if not there."""
        self._open, self._results = open_store, results
        self._stores: dict[str, AsyncStore] = {}
        self._users: Counter[str] = Counter()
        self._turn = asyncio.Lock()  # a file is not opened before it has been closed

    def take_first(self, weights_hash: str) -> AsyncStore:
        """As `take`, of a model that the server begins with: it blocks."""
        self._users[weights_hash] += 1
        if weights_hash not in self._stores:
            self._stores[weights_hash] = self._made(weights_hash, self._open(weights_hash))
        return self._stores[weights_hash]

    async def take(self, weights_hash: str) -> tuple[AsyncStore, bool]:
        """The store of weights, to be given back by `release`, and whether others use it too. Raises ValueError."""
        async with self._turn:
            if weights_hash not in self._stores:
                self._stores[weights_hash] = self._made(weights_hash, await asyncio.to_thread(self._open, weights_hash))
            self._users[weights_hash] += 1
            return self._stores[weights_hash], self._users[weights_hash] > 1

    def _made(self, weights_hash: str, store: JobStore) -> AsyncStore:
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

    def close(self) -> None:
        """Close all, when nobody uses them any more. Blocks."""
        for store in self._stores.values():
            store.close()
