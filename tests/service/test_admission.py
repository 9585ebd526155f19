import math
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission import Admission
from service.errors import Overloaded
from service.job import Limits, SampleSpec
from tests.service.fakes import LIMITS, make_spec

SECONDS_PER_PLACE = 1 / 64  # exact in binary, so that no test hangs on rounding


def make_admission(seconds_per_place: float = SECONDS_PER_PLACE, **limits: object) -> Admission:
    admission = Admission(replace(LIMITS, **limits))  # type: ignore[arg-type]
    admission.calibrate(seconds_per_place)
    return admission


def refusal(admission: Admission, spec: SampleSpec) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        admission.enter(spec)
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    return caught.value


def assert_empty(admission: Admission, limits: Limits) -> None:
    """No work, rows or jobs are on the ledger: it is worth zero and exactly max_jobs jobs fit in."""
    assert (admission.backlog_s, admission.rows) == (0, 0)
    one = make_spec(n=1, steps=1)
    admission.calibrate(0.0)
    for _ in range(limits.max_jobs):
        admission.enter(one)
    refusal(admission, one)
    for _ in range(limits.max_jobs):
        admission.leave(one, one.work)


def test_the_backlog_is_the_accepted_work_at_the_measured_rate() -> None:
    admission = make_admission()
    admission.enter(make_spec(n=4, steps=10, guidance=2.0))
    admission.enter(make_spec(n=3, steps=8))
    assert admission.backlog_s == (80 + 24) * SECONDS_PER_PLACE
    assert admission.rows == 7
    admission.stepped(places=8, seconds=8 * SECONDS_PER_PLACE)
    assert admission.backlog_s == 96 * SECONDS_PER_PLACE


def test_a_job_over_the_backlog_limit_is_refused_with_the_reason() -> None:
    admission = make_admission(max_backlog_s=10.0)
    admission.enter(make_spec(n=10, steps=50))  # 7.8 s
    error = refusal(admission, make_spec(n=10, steps=20))  # 3.1 s
    assert (error.code, error.field, error.bound) == ("overloaded", "backlog_s", "at most 10")
    assert error.value == pytest.approx(700 / 64, abs=0.05)
    assert error.headers["Retry-After"] == "1"
    admission.enter(make_spec(n=10, steps=14))  # exactly up to the limit


def test_a_refused_job_leaves_nothing_on_the_ledger() -> None:
    admission = make_admission(max_backlog_s=1.0)
    admission.enter(make_spec(n=1, steps=10))
    before = (admission.backlog_s, admission.rows)
    refusal(admission, make_spec(n=64, steps=1000))
    assert (admission.backlog_s, admission.rows) == before


def test_an_idle_server_accepts_any_job_however_long() -> None:
    admission = make_admission(max_backlog_s=0.001)
    admission.enter(make_spec(n=64, steps=1000, guidance=3.0))
    refusal(admission, make_spec(n=1, steps=1))


def test_nothing_is_refused_for_time_before_a_tick_is_measured() -> None:
    admission = Admission(replace(LIMITS, max_backlog_s=0.001))
    admission.enter(make_spec(n=64, steps=1000))
    admission.enter(make_spec(n=64, steps=1000))
    assert admission.backlog_s == 0


@pytest.mark.parametrize(
    ("field", "limits", "bound"),
    [("jobs", {"max_jobs": 2}, "at most 2"), ("rows", {"max_rows": 9}, "at most 9")],
)
def test_jobs_and_rows_have_limits(field: str, limits: dict[str, int], bound: str) -> None:
    admission = make_admission(**limits)
    admission.enter(make_spec(n=4))
    admission.enter(make_spec(n=4))
    error = refusal(admission, make_spec(n=4))
    assert (error.field, error.bound) == (field, bound)
    assert str(error.value) in error.detail
    admission.leave(make_spec(n=4), make_spec(n=4).work)
    admission.enter(make_spec(n=4))


