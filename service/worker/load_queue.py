"""The queue of models to load, and the set of models that are not in memory. startup/loader.py does the loading."""

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
END_LOOK_S = 0.2  # interval between checks for a shutdown while a call waits for a load
LOAD_S = 10.0  # assumed duration of a load until a load has been measured


class LoadTimes:
    """How long each model's last load took, and when the running load began."""

    def __init__(self) -> None:
        self._took_s: dict[str, float] = {}  # keyed by model name
        self._running: str | None = None
        self._began_s = 0.0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the `with` block, which loads the model. If the block raises, nothing is recorded."""
        self._running, self._began_s = name, time.monotonic()
        try:
            yield
            self._took_s[name] = time.monotonic() - self._began_s
        finally:
            self._running = None

    def knows(self, name: str) -> bool:
        """Return True if a load of this model has been measured."""
        return name in self._took_s

    def expected_s(self, name: str) -> float:
        """Predict how long the load of a model takes. If the load is running, predict the time that is left."""
        took_s = self._took_s.get(name) or (median(self._took_s.values()) if self._took_s else LOAD_S)
        return max(0.0, took_s - (time.monotonic() - self._began_s)) if name == self._running else took_s


@dataclass(slots=True, eq=False)
class PendingLoad:
    """A load that is queued or running."""

    name: str
    reason: Reason
    again: bool  # True to read the model's folder even if the model is in memory
    done: "asyncio.Future[None]"
    requests: int = 0


class LoadQueue:
    """Holds the pending loads, oldest first, and the names of unloaded models.

    `ensure_loaded` and `load` queue a load and wait for it. The loader runs the queued loads, and calls `end` after
    each. All methods must be called in the event loop's thread.
    """

    def __init__(self, state: WorkerState, max_wait_s: float, unloaded: Iterable[str] = ()) -> None:
        """max_wait_s: how long a request may wait. unloaded: names of the models that start unloaded."""
        self.times = LoadTimes()
        self.pending: list[PendingLoad] = []
        self._state, self._max_wait_s, self._unloaded = state, max_wait_s, set(unloaded)
        self._changed = asyncio.Event()

    def is_unloaded(self, name: str) -> bool:
        """Return True if a model is unloaded, or will be soon. The worker then gets no jobs for the model."""
        return name in self._unloaded

    def mark_unloaded(self, name: str) -> None:
        """Stop giving the worker jobs for a model, until `mark_loaded` is called."""
        self._unloaded.add(name)
        self._changed.set()

    def mark_loaded(self, name: str) -> None:
        self._unloaded.discard(name)

    async def wait(self, most_s: float | None) -> None:
        """Wait until a load is queued or a model is marked as unloaded, but at most `most_s` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), most_s)
        self._changed.clear()

    def find(self, name: str) -> PendingLoad | None:
        """Return the oldest pending load of a model, or None."""
        return next((each for each in self.pending if each.name == name), None)

    def expected_s(self, name: str) -> float:
        """Predict the seconds until a model is in memory. This includes the loads that are queued before it."""
        total_s = 0.0
        for each in self.pending:
            total_s += self.times.expected_s(each.name)
            if each.name == name:
                return total_s
        return total_s + self.times.expected_s(name)

    async def ensure_loaded(self, name: str, deadline_s: float | None = None) -> None:
        """Wait until the model of a request is in memory. Raises ModelLoading, and the errors of `load`.

        While it waits, the request does not keep the model from being unloaded. deadline_s: maximum seconds to wait.
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
        """Queue a load, and wait until the model is in memory.

        again: read the model's folder even if the model is in memory. Raises Draining, NotReady, CheckpointRefused, or
        any other error that the load raised.
        """
        await self._wait(self._find_or_add(name, reason, again=again), math.inf)

    def end(self, pending: PendingLoad, error: Exception | None = None) -> None:
        """Remove a load from the queue, and wake the calls that wait for it."""
        self.pending.remove(pending)
        if error is None:
            pending.done.set_result(None)
        else:
            pending.done.set_exception(error)
            pending.done.exception()  # mark the exception as retrieved, so asyncio does not log it if no call waits

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
        """Wait for a load. Cancelling the wait does not cancel the load.

        Raises Draining, TimeoutError, or the error that the load raised.
        """
        until_s = time.monotonic() + most_s
        while not pending.done.done():
            if (left_s := until_s - time.monotonic()) <= 0:
                raise TimeoutError
            await asyncio.wait([pending.done], timeout=min(END_LOOK_S, left_s))
            if self._state.draining and not pending.done.done():
                raise Draining
        pending.done.result()
