"""Recorders, which keep frames or latents of a running job.

A row is recorded when it reaches certain steps, so the load of the server does not change a recording.
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
    """Records data of the rows of one job.

    The worker's thread records. A different thread, which encodes the response, reads. In a preview, the rows of a job
    may be at different steps. In a recorded frame, all rows are at the same step.
    """

    def __init__(self) -> None:
        # Parts, keyed by step. A part has the indices of some rows in the job, their positions in an array, and a
        # function that returns the array.
        self._parts: dict[int, list[tuple[list[int], list[int], Callable[[], Kept]]]] = {}
        self.until: int | None = None  # the step after which the job ends; set only if no images were requested

    @abstractmethod
    def due(self, step: int) -> bool:
        """Return True if a row must be recorded after this number of steps. Step 0 is before the first pass."""

    @abstractmethod
    def read(self, engine: RowEngine, rows: Sequence[int]) -> Callable[[], Kept]:
        """Read rows from the engine. Returns a function that may block until the GPU is done."""

    def record(self, engine: RowEngine, rows: Sequence[int], taken: Iterable[tuple[int, int]]) -> None:
        """Record the rows that are due. taken: for each row, the steps it has taken and its index in the job."""
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
        """from_noise: also record the initial noise. until: the last step to record; None: record all steps."""
        super().__init__()
        self._shows = shows
        self._every, self._n, self._steps = every, n, steps
        self._first, self.until = 0 if from_noise else 1, until

    def due(self, step: int) -> bool:
        """Return True if a frame is due after this number of steps. There is no frame after the last step."""
        wanted = self._first <= step < self._steps and (self.until is None or step <= self.until)
        return wanted and step % self._every == 0

    def read(self, engine: RowEngine, rows: Sequence[int]) -> Callable[[], Mapping[Show, Images]]:
        return engine.preview(rows, self._shows)

    def frames(self) -> dict[int, dict[Show, Images]]:
        """Return the frames, keyed by step in ascending order. Each frame is uint8 [n, H, W, C].

        Call this only after the job has ended. May block until the GPU is done.
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
    """Records a job's trajectory: its rows before and after each selected pass, by default every pass."""

    def __init__(self, spec: SampleSpec, selection: Selection | None = None, dtype: TrajectoryType = "float32") -> None:
        """dtype: the dtype of x_t and x_0 in the trajectory. The recorded data itself is float32."""
        super().__init__()
        self._spec, self._selection, self._dtype = spec, selection or Selection.whole(spec.num_passes), dtype
        self._due = {*self._selection.points, *(each + 1 for each in self._selection.predictions)}
        self._plan: PlanNumbers | None = None  # set by the first call of `read`

    def due(self, step: int) -> bool:
        """Return True if x_t after this number of steps is selected, or x_0 of the last of these steps."""
        return step in self._due

    def read(self, engine: RowEngine, rows: Sequence[int]) -> Callable[[], Point]:
        if self._plan is None:
            self._plan = engine.plan(self._spec)
        return engine.point(rows)

    def trajectory(self) -> Trajectory:
        """Return the trajectory. Call this once, after the job has ended. May block until the GPU is done."""
        assert self._plan is not None
        selection, shape = self._selection, (self._spec.n, *self._parts[min(self._due)][0][2]().x.shape[1:])
        point, prediction = ({k: at for at, k in enumerate(each)} for each in (selection.points, selection.predictions))
        x_t, x_0 = (np.empty((len(each), *shape), self._dtype) for each in (point, prediction))
        v = np.empty((len(prediction), *shape), np.float32) if self._plan.learned else None
        for step in sorted(self._due):
            for indices, positions, read in self._parts.pop(step):  # `pop` frees the recorded data once it is copied
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
    """Return the number of frames in a recording, including the result."""
    return (steps - 1) // every + 1


class RecordingRoom:
    """Limits the memory for frames and pixels of responses in preparation.

    All methods must be called in the event loop's thread.
    """

    def __init__(self, budget: ByteBudget) -> None:
        """budget: counts the bytes of all responses, including the responses that are being sent."""
        self._budget = budget

    @contextmanager
    def taken(self, size_bytes: int, field: str) -> Iterator[None]:
        """Reserve memory for one response while the `with` block runs.

        A small response always fits, and so does the only response. Raises Overloaded if the memory is not available.
        The error names `field`, the request parameter that determines the size.
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
