"""Recorders of a running job's frames and latents.

Each row is recorded at its own steps, so the server's load does not change a recording.
"""

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
    """Records data of one job's rows. The worker's thread records, and the thread that encodes the response reads.

    A preview shows all rows at one moment, so their steps may differ. A recorded frame shows all rows after the same
    step.
    """

    def __init__(self) -> None:
        # Keyed by step. A part holds rows' indices in the job, the rows' positions in an array, and a function that
        # returns the array.
        self._parts: dict[int, list[tuple[list[int], list[int], Callable[[], Kept]]]] = {}
        self.until: int | None = None  # the job ends after this step, if no images were requested

    @abstractmethod
    def due(self, step: int) -> bool:
        """Return True if a row is recorded after `step` steps. Step 0 is before the first pass."""

    @abstractmethod
    def read(self, engine: RowEngine, rows: Sequence[int]) -> Callable[[], Kept]:
        """Read rows from the engine. The returned function may block until the GPU is done."""

    def record(self, engine: RowEngine, rows: Sequence[int], taken: Iterable[tuple[int, int]]) -> None:
        """Record the rows that are due. taken: (steps taken, index in the job) for each row."""
        due = [each for each in taken if self.due(each[0])]
        if not due:
            return
        read = self.read(engine, [rows[index] for _, index in due])
        for step in {step for step, _ in due}:
            positions = [position for position, (its_step, _) in enumerate(due) if its_step == step]
            indices = [due[position][1] for position in positions]
            self._parts.setdefault(step, []).append((indices, positions, read))


class Recording(Recorder[Mapping[Show, Images]]):
    """Records a frame of the job after every `every` steps."""

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
        """from_noise: record the initial noise too. until: the last step to record; None records all steps."""
        super().__init__()
        self._shows = shows
        self._every, self._n, self._steps = every, n, steps
        self._first, self.until = 0 if from_noise else 1, until

    def due(self, step: int) -> bool:
        """Return True if a frame is due after `step` steps. The last step is the job's result, not a frame."""
        wanted = self._first <= step < self._steps and (self.until is None or step <= self.until)
        return wanted and step % self._every == 0

    def read(self, engine: RowEngine, rows: Sequence[int]) -> Callable[[], Mapping[Show, Images]]:
        return engine.preview(rows, self._shows)

    def frames(self) -> dict[int, dict[Show, Images]]:
        """Return the frames, keyed by step in ascending order. Each is uint8 [n, H, W, C].

        May block until the GPU is done. Call it after the job has ended.
        """
        frames: dict[int, dict[Show, Images]] = {}
        for step in sorted(self._parts):
            frame = frames.setdefault(step, {})
            for indices, positions, read in self._parts[step]:
                for show, images in read().items():
                    whole = frame.setdefault(show, np.zeros((self._n, *images.shape[1:]), np.uint8))
                    whole[indices] = images[positions]
        return frames


class TrajectoryRecorder(Recorder[Point]):
    """Records a job's trajectory: the rows before and after every pass, or every selected pass."""

    def __init__(self, spec: SampleSpec, selection: Selection | None = None, dtype: TrajectoryType = "float32") -> None:
        """dtype: the dtype of x_t and x_0 in the trajectory. Recorded points are float32."""
        super().__init__()
        self._spec, self._selection, self._dtype = spec, selection or Selection.whole(spec.num_passes), dtype
        self._due = {*self._selection.points, *(each + 1 for each in self._selection.predictions)}
        self._plan: PlanNumbers | None = None  # set by the first `read`

    def due(self, step: int) -> bool:
        """Return True if x_t after `step` steps, or x_0 of the last of these passes, is selected."""
        return step in self._due

    def read(self, engine: RowEngine, rows: Sequence[int]) -> Callable[[], Point]:
        if self._plan is None:
            self._plan = engine.plan(self._spec)
        return engine.point(rows)

    def trajectory(self) -> Trajectory:
        """Return the trajectory. May block until the GPU is done. Call it once, after the job has ended."""
        assert self._plan is not None
        selection, shape = self._selection, (self._spec.n, *self._parts[min(self._due)][0][2]().x.shape[1:])
        point, prediction = ({k: at for at, k in enumerate(each)} for each in (selection.points, selection.predictions))
        x_t, x_0 = (np.empty((len(each), *shape), self._dtype) for each in (point, prediction))
        v = np.empty((len(prediction), *shape), np.float32) if self._plan.learned else None
        for step in sorted(self._due):
            for indices, positions, read in self._parts.pop(step):  # pop, to free each point after its copy
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
    """Return the number of frames of a recording, including the result."""
    return (steps - 1) // every + 1


class RecordingRoom:
    """Bounds the memory for frames and pixels of responses in preparation. Use it in the event loop's thread only."""

    def __init__(self, budget: ByteBudget) -> None:
        """budget: counts the bytes of all responses, including responses that are being sent."""
        self._budget = budget

    @contextmanager
    def taken(self, size_bytes: int, field: str) -> Iterator[None]:
        """Reserve memory for a response during the block. A small response, or the only response, always fits.

        Raises Overloaded. The error names `field`, the request parameter that determines the size.
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
