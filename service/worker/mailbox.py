"""Holds the newest frame for a viewer: put from the worker's thread, taken in the event loop. Newest wins."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from service.preview import Frame


class Mailbox:
    """Room for one frame. Nobody waits for its reader; a frame that is not taken in time is dropped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_drop: Callable[[], None]) -> None:
        """on_drop may be called in any thread."""
        self._loop, self._on_drop = loop, on_drop
        self._lock = threading.Lock()
        self._frame: Frame | None = None
        self._closed = False
        self._arrived = asyncio.Event()
        self.dropped = 0

    def put(self, frame: Frame) -> None:
        """Leave a frame. Returns at once; may be called in any thread."""
        with self._lock:
            if self._closed:
                return
            overtaken, self._frame = self._frame, frame
            self.dropped += overtaken is not None
        if overtaken is not None:  # the reader knows already that there is one
            self._on_drop()
            return
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._arrived.set)

    def close(self) -> None:
        """Take no more; what was not taken is dropped, and the reader is let go."""
        with self._lock:
            self._closed, left, self._frame = True, self._frame, None
            self.dropped += left is not None
        if left is not None:
            self._on_drop()
        self._arrived.set()

    async def take(self) -> Frame | None:
        """Wait for a frame and take the newest; None once it is closed."""
        await self._arrived.wait()
        with self._lock:
            frame, self._frame = self._frame, None
            if not self._closed:
                self._arrived.clear()
        return frame
