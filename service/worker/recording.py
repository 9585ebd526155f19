"""What is kept of a running job's steps, each row at its own, so that it is the same under any load. No torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np

from tminus.model.trajectory import PlanNumbers, Selection, Trajectory
from tminus.service.byte_budget import SMALL_BYTES, ByteBudget
from tminus.service.engine.protocol import RowEngine
from tminus.service.errors import Overloaded, TooManyBytes
from tminus.service.preview import Show
from tminus.service.spec import Images, Point, SampleSpec, TrajectoryType

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
    """The trajectory of a job: its rows before the first step, and after each; or around the passes selected."""

    def __init__(self, spec: SampleSpec, selection: Selection | None = None, dtype: TrajectoryType = "float32") -> None:
        """dtype: what x_t and x_0 are rounded to. They are read from the engine, and held until then, in float32."""
        super().__init__()
        self._spec, self._selection, self._dtype = spec, selection or Selection.whole(spec.num_passes), dtype
        self._due = {*self._selection.points, *(each + 1 for each in self._selection.predictions)}
        self._plan: PlanNumbers | None = None  # None until its first rows are read

    def due(self, step: int) -> bool:
        """Whether a row has then an x_t, or the x_0 of its last pass, that is wanted."""
        return step in self._due

    def read(self, engine: RowEngine, rows: Sequence[int]) -> Callable[[], Point]:
        """Read the latents of rows."""
        if self._plan is None:
            self._plan = engine.plan(self._spec)
        return engine.point(rows)

    def trajectory(self) -> Trajectory:
        """Read all of it, once. For a job that is done, in a thread that may wait."""
        assert self._plan is not None
        selection, shape = self._selection, (self._spec.n, *self._parts[min(self._due)][0][2]().x.shape[1:])
        point, prediction = ({k: at for at, k in enumerate(each)} for each in (selection.points, selection.predictions))
        x_t, x_0 = (np.empty((len(each), *shape), self._dtype) for each in (point, prediction))
        v = np.empty((len(prediction), *shape), np.float32) if self._plan.learned else None
        for step in sorted(self._due):
            for indices, positions, read in self._parts.pop(step):  # popped, so that no point is held twice
                here = read()
                if step in point:
                    x_t[point[step], indices] = here.x[positions]
                if step - 1 in prediction:
                    x_0[prediction[step - 1], indices] = here.x_0[positions]
                    if v is not None:
                        assert here.v is not None
                        v[prediction[step - 1], indices] = here.v[positions]
        return Trajectory(self._plan, x_t, x_0, v, selection)


def frame_count(every: int, steps: int) -> int:
    """How many frames a recording has, including the result."""
    return (steps - 1) // every + 1


class RecordingRoom:
    """Bounds the memory that answers take while they are made, of frames and of pixels. In the event loop's thread."""

    def __init__(self, budget: ByteBudget) -> None:
        """budget: that of answers, of which those count that are being sent too."""
        self._budget = budget

    @contextmanager
    def taken(self, size_bytes: int, field: str) -> Iterator[None]:
        """Hold room for this size: always where it is small, or where nothing else is held.

        Raises Overloaded, which names the field that it depends on.
        """
        free_bytes = self._budget.limit_bytes - self._budget.held_bytes
        with self._budget.hold(SMALL_BYTES if self._budget.held_bytes else size_bytes) as room:
            try:
                room.add(size_bytes)
            except TooManyBytes:
                raise Overloaded(
                    f"{self._budget.held_bytes} bytes of answers would be held at once; "
                    f"the limit is {self._budget.limit_bytes}",
                    retry_after_s=1,
                    field=field,
                    value=size_bytes,
                    bound=f"what takes at most {free_bytes} bytes at this load",
                ) from None
            yield
