import random

import numpy as np
import pytest

from service.worker.recording import Recording, frame_count


@pytest.mark.parametrize(("every", "steps"), [(1, 5), (2, 5), (5, 5), (7, 5), (3, 10)])
def test_frames_are_of_one_step_each_however_the_rows_came_to_it(every: int, steps: int) -> None:
    n, rng = 3, random.Random(every * 31 + steps)
    recording = Recording(every, "x_t", n, steps)
    taken = [0] * n
    while min(taken) < steps:  # ticks of any rows
        rows = [row for row in range(n) if taken[row] < steps and rng.random() < 0.6]
        for row in rows:
            taken[row] += 1
        due = [(row, taken[row]) for row in rows if recording.due(taken[row])]
        if due:
            pixels = np.array([10 * row + step for row, step in due], np.uint8).reshape(-1, 1, 1, 1)
            recording.put(due, lambda pixels=pixels: {"x_t": pixels})  # type: ignore[misc]
    frames = recording.frames()
    assert len(frames) == frame_count(every, steps) - 1, "the last is the result"
    for number, frame in enumerate(frames, 1):
        np.testing.assert_array_equal(frame[:, 0, 0, 0], [10 * row + number * every for row in range(n)])
