"""Frames of a running job, each row at its own steps, so that they are the same under any load. No torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from tminus.service.byte_budget import MAX_HELD_BYTES, ByteBudget
from tminus.service.errors import Overloaded, TooManyBytes
from tminus.service.preview import Show
from tminus.service.spec import Images

Read = Callable[[], Mapping[Show, Images]]  # waits for the copy from a GPU


class Recording:
    """Keeps the rows of one job as they were after every so many of their steps. The worker puts, the encoder reads.

    A preview shows all rows at one moment, so their steps may differ. A frame here shows all rows after the same step.
    """

    def __init__(self, every: int, show: Show, n: int, steps: int) -> None:
        self.show = show
        self._every, self._n, self._steps = every, n, steps
        self._parts: dict[int, list[tuple[Sequence[int], Sequence[int], Read]]] = {}  # by step: see put

    def due(self, step: int) -> bool:
        """Whether to keep a row that has taken so many steps. Not after the last step: that is the job's own result."""
        return step % self._every == 0 and step < self._steps

    def put(self, taken: Sequence[tuple[int, int]], read: Read) -> None:
        """Keep rows, each by the steps it has taken and its index in the job, in the order that `read` has them."""
        for step in {step for step, _ in taken}:
            positions = [position for position, (its_step, _) in enumerate(taken) if its_step == step]
            indices = [taken[position][1] for position in positions]
            self._parts.setdefault(step, []).append((indices, positions, read))

    def frames(self) -> list[Images]:
        """Read the frames in order, uint8 [n, H, W, C] each. For a job that is done, in a thread that may wait."""
        frames = []
        for step in sorted(self._parts):
            parts = [(indices, read()[self.show][list(positions)]) for indices, positions, read in self._parts[step]]
            frame = np.zeros((self._n, *parts[0][1].shape[1:]), np.uint8)
            for indices, images in parts:
                frame[list(indices)] = images
            frames.append(frame)
        return frames


def frame_count(every: int, steps: int) -> int:
    """How many frames a recording has, including the result."""
    return (steps - 1) // every + 1


class RecordingRoom:
    """Bounds the memory of all frames that are kept for answers being made. In the event loop's thread."""

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self._budget = ByteBudget(max_bytes)

    @contextmanager
    def taken(self, size_bytes: int, field: str = "every") -> Iterator[None]:
        """Hold room for a recording of this size. Raises Overloaded. field: what asked for it."""
        free_bytes = self._budget.limit_bytes - self._budget.held_bytes
        with self._budget.hold() as room:
            try:
                room.add(size_bytes)
            except TooManyBytes:
                raise Overloaded(
                    f"{self._budget.held_bytes} bytes of frames would be held at once; "
                    f"the limit is {self._budget.limit_bytes}",
                    retry_after_s=1,
                    field=field,
                    value=size_bytes,
                    bound=f"frames of at most {free_bytes} bytes at this load",
                ) from None
            yield
