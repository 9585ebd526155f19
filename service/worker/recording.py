"""What is kept of a running job's steps, each row at its own, so that it is the same under any load. No torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from tminus.model.trajectory import PlanNumbers, Trajectory
from tminus.service.byte_budget import ByteBudget
from tminus.service.engine.protocol import RowEngine
from tminus.service.errors import Overloaded, TooManyBytes
from tminus.service.preview import Show
from tminus.service.spec import Images, Point, SampleSpec

Kept = TypeVar("Kept")


class Recorder(ABC, Generic[Kept]):
    """Keeps something of the rows of one job. The worker's thread puts, the encoder reads.

    A preview shows all rows at one moment, so their steps may differ. What is kept here is of all rows after the same
    step.
    """

    def __init__(self) -> None:
        # By step: indices of rows in the job, their positions in what is read, and what waits for the copy from a GPU.
        self._parts: dict[int, list[tuple[list[int], list[int], Callable[[], Kept]]]] = {}
        self.until: int | None = None  # the step after which the job ends without images, as nobody wants them

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether to keep a row that has taken so many steps; 0 is before the first."""

    @abstractmethod
    def read(self, engine: RowEngine, rows: Sequence[int]) -> Callable[[], Kept]:
        """Read what is to be kept of rows."""

    def record(self, engine: RowEngine, rows: Sequence[int], taken: Iterable[tuple[int, int]]) -> None:
        """Read and keep those that are due of a job's rows, each by the steps it has taken and its index."""
        due = [each for each in taken if self.due(each[0])]
        if not due:
            return
        read = self.read(engine, [rows[index] for _, index in due])
        for step in {step for step, _ in due}:
            positions = [position for position, (its_step, _) in enumerate(due) if its_step == step]
            indices = [due[position][1] for position in positions]
            self._parts.setdefault(step, []).append((indices, positions, read))


class Recording(Recorder[Mapping[Show, Images]]):
    """Frames of a job, after every so many of its steps."""

    def __init__(
        self,
        every: int,
        shows: tuple[Show, ...],
        n: int,
        steps: int,
        *,
        from_noise: bool = False,
        until: int | None = None,
    ) -> None:
        """from_noise: also what the rows begin with. until: the last step whose frame is wanted; None: all."""
        super().__init__()
        self._shows = shows
        self._every, self._n, self._steps = every, n, steps
        self._first, self.until = 0 if from_noise else 1, until

    def due(self, step: int) -> bool:
        """Whether a row is kept after so many steps: not after the last, which gives the job's own result."""
        wanted = self._first <= step < self._steps and (self.until is None or step <= self.until)
        return wanted and step % self._every == 0

    def read(self, engine: RowEngine, rows: Sequence[int]) -> Callable[[], Mapping[Show, Images]]:
        """Read pictures of rows."""
        return engine.preview(rows, self._shows)

    def frames(self) -> dict[int, dict[Show, Images]]:
        """Read the frames, by step and in its order, uint8 [n, H, W, C] each.

        For a job that is done, in a thread that may wait.
        """
        frames: dict[int, dict[Show, Images]] = {}
        for step in sorted(self._parts):
            frame = frames.setdefault(step, {})
            for indices, positions, read in self._parts[step]:
                for show, images in read().items():
                    whole = frame.setdefault(show, np.zeros((self._n, *images.shape[1:]), np.uint8))
                    whole[indices] = images[positions]
        return frames


class Path(Recorder[Point]):
    """The trajectory of a job: its rows before the first step, and after each."""

    def __init__(self, spec: SampleSpec) -> None:
        super().__init__()
        self._spec = spec
        self._plan: PlanNumbers | None = None  # None until its first rows are read

    def due(self, step: int) -> bool:  # noqa: ARG002
        """Say that a row is kept, whatever its step."""
        return True

    def read(self, engine: RowEngine, rows: Sequence[int]) -> Callable[[], Point]:
        """Read the latents of rows."""
        if self._plan is None:
            self._plan = engine.plan(self._spec)
        return engine.point(rows)

    def trajectory(self) -> Trajectory:
        """Read all of it, once. For a job that is done, in a thread that may wait."""
        assert self._plan is not None
        n, passes, first = self._spec.n, len(self._plan.timesteps), self._parts[0][0][2]().x

        def room(count: int) -> npt.NDArray[np.float32]:
            return np.empty((count, n, *first.shape[1:]), np.float32)

        x_t, x_0, v = room(passes + 1), room(passes), room(passes) if self._plan.learned else None
        for step in range(passes + 1):
            for indices, positions, read in self._parts.pop(step):  # popped, so that no point is held twice
                point = read()
                x_t[step, indices] = point.x[positions]
                if step:
                    x_0[step - 1, indices] = point.x_0[positions]
                if step and v is not None:
                    assert point.v is not None
                    v[step - 1, indices] = point.v[positions]
        return Trajectory(self._plan, x_t, x_0, v)


def frame_count(every: int, steps: int) -> int:
    """How many frames a recording has, including the result."""
    return (steps - 1) // every + 1


class RecordingRoom:
    """Bounds the memory of all frames that are kept for answers being made. In the event loop's thread."""

    def __init__(self, budget: ByteBudget) -> None:
        """budget: that of answers, of which those count that are being sent too."""
        self._budget = budget

    @contextmanager
    def taken(self, size_bytes: int, field: str) -> Iterator[None]:
        """Hold room for a recording of this size. Raises Overloaded, which names the field that it depends on."""
        free_bytes = self._budget.limit_bytes - self._budget.held_bytes
        with self._budget.hold() as room:
            try:
                room.add(size_bytes)
            except TooManyBytes:
                raise Overloaded(
                    f"{self._budget.held_bytes} bytes of frames, trajectories and answers would be held at once; "
                    f"the limit is {self._budget.limit_bytes}",
                    retry_after_s=1,
                    field=field,
                    value=size_bytes,
                    bound=f"what takes at most {free_bytes} bytes at this load",
                ) from None
            yield
