"""Holds the newest frame for a viewer: put in the worker's thread, taken in the event loop."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from tminus.service.preview import Frame


class Mailbox:
    """Room for one frame. The writer never waits: a newer frame replaces one that was not taken."""

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
            replaced, self._frame = self._frame, frame
            self.dropped += replaced is not None
        if replaced is not None:  # the reader has been woken already
            self._on_drop()
            return
        with suppress(RuntimeError):  # the event loop is closed, so there is no reader
            self._loop.call_soon_threadsafe(self._arrived.set)

    def close(self) -> None:
        """Take no more frames, drop the one that was not taken, and end the reader's wait."""
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
