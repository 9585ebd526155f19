"""Previews of a running job: their pace, and the mailbox between worker and viewer. Imports neither torch nor time."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from tminus.service.spec import Images

Show = Literal["x_t", "x_0"]  # the latent itself, or the network's current estimate of the image
SHOWS: tuple[Show, ...] = ("x_t", "x_0")


@dataclass(frozen=True, slots=True)
class Frame:
    """A preview of a job between two steps."""

    step: int  # mean number of steps that the rows have taken
    read: Callable[[], Mapping[Show, Images]]  # waits for the copy from a GPU


@dataclass(frozen=True, slots=True)
class Pace:
    """When a frame is due: every N steps, N times a second, or at given steps. Exactly one field is set."""

    every: int | None = None
    fps: float | None = None
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert [self.every, self.fps, self.steps].count(None) == 2


class Watch:
    """One viewer of a job, as seen by the worker: when a frame is due, and the callback that gets the frame."""

    def __init__(self, pace: Pace, show: tuple[Show, ...], put: Callable[[Frame], None], seen: int = 0) -> None:
        """Set up a viewer.

        put: must return at once, however slow the viewer is. seen: the step of the last frame that the viewer has.
        """
        self._pace, self.show, self.put = pace, show, put
        self._step = seen  # step of the last frame
        self._next_s = 0.0

    def due(self, step: int, now_s: float) -> bool:
        """Return True if a frame is due after `step` steps, and count the frame as shown."""
        every, fps, steps = self._pace.every, self._pace.fps, self._pace.steps
        if every is not None:
            due = step // every > self._step // every
        elif steps is not None:
            due = any(self._step < each <= step for each in steps)
        else:
            assert fps is not None
            due = step > self._step and now_s >= self._next_s
            if due:  # at even intervals, so waits for ticks do not add up; a missed frame is skipped
                self._next_s = (self._next_s if now_s < self._next_s + 1 / fps else now_s) + 1 / fps
        if due:
            self._step = step
        return due


class Mailbox:
    """Holds one frame, put by the worker's thread and taken in the event loop. A newer frame replaces an older one."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_drop: Callable[[], None]) -> None:
        """on_drop: may be called in any thread."""
        self._loop, self._on_drop = loop, on_drop
        self._lock = threading.Lock()
        self._frame: Frame | None = None
        self._closed = False
        self._arrived = asyncio.Event()
        self.dropped = 0

    def put(self, frame: Frame) -> None:
        """Put a frame. Returns at once. May be called in any thread."""
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
        """Refuse further frames, drop the current frame, and end the reader's wait."""
        with self._lock:
            self._closed, left, self._frame = True, self._frame, None
            self.dropped += left is not None
        if left is not None:
            self._on_drop()
        self._arrived.set()

    async def take(self) -> Frame | None:
        """Wait for a frame and return the newest. Returns None after `close`."""
        await self._arrived.wait()
        with self._lock:
            frame, self._frame = self._frame, None
            if not self._closed:
                self._arrived.clear()
        return frame
