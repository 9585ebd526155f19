import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.keys import access_of, key_line
from tminus.service.access.access import MOST_WRONG_LOGINS, WINDOW_S, Access, Caller, Usage
from tminus.service.access.keys import KeyLimits, KeyRing
from tminus.service.errors import QuotaExceeded, TooManyLogins, Unauthorized

LINES = key_line("studio", "s", jobs=3), key_line("ops", "o", "admin")


def test_after_ten_wrong_logins_from_an_address_none_from_there_is_looked_at_for_a_minute() -> None:
    now_s = 0.0
    access = Access(KeyRing(LINES[0]), clock=lambda: now_s)
    for _ in range(MOST_WRONG_LOGINS):
        access.login("s", "10.0.0.1")
        with pytest.raises(Unauthorized):
            access.login("wrong", "10.0.0.1")
        now_s += 1
    for secret in ("wrong", "s"):
        with pytest.raises(TooManyLogins) as caught:
            access.login(secret, "10.0.0.1")
        assert caught.value.headers["Retry-After"] == str(WINDOW_S)
    assert access.login("s", "10.0.0.2").name == access.with_secret("s").name == "studio"
    now_s += WINDOW_S
    assert access.login("s", "10.0.0.1").name == "studio", "what is refused does not count"


def test_secrets_of_one_name_share_its_usage() -> None:
    access = access_of(
        key_line("a", "one", row_steps_per_minute=60),
        key_line("a", "two", row_steps_per_minute=60),
        key_line("b", "three", row_steps_per_minute=60),
    )
    with access.with_secret("one").charged(40, 0):
        pass
    left = [access.with_secret(secret).allowance for secret in ("two", "three")]
    assert [each.left for each in left if each] == [40 - 20, 60]


# --- quotas ---


class At:
    """A caller at the times that a test says."""

    def __init__(self, **limits: int) -> None:
        self.now_s = 0.0
        self.caller = Caller("a", "sample", KeyLimits(**limits), Usage(0.0), lambda: self.now_s)

    def charge(self, row_steps: int, now_s: float = 0.0, jobs: int = 0) -> bool:
        self.now_s = now_s
        try:
            with self.caller.charged(row_steps, jobs):
                return True
        except QuotaExceeded:
            return False

    def left(self, now_s: float) -> tuple[int, int]:
        self.now_s = now_s
        allowance = self.caller.allowance
        assert allowance is not None
        return allowance.left, allowance.full_in_s


def test_a_minutes_row_steps_are_there_at_once_and_come_back_evenly() -> None:
    at = At(row_steps_per_minute=600)
    assert [at.charge(200) for _ in range(4)] == [True, True, True, False]
    at.now_s = 1.0
    with pytest.raises(QuotaExceeded) as caught, at.caller.charged(200, 0):
        pass
    error = caught.value
    assert (error.field, error.value) == ("row_steps", 200)
    assert "at most 600 row-steps a minute, of which 10 are left" in error.detail
    assert error.headers["Retry-After"] == "19", "190 are missing, 10 come a second"
    assert not at.charge(200, 1.0 + 18.9)
    assert at.charge(200, 1.0 + 19)
    assert [at.left(now_s) for now_s in (20.0, 25.0, 35.0, 80.0)] == [(0, 60), (50, 55), (150, 45), (600, 0)]


def test_a_job_of_more_than_a_minute_begins_with_a_full_bucket_and_is_owed() -> None:
    at = At(row_steps_per_minute=60)
    assert at.charge(600)
    assert at.left(0.0) == (0, 600)
    assert not at.charge(1, 540.0)
    assert at.charge(1, 541.1)
    assert not at.charge(600, 599.0), "not full yet"
    assert at.charge(600, 602.0)


def test_a_job_that_is_refused_elsewhere_costs_nothing() -> None:
    at = At(row_steps_per_minute=60)
    for _ in range(3):
        with pytest.raises(RuntimeError), at.caller.charged(60, 0):
            raise RuntimeError
    assert at.charge(60)
    assert not at.charge(60, -30.0), "a clock that goes back gives nothing"


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 100)), min_size=1, max_size=60),
)
def test_in_the_long_run_the_quota_holds_and_after_retry_after_there_is_room(
    quota: int, asked: list[tuple[int, float]]
) -> None:
    """What was accepted before the last job is never more than a bucket and what has flowed in since."""
    at, accepted = At(row_steps_per_minute=quota), 0
    for row_steps, pause_s in asked:
        at.now_s += pause_s
        try:
            with at.caller.charged(row_steps, 0):
                pass
        except QuotaExceeded as error:
            assert at.left(at.now_s)[0] <= min(row_steps, quota)
            assert at.charge(row_steps, at.now_s + int(error.headers["Retry-After"]) + 1e-6)
        assert accepted + min(row_steps, quota) <= quota * (1 + at.now_s / WINDOW_S) + 1e-6
        accepted += row_steps
