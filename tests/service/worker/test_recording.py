import random

import numpy as np
import pytest

from tminus.service.errors import Overloaded
from tminus.service.worker.recording import Recording, RecordingRoom, frame_count


@pytest.mark.parametrize(("every", "steps"), [(1, 5), (2, 5), (5, 5), (7, 5), (3, 10)])
def test_frames_are_of_one_step_each_however_the_rows_came_to_it(every: int, steps: int) -> None:
    n, rng = 3, random.Random(every * 31 + steps)
    recording = Recording(every, "x_t", n, steps)
    taken = [0] * n
    while min(taken) < steps:  # ticks of any rows
        rows = [row for row in range(n) if taken[row] < steps and rng.random() < 0.6]
        for row in rows:
            taken[row] += 1
        due = [(taken[row], row) for row in rows if recording.due(taken[row])]
        if due:
            pixels = np.array([10 * row + step for step, row in due], np.uint8).reshape(-1, 1, 1, 1)
            recording.put(due, lambda pixels=pixels: {"x_t": pixels})  # type: ignore[misc]
    frames = recording.frames()
    assert len(frames) == frame_count(every, steps) - 1, "the last is the result"
    for number, frame in enumerate(frames, 1):
        np.testing.assert_array_equal(frame[:, 0, 0, 0], [10 * row + number * every for row in range(n)])


def test_recordings_over_the_room_are_refused_with_what_is_free_and_leave_no_trace() -> None:
    room = RecordingRoom(100)
    with room.taken(60):
        with pytest.raises(Overloaded) as caught, room.taken(41):
            pytest.fail("there is no room")
        with room.taken(40):
            pass
    with room.taken(100):
        pass
    error = caught.value
    assert error.detail == "101 bytes of frames would be held at once; the limit is 100. Try again in 1 s"
    assert (error.status, error.code, error.field, error.value) == (429, "overloaded", "every", 41)
    assert error.bound == "frames of at most 40 bytes at this load"
    assert error.headers["Retry-After"] == "1"
