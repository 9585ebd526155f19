"""The queue of models to load, and the list of unloaded models. startup/loader.py loads the models."""

import asyncio
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import Literal

from tminus.service.errors import Draining, ModelLoading
from tminus.service.worker.worker import WorkerState

Reason = Literal["admin", "demand"]
END_LOOK_S = 0.2  # seconds between checks for a shutdown, while a call waits for a load
LOAD_S = 10.0  # estimated seconds of a load, before any load was measured


class LoadTimes:
    """Measures loads: the duration of each model's last load, and the start of the running load."""

    def __init__(self) -> None:
        self._took_s: dict[str, float] = {}  # keyed by model name
        self._running: str | None = None
        self._began_s = 0.0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the load that the block runs. If the block raises, the duration is discarded."""
        self._running, self._began_s = name, time.monotonic()
        try:
            yield
            self._took_s[name] = time.monotonic() - self._began_s
        finally:
            self._running = None

    def knows(self, name: str) -> bool:
        """Return True if a load of the model has been measured."""
        return name in self._took_s

    def expected_s(self, name: str) -> float:
        """Estimate the seconds of a model's load, or the remaining seconds if the load is running."""
        took_s = self._took_s.get(name) or (median(self._took_s.values()) if self._took_s else LOAD_S)
        return max(0.0, took_s - (time.monotonic() - self._began_s)) if name == self._running else took_s


@dataclass(slots=True, eq=False)
class PendingLoad:
    """A queued or running load, and the number of requests that wait for it."""

    name: str
    reason: Reason
    again: bool  # read the folder even if the model is in memory
    done: "asyncio.Future[None]"
    requests: int = 0


class LoadQueue:
    """Holds the pending loads, oldest first, and the names of unloaded models. Use it in the event loop's thread only.

    Callers of `ensure_loaded` and `load` wait here. The loader runs each pending load and then calls `end`.
    """

    def __init__(self, state: WorkerState, max_wait_s: float, unloaded: Iterable[str] = ()) -> None:
        """max_wait_s: the longest wait of a request. unloaded: names of the models that start unloaded."""
        self.times = LoadTimes()
        self.pending: list[PendingLoad] = []
        self._state, self._max_wait_s, self._unloaded = state, max_wait_s, set(unloaded)
        self._changed = asyncio.Event()

    def is_unloaded(self, name: str) -> bool:
        """Return True if a model is unloaded or about to be. The worker then gets no jobs of the model."""
        return name in self._unloaded

    def mark_unloaded(self, name: str) -> None:
        """Keep the model's jobs from the worker until `mark_loaded`."""
        self._unloaded.add(name)
        self._changed.set()

    def mark_loaded(self, name: str) -> None:
        self._unloaded.discard(name)

    async def wait(self, most_s: float | None) -> None:
        """Wait until a load is queued or a model is marked as unloaded, for at most `most_s` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), most_s)
        self._changed.clear()

    def find(self, name: str) -> PendingLoad | None:
        """Return the oldest pending load of a model."""
        return next((each for each in self.pending if each.name == name), None)

    def expected_s(self, name: str) -> float:
        """Estimate the seconds until a model is in memory, including the loads queued before it."""
        total_s = 0.0
        for each in self.pending:
            total_s += self.times.expected_s(each.name)
            if each.name == name:
                return total_s
        return total_s + self.times.expected_s(name)

    async def ensure_loaded(self, name: str, deadline_s: float | None = None) -> None:
        """Wait until a request's model is in memory. Raises ModelLoading, and the errors of `load`.

        Until the load ends, the waiting request does not prevent the model's unloading. deadline_s: seconds from now.
        """
        pending, began_s = self._find_or_add(name, "demand"), time.monotonic()
        expected_s = self.expected_s(name)
        if deadline_s is not None and self.times.knows(name) and expected_s > deadline_s:
            raise ModelLoading(name, deadline_s, expected_s)
        pending.requests += 1
        try:
            await self._wait(pending, min(self._max_wait_s, deadline_s or self._max_wait_s))
        except TimeoutError:
            raise ModelLoading(name, time.monotonic() - began_s, self.expected_s(name)) from None
        finally:
            pending.requests -= 1

    async def load(self, name: str, reason: Reason = "demand", *, again: bool = False) -> None:
        """Queue a load, and wait until the model is in memory. again: reread the folder of a model in memory.

        Raises Draining, NotReady, CheckpointRefused and any other error of the load.
        """
        await self._wait(self._find_or_add(name, reason, again=again), math.inf)

    def end(self, pending: PendingLoad, error: Exception | None = None) -> None:
        """Remove a load from the queue, and wake the tasks that wait for the load."""
        self.pending.remove(pending)
        if error is None:
            pending.done.set_result(None)
        else:
            pending.done.set_exception(error)
            pending.done.exception()  # retrieve the exception, so asyncio does not log it when no task waits

    def close(self) -> None:
        """Fail all pending loads with Draining."""
        for pending in list(self.pending):
            self.end(pending, Draining())

    def _find_or_add(self, name: str, reason: Reason, *, again: bool = False) -> PendingLoad:
        self._state.check_open()
        if not again and (found := self.find(name)) is not None:
            return found
        pending = PendingLoad(name, reason, again, asyncio.get_running_loop().create_future())
        self.pending.append(pending)
        self._changed.set()
        return pending

    async def _wait(self, pending: PendingLoad, most_s: float) -> None:
        """Wait for a load. If the wait is cancelled, the load continues.

        Raises the load's error, Draining or TimeoutError.
        """
        until_s = time.monotonic() + most_s
        while not pending.done.done():
            if (left_s := until_s - time.monotonic()) <= 0:
                raise TimeoutError
            await asyncio.wait([pending.done], timeout=min(END_LOOK_S, left_s))
            if self._state.draining and not pending.done.done():
                raise Draining
        pending.done.result()
