"""Which setting a job with a deadline gets."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.scheduling.machine import plain
from tests.service.scheduling.test_admission import make_admission
from tminus.service.errors import DeadlineUnmeetable, InvalidField, ServiceError
from tminus.service.scheduling.admission import Admission
from tminus.service.work import Work

LADDER = [plain(4, steps) for steps in (8, 5, 2, 1)]
STEP_S = 1 / 8  # of one tick, whatever its size


def admission_with(jobs: Sequence[tuple[int, int, float | None]], asked: Sequence[float] = ()) -> Admission:
    """An admission that holds jobs of (rows, steps, deadline), and has done adaptive jobs at some times before."""
    admission = make_admission(max_jobs=1000)
    for now_s in asked:
        admission.enter("gone", LADDER[-1], now_s=now_s, deadline_s=1e6, best=LADDER[0])
        admission.leave("gone")
    for number, (rows, steps, deadline_s) in enumerate(jobs):
        try:
            admission.enter(str(number), plain(rows, steps), now_s=20.0, deadline_s=deadline_s)
        except ServiceError:
            continue
    return admission


def choose(admission: Admission, deadline_s: float, works: Sequence[Work] = LADDER, now_s: float = 20.0) -> int | None:
    """The index of the chosen setting, or None if none fits."""
    try:
        return admission.best_in_time(works, now_s=now_s, deadline_s=deadline_s)
    except (DeadlineUnmeetable, InvalidField):
        return None


def test_an_idle_server_takes_the_best_setting_that_is_ready_in_time() -> None:
    for deadline_s, index in ((1e6, 0), (8 * STEP_S, 0), (7.9 * STEP_S, 1), (2 * STEP_S, 2), (STEP_S, 3)):
        assert choose(make_admission(), deadline_s) == index, deadline_s


def test_a_refusal_names_the_fastest_setting() -> None:
    with pytest.raises(InvalidField, match=r"deadline_s must be at least 0\.125 s for this work, got 0\.001"):
        make_admission().best_in_time(LADDER, now_s=0.0, deadline_s=0.001)
    admission = make_admission()
    for number in range(4):
        admission.enter(str(number), plain(4, 1), now_s=0.0)
    with pytest.raises(DeadlineUnmeetable, match=r"would be done in 0\.4 s, its deadline_s is 0\.2") as caught:
        admission.best_in_time(LADDER, now_s=0.0, deadline_s=0.2)
    assert caught.value.bound == "at least 0.4 s at this load"


def test_nothing_is_reserved() -> None:
    admission = make_admission()
    assert [choose(admission, 1.0) for _ in range(3)] == [0] * 3
    assert (admission.rows, admission.backlog_s) == (0, 0)


def test_no_choice_makes_an_accepted_job_late() -> None:
    """The earlier job has more work left, so any setting of the new one goes before it."""
    admission = make_admission()
    admission.enter("earlier", plain(8, 16), now_s=20.0, deadline_s=16 * STEP_S + 0.6)
    assert choose(admission, 1e6, [plain(8, 8), plain(8, 5), plain(8, 2), plain(8, 1)]) == 2
    with pytest.raises(DeadlineUnmeetable, match=r"fastest setting .* done in 0\.9 s, and accepted jobs would miss"):
        admission.best_in_time([plain(8, 8), plain(8, 5)], now_s=20.0, deadline_s=1e6)


def test_an_accepted_job_that_is_not_delayed_does_not_matter() -> None:
    """Its forecast is near its deadline, but the new job has more work left, so it goes first."""
    admission = make_admission()
    admission.enter("earlier", plain(8, 4), now_s=20.0, deadline_s=4 * STEP_S)
    assert choose(admission, 1e6, [plain(8, 8)]) == 0


def test_a_setting_for_which_there_is_no_room_is_left_out() -> None:
    admission = make_admission(max_backlog_s=0.9)
    admission.enter("earlier", plain(8, 4), now_s=20.0)
    assert choose(admission, 1e6) == 1
    admission.enter("more", plain(8, 3), now_s=20.0)
    assert choose(admission, 1e6) == 3, "Overloaded names the time of its retry"


def test_a_job_that_is_late_anyway_does_not_matter() -> None:
    admission = make_admission()
    admission.enter("late", plain(8, 16), now_s=0.0, deadline_s=17 * STEP_S)
    assert choose(admission, 1e6, now_s=20.0) == 0


def test_under_load_a_part_of_the_deadline_is_left_for_later_jobs() -> None:
    busy, idle = admission_with([], [19 + k / 100 for k in range(100)]), admission_with([])
    deadline_s = 20 * STEP_S
    assert (choose(idle, deadline_s), choose(busy, deadline_s)) == (0, 2)
    assert choose(busy, deadline_s, now_s=60.0) == 0, "once the load is over"
    assert choose(admission_with([], [19.0]), deadline_s) == 0, "one request is no load"


JOBS = st.lists(
    st.tuples(st.integers(1, 8), st.integers(1, 20), st.none() | st.floats(0.1, 50)), max_size=30
)  # fmt: skip
ASKED = st.lists(st.floats(0, 20), max_size=30).map(sorted)


@given(jobs=JOBS, asked=ASKED, deadlines=st.tuples(st.floats(0.01, 60), st.floats(0.01, 60)))
def test_a_longer_deadline_never_gives_a_lower_setting(
    jobs: list[tuple[int, int, float | None]], asked: list[float], deadlines: tuple[float, float]
) -> None:
    shorter, longer = (choose(admission_with(jobs, asked), deadline_s) for deadline_s in sorted(deadlines))
    assert shorter is None or (longer is not None and longer <= shorter)


@given(jobs=JOBS, asked=ASKED, deadline_s=st.floats(0.01, 60))
def test_a_chosen_setting_is_accepted_and_makes_nobody_late(
    jobs: list[tuple[int, int, float | None]], asked: list[float], deadline_s: float
) -> None:
    admission = admission_with(jobs, asked)
    if (index := choose(admission, deadline_s)) is None:
        return
    due_s = {str(number): each[2] for number, each in enumerate(jobs)}

    def late() -> set[str]:
        outlooks = admission.outlooks(20.0)
        return {job_id for job_id, each in outlooks.items() if each.eta_s > (due_s.get(job_id) or math.inf) + 1e-9}

    before = late()
    assert admission.enter("new", LADDER[index], now_s=20.0, deadline_s=deadline_s).eta_s <= deadline_s
    assert late() <= before
