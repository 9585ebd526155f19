import pytest
from hypothesis import given
from hypothesis import strategies as st

from tminus.service.access.keys import KeyLimits
from tminus.service.access.usage import WINDOW_S, Usage
from tminus.service.errors import QuotaExceeded


def charge(usage: Usage, limits: KeyLimits, row_steps: int, now_s: float, jobs: int = 0) -> bool:
    try:
        with usage.charged(limits, row_steps, jobs, now_s):
            return True
    except QuotaExceeded:
        return False


def test_a_minutes_row_steps_are_there_at_once_and_come_back_evenly() -> None:
    usage, limits = Usage(0.0), KeyLimits(row_steps_per_minute=600)
    assert [charge(usage, limits, 200, 0.0) for _ in range(4)] == [True, True, True, False]
    with pytest.raises(QuotaExceeded) as caught, usage.charged(limits, 200, 0, 1.0):
        pass
    error = caught.value
    assert (error.field, error.value) == ("row_steps", 200)
    assert "at most 600 row-steps a minute, of which 10 are left" in error.detail
    assert error.headers["Retry-After"] == "19", "190 are missing, 10 come a second"
    assert not charge(usage, limits, 200, 1.0 + 18.9)
    assert charge(usage, limits, 200, 1.0 + 19)


def test_what_is_left_is_told() -> None:
    usage, limits = Usage(0.0), KeyLimits(row_steps_per_minute=600)
    charge(usage, limits, 150, 0.0)
    assert usage.allowance(limits, 0.0) is not None
    found = [usage.allowance(limits, now_s) for now_s in (0.0, 5.0, 15.0, 60.0)]
    assert [(each.quota, each.left, each.full_in_s) for each in found if each] == [
        *((600, 450, 15), (600, 500, 10)),
        *((600, 600, 0), (600, 600, 0)),
    ]


def test_a_job_of_more_than_a_minute_begins_with_a_full_bucket_and_is_owed() -> None:
    usage, limits = Usage(0.0), KeyLimits(row_steps_per_minute=60)
    assert charge(usage, limits, 600, 0.0)
    allowance = usage.allowance(limits, 0.0)
    assert allowance is not None
    assert (allowance.left, allowance.full_in_s) == (0, 600)
    assert not charge(usage, limits, 1, 540.0)
    assert charge(usage, limits, 1, 541.1)
    assert not charge(usage, limits, 600, 599.0), "not full yet"
    assert charge(usage, limits, 600, 602.0)


def test_a_job_that_is_refused_elsewhere_costs_nothing() -> None:
    usage, limits = Usage(0.0), KeyLimits(row_steps_per_minute=60)
    for _ in range(3):
        with pytest.raises(RuntimeError), usage.charged(limits, 60, 0, 0.0):
            raise RuntimeError
    assert charge(usage, limits, 60, 0.0)


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 100)), min_size=1, max_size=60),
)
def test_in_the_long_run_the_quota_holds(quota: int, asked: list[tuple[int, float]]) -> None:
    """What was accepted before the last job is never more than a bucket and what has flowed in since."""
    usage, limits, now_s, accepted = Usage(0.0), KeyLimits(row_steps_per_minute=quota), 0.0, 0
    for row_steps, pause_s in asked:
        now_s += pause_s
        before = accepted
        if charge(usage, limits, row_steps, now_s):
            accepted += row_steps
            assert before + min(row_steps, quota) <= quota * (1 + now_s / WINDOW_S) + 1e-6
        else:
            allowance = usage.allowance(limits, now_s)
            assert allowance is not None
            assert allowance.left <= min(row_steps, quota)


@given(st.integers(1, 1000), st.integers(1, 3000), st.integers(1, 3000))
def test_after_retry_after_there_is_room(quota: int, first: int, second: int) -> None:
    usage, limits = Usage(0.0), KeyLimits(row_steps_per_minute=quota)
    assert charge(usage, limits, first, 0.0)
    try:
        with usage.charged(limits, second, 0, 0.0):
            pass
    except QuotaExceeded as error:
        wait_s = int(error.headers["Retry-After"])
        assert charge(usage, limits, second, wait_s + 1e-6)


def test_jobs_are_limited() -> None:
    usage, limits = Usage(0.0), KeyLimits(jobs=2)
    assert charge(usage, limits, 5, 0.0, jobs=1)
    with pytest.raises(QuotaExceeded, match="at most 2 jobs") as caught, usage.charged(limits, 5, 2, 0.0):
        pass
    assert (caught.value.field, caught.value.headers["Retry-After"]) == ("jobs", "1")


def test_connections_are_limited_while_they_last() -> None:
    usage, limits = Usage(0.0), KeyLimits(connections=2)
    third = pytest.raises(QuotaExceeded, match="at most 2 connections at once")
    with usage.connected(limits), usage.connected(limits), third, usage.connected(limits):
        pass
    with pytest.raises(RuntimeError), usage.connected(limits):
        raise RuntimeError
    with usage.connected(limits), usage.connected(limits):
        pass


def test_a_clock_that_goes_back_gives_nothing() -> None:
    usage, limits = Usage(100.0), KeyLimits(row_steps_per_minute=60)
    assert charge(usage, limits, 60, 100.0)
    assert not charge(usage, limits, 60, 0.0)
    assert not charge(usage, limits, 60, 30.0)
