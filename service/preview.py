"""What a viewer of a running job sees, and when. Pure: no torch, no asyncio, no clock (time is an argument)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from tminus.service.spec import Images

Show = Literal["x_t", "x_0"]  # the latent itself, or the network's current estimate of the image
SHOWS: tuple[Show, ...] = ("x_t", "x_0")


@dataclass(frozen=True, slots=True)
class Frame:
    """A job between two of its steps."""

    step: int  # how many steps its rows have taken, on average
    read: Callable[[], Mapping[Show, Images]]  # waits for the copy from a GPU


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a frame is due: every so many steps, so many times a second, or at these steps. One of them is set."""

    every: int | None = None
    fps: float | None = None
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert [self.every, self.fps, self.steps].count(None) == 2


class Watch:
    """One viewer of a job, as the worker keeps it: when a frame is due, and where frames go."""

    def __init__(self, pace: Pace, show: tuple[Show, ...], put: Callable[[Frame], None], seen: int = 0) -> None:
        """Take what a viewer asked for.

        put: must return at once, whatever the viewer does. seen: the step of the frame that the viewer has already.
        """
        self._pace, self.show, self.put = pace, show, put
        self._step = seen  # of the last frame
        self._next_s = 0.0

    def due(self, step: int, now_s: float) -> bool:
        """Whether to show a job that has taken so many steps. If so, it counts as shown."""
        every, fps, steps = self._pace.every, self._pace.fps, self._pace.steps
        if every is not None:
            due = step // every > self._step // every
        elif steps is not None:
            due = any(self._step < each <= step for each in steps)
        else:
            assert fps is not None
            due = step > self._step and now_s >= self._next_s
            if due:  # at even intervals, so that waiting for ticks does not add up; a missed frame is not caught up on
                self._next_s = (self._next_s if now_s < self._next_s + 1 / fps else now_s) + 1 / fps
        if due:
            self._step = step
        return due
