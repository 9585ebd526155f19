import pytest

from tminus.service.preview import Frame, Pace, Watch


def shown(watch: Watch, steps: int, tick_s: float = 0.01) -> list[int]:
    return [step for step in range(1, steps + 1) if watch.due(step, step * tick_s)]


def make_watch(**pace: float) -> Watch:
    frames: list[Frame] = []
    return Watch(Pace(**pace), ("x_t",), frames.append)  # type: ignore[arg-type]


def test_a_frame_is_due_after_every_so_many_steps_and_those_jumped_over_are_one() -> None:
    for every, steps, expected in ((1, 4, [1, 2, 3, 4]), (3, 10, [3, 6, 9]), (5, 4, [])):
        assert shown(make_watch(every=every), steps) == expected
    watch = make_watch(every=3)
    assert [watch.due(step, 0.0) for step in (2, 7, 8, 9, 9)] == [False, True, False, True, False]


def test_a_job_has_no_more_frames_a_second_than_asked_and_none_while_it_stands_still() -> None:
    assert len(shown(make_watch(fps=10), 1000)) == pytest.approx(100, abs=1)
    assert len(shown(make_watch(fps=60), 1000, tick_s=0.1)) == 1000, "and no more than it has steps"
    watch = make_watch(fps=10)
    assert [watch.due(step, at_s) for step, at_s in ((1, 0.0), (1, 100.0), (2, 100.0))] == [True, False, True]


def test_missed_frames_are_not_caught_up_on() -> None:
    watch = make_watch(fps=10)
    assert watch.due(1, 0.0)
    assert [watch.due(step, 5.0 + 0.001 * step) for step in range(2, 60)].count(True) == 1


def test_frames_at_given_steps_are_due_once_each_and_together_where_they_were_jumped_over() -> None:
    at = Pace(steps=(3, 5, 9))
    assert shown(Watch(at, ("x_0",), [].append), 20) == [3, 5, 9]
    watch = Watch(at, ("x_0",), [].append)
    assert [watch.due(step, 0.0) for step in (2, 6, 7, 12)] == [False, True, False, True]
    assert shown(Watch(Pace(steps=()), ("x_0",), [].append), 20) == []
