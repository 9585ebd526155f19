"""When a refused client is told to come again, and that nobody is refused for the sake of one who was told a time."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import simulate
from bench.simulate import TICKS, Outcome
from tests.service.scheduling.machine import plain
from tests.service.scheduling.test_admission import LIMITS, make_admission, refusal, wait_of
from tminus.service.model_info import Limits
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.room import SPREAD_S, RetryQueue
from tminus.service.scheduling.scheduler import TickTimes
from tminus.service.work import Work

# --- the line ---


@pytest.mark.parametrize("limits", [{"max_jobs": 4}, {"max_rows": 32}, {"max_backlog_s": 40.0}])
def test_the_time_told_is_when_there_is_room_by_each_limit(limits: dict[str, float]) -> None:
    admission, work = make_admission(**limits), plain(8, 80)
    for name in "abcd":  # ten seconds each, one after the other
        admission.enter(name, work, now_s=0.0)
    waits = [wait_of(refusal(admission, work)) for _ in range(3)]
    for turn, wait_s in enumerate(waits, 1):
        assert 10 * turn <= wait_s <= 1.05 * 10 * turn + 2


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 10), st.floats(0.05, 2.0), st.floats(0.0, 100.0), st.booleans())
def test_a_server_that_decodes_longer_than_it_steps_is_idle_in_the_end(
    rows: int, steps: int, decode_s: float, now_s: float, one_job: bool
) -> None:
    """What is left to decode then is nothing, to the last digit: an idle server has room for any job."""
    limits = {"max_jobs": 1.0} if one_job else {"max_backlog_s": 10.0}
    admission = make_admission(decode_s=decode_s, **limits)
    admission.enter("a", plain(rows, steps), now_s=now_s)
    refused = refusal(admission, plain(64, 1000), now_s)
    assert wait_of(refused) >= rows * decode_s - 1


def test_the_line_is_of_a_bounded_length_and_the_rest_is_spread_evenly_in_it() -> None:
    line = RetryQueue()
    times = [line.next_s(100.0, 10.0) for _ in range(1000)]
    assert times[:31] == [100.0 + 10 * k for k in range(31)]
    assert all(100 <= time_s <= 100 + SPREAD_S for time_s in times)
    in_tenths = Counter(int((time_s - 100) / SPREAD_S * 10) for time_s in times[31:])
    assert min(in_tenths.values()) > 0.9 * max(in_tenths.values())


def test_who_asks_again_and_again_without_waiting_costs_others_little() -> None:
    """Twelve clients once brought an idle server to tell 6,017 seconds."""
    admission = make_admission(max_backlog_s=10.0)
    admission.enter("a", plain(8, 80), now_s=0.0)
    for k in range(5000):
        refusal(admission, plain(8, 70), now_s=k / 1000)
    assert wait_of(refusal(admission, plain(8, 70), now_s=5.0)) <= 10 + SPREAD_S
    admission.leave("a")
    admission.enter("b", plain(8, 70), now_s=5.0)
    assert wait_of(refusal(admission, plain(8, 70), now_s=5.0)) <= 12, "an idle moment ends the line"


# --- for every load: the scheduler itself, with a clock of predicted ticks ---


def check_refusal(limits: Limits, points: tuple[tuple[int, float], ...]) -> Callable[[Admission, Work], None]:
    """Nobody is refused while there is room."""
    place_s = TickTimes(points).seconds_per_place(limits.max_batch)

    def check(admission: Admission, work: Work) -> None:
        jobs, rows = len(admission.outlooks(0.0)), admission.rows
        assert jobs > 0, "an idle server takes all"
        over_backlog = admission.backlog_s + work.places * place_s > limits.max_backlog_s
        assert over_backlog or jobs == limits.max_jobs or rows + work.rows > limits.max_rows

    return check


def serve(
    requests: Sequence[tuple[float, Work]],
    limits: Limits,
    points: tuple[tuple[int, float], ...] = TICKS,
    comes_back: Callable[[int], bool] = lambda _number: True,
) -> Outcome:
    on_refusal = check_refusal(limits, points)
    return simulate.serve(requests, limits, points, comes_back=comes_back, on_refusal=on_refusal)


@st.composite
def works(draw: st.DrawFn) -> Work:
    steps = draw(st.integers(1, 50))
    return Work(draw(st.integers(1, 16)), steps, draw(st.sampled_from([range(0), range(steps), range(steps // 2)])))


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[float, Work]]:
    span_s = draw(st.sampled_from([0, 0, 1, 20]))
    return [(draw(st.floats(0, 1)) * span_s, work) for work in draw(st.lists(works(), min_size=1, max_size=40))]


tick_points = st.sampled_from([((8, 1 / 8),), TICKS, ((1, 0.02), (8, 0.022)), ((1, 0.01), (8, 0.08))])


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    requests(),
    tick_points,
    st.sampled_from([{"max_backlog_s": 0.1}, {"max_backlog_s": 2.0}, {"max_jobs": 1}, {"max_jobs": 4, "max_rows": 24}]),
    st.sampled_from([2, 3, 1000]),
)
def test_nobody_is_refused_while_there_is_room_and_who_comes_back_gets_in(
    load: list[tuple[float, Work]],
    points: tuple[tuple[int, float], ...],
    limits: dict[str, float],
    leaves: int,
) -> None:
    """`serve` checks each refusal. Every so many clients never come back."""
    held = replace(LIMITS, **{"max_jobs": 1000, "max_rows": 10_000} | limits)  # type: ignore[arg-type]
    outcome = serve(load, held, points, lambda number: number % leaves != 0)
    returning = {number for number in range(len(load)) if number % leaves}
    assert returning <= outcome.entered.keys()
    places, times = sum(work.places for _, work in load), TickTimes(points)
    slowest_s = max(places * times.seconds(1), places * times.seconds_per_place(8))
    assert all(1 <= wait_s <= 1.05 * slowest_s + 20 + SPREAD_S for wait_s in outcome.waits)


@pytest.mark.slow
@pytest.mark.parametrize(("load", "share_that_returns"), [(1.5, 0.5), (5.0, 0.0)])
def test_the_server_is_kept_busy_though_the_refused_do_not_return(load: float, share_that_returns: float) -> None:
    mix = random.Random(1)
    place_s, time_s = TickTimes(TICKS).seconds_per_place(8), 0.0
    arrivals: list[tuple[float, Work]] = []
    while time_s < 30.0:
        work = plain(mix.choice([1, 2, 4]), mix.choice([20, 20, 50, 100]))
        time_s += mix.expovariate(load / (100 * place_s))  # the mean of places is a little over 100
        arrivals.append((time_s, work))
    returns = [mix.random() < share_that_returns for _ in arrivals]
    outcome = serve(arrivals, replace(LIMITS, max_backlog_s=5.0), TICKS, comes_back=returns.__getitem__)
    assert outcome.waits
    assert sum(work_s for ended_s, work_s in outcome.done if ended_s <= 30.0) >= 0.95 * 30.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits",
    [replace(LIMITS, max_backlog_s=5.0, max_jobs=1000), LIMITS],
    ids=["backlog", "jobs"],
)
def test_a_herd_that_does_as_told_is_all_in_after_few_tries_and_little_longer_than_the_work_takes(
    limits: Limits,
) -> None:
    mix = random.Random(0)
    herd = [(0.0, plain(mix.choice([1, 2, 4, 8]), mix.choice([20, 20, 50]))) for _ in range(300)]
    outcome = serve(herd, limits, TICKS)
    assert len(outcome.entered) == 300
    assert median(outcome.tries.elements()) <= 3
    ideal_s = sum(work.places for _, work in herd) * TickTimes(TICKS).seconds_per_place(limits.max_batch)
    assert outcome.ended_s <= 1.3 * ideal_s


def test_a_newcomer_after_a_crowd_that_left_gets_in_as_soon_as_the_backlog_allows() -> None:
    crowd = [(0.0, plain(4, 50))] * 100
    newcomer_s = 4.0
    limits = replace(LIMITS, max_backlog_s=5.0, max_jobs=1000)
    outcome = serve([*crowd, (newcomer_s, plain(4, 50))], limits, TICKS, comes_back=lambda _number: False)
    assert outcome.entered[100] == newcomer_s
    assert outcome.waits
