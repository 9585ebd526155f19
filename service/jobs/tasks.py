"""The tasks that work on one model's jobs, and what becomes of them when the process ends."""

import asyncio
from collections.abc import Coroutine

from tminus.service.errors import Draining


class Tasks:
    """Owns the tasks. In the event loop's thread only."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio holds tasks weakly
        self._given_up: set[asyncio.Task[None]] = set()  # those of them that `close` cancels
        self._closing = asyncio.Event()

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start a task that `close` waits for."""
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._tasks.discard)
        return task

    def spawn_until_closed(self, work: Coroutine[None, None, None]) -> None:
        """Start a task that `close` cancels."""
        self._given_up.add(task := self.spawn(work))
        task.add_done_callback(self._given_up.discard)

    async def pause(self, seconds: float) -> None:
        """Sleep. Raises Draining when the process ends."""
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return
        raise Draining

    async def close(self) -> None:
        """End every pause, and wait until all tasks have ended."""
        self._closing.set()
        for task in self._given_up:  # each may wait for an object store or a receiver that does not answer
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
