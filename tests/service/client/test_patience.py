from collections.abc import Callable

import pytest

from tests.service.client.conftest import job_members
from tminus.service.client import Problem, UnexpectedAnswer, Unreachable
from tminus.service.client.patience import LAST_LOOK_S, RESTART_S, Patience, Polling
from tminus.service.client.results import JobState


def iterate(call: Callable[[], None]) -> None:
    """Call it until it raises."""
    while True:
        call()


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


REFUSED = Problem({"status": 429, "code": "overloaded", "detail": "too much"}, retry_after_s=7)
CUT, NOBODY = Unreachable("cut", reached=True), Unreachable("nobody", reached=False)


def test_a_refusal_is_waited_for_as_long_as_it_says_while_patience_lasts() -> None:
    clock = Clock()
    patience = Patience(20, clock=clock)
    for _ in range(2):
        assert patience.pause_s(REFUSED) == 7
        clock.now_s += 7.1
    with pytest.raises(Problem):
        patience.pause_s(REFUSED)


def test_what_the_server_may_have_got_is_not_sent_again_where_it_may_go_there_once() -> None:
    patience = Patience(1000, once=True)
    assert patience.pause_s(NOBODY) > 0
    assert patience.pause_s(REFUSED) == 7
    with pytest.raises(Unreachable):
        patience.pause_s(CUT)


def test_tries_to_connect_become_rarer() -> None:
    clock = Clock()
    patience = Patience(30, clock=clock)
    pauses = list[float]()

    def wait() -> None:
        pauses.append(patience.pause_s(NOBODY))
        clock.now_s += pauses[-1]

    with pytest.raises(Unreachable):
        iterate(wait)
    assert 0.18 < pauses[0] <= 0.25
    assert 3 <= pauses[-1] <= 4
    assert 25 < sum(pauses) <= 30


def test_a_server_that_was_there_may_be_starting_again() -> None:
    with pytest.raises(Unreachable):
        Patience(0).pause_s(CUT)
    with pytest.raises(Unreachable):
        Patience(0, durable=True).pause_s(NOBODY)
    clock = Clock()
    patience = Patience(0, durable=True, clock=clock)
    assert patience.pause_s(CUT) > 0
    clock.now_s += RESTART_S / 2
    assert patience.pause_s(NOBODY) > 0, "the server is known to exist now"
    clock.now_s += RESTART_S / 2
    with pytest.raises(Unreachable):
        patience.pause_s(NOBODY)
    patience.renew()
    assert patience.pause_s(NOBODY) > 0


def job(state: str, eta_s: float | None) -> JobState:
    return JobState.of(job_members(state=state, eta_s=eta_s))


def test_a_job_is_looked_at_again_when_it_should_be_done() -> None:
    polling = Polling("x", None)
    assert polling.look_s(60) == 60
    told = [("waiting", 100), ("running", 0.7), ("running", 0.0), ("waiting", None)]
    assert [polling.pause_s(job(*each)) for each in told] == [2.0, 0.7, 0.05, 0.05]


def test_a_job_is_looked_at_once_more_when_the_time_is_up() -> None:
    clock = Clock()
    polling = Polling("x", 3, clock)
    pauses = list[float]()

    def wait() -> None:
        pauses.append(polling.pause_s(job("running", 60)))
        clock.now_s += pauses[-1]

    with pytest.raises(TimeoutError, match="job x is running after 3 s"):
        iterate(wait)
    assert pauses == [2, 1]


def test_a_look_takes_no_longer_than_the_time_that_is_left_nor_does_the_pause_after_one_that_failed() -> None:
    clock = Clock()
    polling, patience = Polling("x", 5, clock), Patience(1000, clock=clock)
    assert polling.look_s(60) == 5
    assert polling.look_s(2) == 2
    clock.now_s += 3
    assert polling.look_s(60) == 2
    assert polling.pause_after_s(REFUSED, patience) == 2, "it says 7"
    clock.now_s += 2
    assert polling.look_s(60) == LAST_LOOK_S, "it is looked at once more"
    with pytest.raises(TimeoutError, match=r"job x could not be looked at \(nobody\) after 5 s"):
        polling.pause_after_s(NOBODY, patience)
    with pytest.raises(UnexpectedAnswer):
        polling.pause_after_s(UnexpectedAnswer(200), patience)
