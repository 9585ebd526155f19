"""Previews of a running job: when one is due, and the mailbox that hands it from worker to viewer.

Imports neither torch nor time.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from tminus.service.spec import Images

Show = Literal["x_t", "x_0"]  # x_t: the noisy state; x_0: the network's current estimate of the image
SHOWS: tuple[Show, ...] = ("x_t", "x_0")


@dataclass(frozen=True, slots=True)
class Frame:
    """A preview of a job, taken between two steps."""

    step: int  # mean number of passes taken by the job's rows
    read: Callable[[], Mapping[Show, Images]]  # waits for the copy from a GPU


@dataclass(frozen=True, slots=True)
class Pace:
    """When frames are due: every N steps, N times a second, or at given steps. Exactly one field is set."""

    every: int | None = None
    fps: float | None = None
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert [self.every, self.fps, self.steps].count(None) == 2


class Watch:
    """One viewer of a job: when the viewer's next frame is due, and the callback that takes it. Used by the worker."""

    def __init__(self, pace: Pace, show: tuple[Show, ...], put: Callable[[Frame], None], seen: int = 0) -> None:
        """Create a viewer.

        put: takes a frame; must return at once, even if the viewer is slow. seen: step of the last frame that the
        viewer already has.
        """
        self._pace, self.show, self.put = pace, show, put
        self._step = seen
        self._next_s = 0.0

    def due(self, step: int, now_s: float) -> bool:
        """Return True if a frame is due after `step` steps. The frame then counts as shown."""
        every, fps, steps = self._pace.every, self._pace.fps, self._pace.steps
        if every is not None:
            due = step // every > self._step // every
        elif steps is not None:
            due = any(self._step < each <= step for each in steps)
        else:
            assert fps is not None
            due = step > self._step and now_s >= self._next_s
            if due:  # keep even intervals, so delays of ticks do not add up; skip a missed frame
                self._next_s = (self._next_s if now_s < self._next_s + 1 / fps else now_s) + 1 / fps
        if due:
            self._step = step
        return due


class Mailbox:
    """Holds at most one frame, from the worker's thread for the event loop. A newer frame replaces an older one."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_drop: Callable[[], None]) -> None:
        """on_drop: called for each dropped frame, in any thread."""
        self._loop, self._on_drop = loop, on_drop
        self._lock = threading.Lock()
        self._frame: Frame | None = None
        self._closed = False
        self._arrived = asyncio.Event()
        self.dropped = 0

    def put(self, frame: Frame) -> None:
        """Put a frame into the mailbox. Returns at once. Any thread may call this."""
        with self._lock:
            if self._closed:
                return
            replaced, self._frame = self._frame, frame
            self.dropped += replaced is not None
        if replaced is not None:  # the reader is already awake
            self._on_drop()
            return
        with suppress(RuntimeError):  # the event loop is closed, so there is no reader
            self._loop.call_soon_threadsafe(self._arrived.set)

    def close(self) -> None:
        """Refuse new frames, drop the current frame, and wake the reader."""
        with self._lock:
            self._closed, left, self._frame = True, self._frame, None
            self.dropped += left is not None
        if left is not None:
            self._on_drop()
        self._arrived.set()

    async def take(self) -> Frame | None:
        """Wait for a frame, and return the newest one. Returns None after `close`."""
        await self._arrived.wait()
        with self._lock:
            frame, self._frame = self._frame, None
            if not self._closed:
                self._arrived.clear()
        return frame