def test_the_rate_follows_the_ticks_slowly() -> None:
    admission = make_admission(seconds_per_place=1.0)
    admission.enter(make_spec(n=64, steps=1000))
    admission.stepped(places=10, seconds=50.0)
    assert 1.0 < admission.backlog_s / (64_000 - 10) < 1.5
    for _ in range(500):
        admission.stepped(places=10, seconds=50.0)
    assert admission.backlog_s / (64_000 - 5010) == pytest.approx(5.0, rel=1e-3)


def test_a_cancelled_jobs_work_leaves_with_it() -> None:
    admission = make_admission()
    spec = make_spec(n=4, steps=10)
    admission.enter(spec)
    admission.stepped(places=4, seconds=4 * SECONDS_PER_PLACE)
    admission.leave(spec, work_left=36)
    assert_empty(admission, LIMITS)


def test_threads_may_enter_and_leave_at_once() -> None:
    admission = make_admission(max_jobs=1000)
    spec = make_spec(n=2, steps=5)

    def work() -> None:
        for _ in range(500):
            admission.enter(spec)
            admission.stepped(places=10, seconds=10 * SECONDS_PER_PLACE)
            admission.leave(spec)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (admission.backlog_s, admission.rows) == (0, 0)


specs = st.builds(make_spec, n=st.integers(1, 16), steps=st.integers(1, 200), guidance=st.sampled_from([1.0, 2.0]))


@given(st.lists(specs, min_size=1, max_size=30), specs, st.sampled_from([0.5, 2.0, 7.0, 30.0]))
def test_after_retry_after_seconds_of_work_the_same_job_is_accepted(
    before: list[SampleSpec], wanted: SampleSpec, max_backlog_s: float
) -> None:
    admission = make_admission(max_backlog_s=max_backlog_s, max_jobs=1000, max_rows=1000)
    held = []
    for spec in before:
        try:
            admission.enter(spec)
        except Overloaded:
            continue
        held.append([spec, spec.work])
    try:
        admission.enter(wanted)
    except Overloaded as error:
        wait_s = int(error.headers["Retry-After"])
    else:
        return
    backlog_before_s = admission.backlog_s
    assert 1 <= wait_s <= max(1, math.ceil(backlog_before_s)), "never longer than all the work there is"
    places = math.ceil(wait_s / SECONDS_PER_PLACE)
    while places and held:
        step = min(places, held[0][1])
        admission.stepped(step, step * SECONDS_PER_PLACE)
        places -= step
        held[0][1] -= step
        if held[0][1] == 0:
            admission.leave(held.pop(0)[0])
    admission.enter(wanted)


@given(st.lists(st.tuples(specs, st.integers(0, 100)), max_size=30), st.randoms(use_true_random=False))
def test_when_all_have_left_the_ledger_is_empty(jobs: list[tuple[SampleSpec, int]], random: object) -> None:
    limits = replace(LIMITS, max_jobs=8, max_rows=64)
    admission = make_admission(max_jobs=8, max_rows=64)
    held: list[list] = []
    for spec, percent in jobs:
        try:
            admission.enter(spec)
        except Overloaded:
            assert held, "an empty server refuses nobody"
            spec, done_percent, left = held.pop(random.randrange(len(held)))  # type: ignore[attr-defined]
            places = left * done_percent // 100
            if places:
                admission.stepped(places, places * 0.01)
            admission.leave(spec, left - places)
        else:
            held.append([spec, percent, spec.work])
        assert admission.rows == sum(spec.n for spec, _, _ in held) <= 64
        assert len(held) <= 8
    for spec, _, left in held:
        admission.stepped(left, left * 0.01)
        admission.leave(spec)
    assert_empty(admission, limits)


@given(st.integers(1, 8), st.integers(1, 100), specs)
def test_retry_after_is_positive_and_no_longer_than_all_the_work_whichever_limit_is_met(
    max_jobs: int, max_rows: int, spec: SampleSpec
) -> None:
    admission = make_admission(max_jobs=max_jobs, max_rows=max(16, max_rows))
    for _ in range(200):
        try:
            admission.enter(spec)
        except Overloaded as error:
            assert 1 <= int(error.headers["Retry-After"]) <= max(1, math.ceil(admission.backlog_s))
            return
    raise AssertionError("no limit held")
