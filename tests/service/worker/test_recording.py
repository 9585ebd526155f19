import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.service.fakes import FakeEngine, make_spec
from tminus.model.trajectory import Selection
from tminus.service.byte_budget import SMALL_BYTES, ByteBudget
from tminus.service.errors import Overloaded
from tminus.service.preview import Show
from tminus.service.spec import Images, Point, TrajectoryType
from tminus.service.worker.recording import Recording, RecordingRoom, TrajectoryRecorder, frame_count


@pytest.mark.parametrize(("every", "steps"), [(1, 5), (2, 5), (5, 5), (7, 5), (3, 10)])
def test_frames_are_of_one_step_each_however_the_rows_came_to_it(every: int, steps: int) -> None:
    n, engine, rng = 3, FakeEngine(), random.Random(every * 31 + steps)
    recording = Recording(every, ("x_t",), n, steps)
    taken = [0] * n

    def preview(rows: Sequence[int], _show: object) -> Callable[[], dict[Show, Images]]:
        pixels = np.array([10 * row + taken[row] for row in rows], np.uint8).reshape(-1, 1, 1, 1)
        return lambda: {"x_t": pixels}

    engine.preview = preview  # type: ignore[method-assign, assignment]
    while min(taken) < steps:  # ticks of any rows
        rows = [row for row in range(n) if taken[row] < steps and rng.random() < 0.6]
        for row in rows:
            taken[row] += 1
        recording.record(engine, range(n), [(taken[row], row) for row in rows])
    frames = recording.frames()
    assert len(frames) == frame_count(every, steps) - 1, "the last is the result"
    assert list(frames) == [number * every for number in range(1, len(frames) + 1)]
    for step, frame in frames.items():
        np.testing.assert_array_equal(frame["x_t"][:, 0, 0, 0], [10 * row + step for row in range(n)])


def test_frames_may_begin_with_the_noise_and_end_early() -> None:
    recording = Recording(2, ("x_t",), 1, 9, from_noise=True, until=5)
    assert [step for step in range(10) if recording.due(step)] == [0, 2, 4]


@pytest.mark.parametrize("strength", [None, 0.6])
def test_a_path_has_every_row_before_its_first_step_and_after_each(strength: float | None) -> None:
    spec, engine, rng = make_spec(n=3, steps=5, strength=strength), FakeEngine(), random.Random(0)
    path, passes = TrajectoryRecorder(spec), spec.num_passes
    taken = [0] * spec.n

    def point(rows: Sequence[int]) -> Callable[[], Point]:
        """x says row and step, x_0 that it is the prediction."""
        x = np.array([10 * row + taken[row] for row in rows], np.float32).reshape(-1, 1, 1, 1)
        return lambda: Point(x, -x)

    engine.point = point  # type: ignore[method-assign]
    path.record(engine, range(3), [(0, row) for row in range(3)])
    while min(taken) < passes:  # ticks of any rows, in any order
        rows = [row for row in rng.sample(range(3), 3) if taken[row] < passes and rng.random() < 0.6]
        for row in rows:
            taken[row] += 1
        path.record(engine, range(3), [(taken[row], row) for row in rows])
    trajectory = path.trajectory()
    assert len(trajectory.plan.timesteps) == passes
    assert trajectory.x_t[:, :, 0, 0, 0].tolist() == [[10 * row + k for row in range(3)] for k in range(passes + 1)]
    assert trajectory.x_0[:, :, 0, 0, 0].tolist() == [[-10 * row - k for row in range(3)] for k in range(1, passes + 1)]
    assert trajectory.v is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_path_of_some_passes_reads_rows_around_them_alone(dtype: TrajectoryType) -> None:
    spec, engine, asked = make_spec(n=2, steps=9), FakeEngine(), []
    path = TrajectoryRecorder(spec, Selection.of([1, 4, 5], 9, 1), dtype)

    def point(rows: Sequence[int]) -> Callable[[], Point]:
        asked.append(step)
        x = np.array([10 * row + step + 1e-4 for row in rows], np.float32).reshape(-1, 1, 1, 1)
        return lambda: Point(x, -x)

    engine.point = point  # type: ignore[method-assign]
    for step in range(10):
        path.record(engine, range(2), [(step, row) for row in range(2)])
    assert asked == [1, 2, 4, 5, 6]
    trajectory = path.trajectory()
    assert trajectory.x_t.dtype == trajectory.x_0.dtype == dtype
    seen = np.array([[10 * row + k + 1e-4 for row in range(2)] for k in (1, 2, 4, 5, 6)], np.float32)
    np.testing.assert_array_equal(trajectory.x_t[..., 0, 0, 0], seen.astype(dtype))
    np.testing.assert_array_equal(trajectory.x_0[..., 0, 0, 0], -seen.astype(dtype))
    assert trajectory.selected.predictions == (0, 1, 3, 4, 5)


def test_recordings_over_the_room_are_refused_with_what_is_free_and_leave_no_trace() -> None:
    budget = ByteBudget(1_000_000)
    room = RecordingRoom(budget)
    with room.taken(600_000, "n"):
        with pytest.raises(Overloaded) as caught, room.taken(400_001, "every"):
            pytest.fail("there is no room")
        with room.taken(400_000, "n"), room.taken(SMALL_BYTES, "n"):
            pass
    with room.taken(1_000_001, "n"):  # alone it would be refused for ever
        pass
    assert budget.held_bytes == 0
    error = caught.value
    assert error.detail.startswith("1000001 bytes of answers would be held at once")
    assert (error.status, error.code, error.field, error.value) == (429, "overloaded", "every", 400_001)
    assert error.bound == "what takes at most 400000 bytes at this load"
    assert error.headers["Retry-After"] == "1"
