import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tminus.service.scheduling.tick_times import TickTimes, smallest_batch_at

POINTS = ((1, 0.003), (2, 0.0033), (4, 0.005), (8, 0.009))


@pytest.mark.parametrize(
    ("places", "seconds"), [(1, 0.003), (2, 0.0033), (3, 0.00415), (8, 0.009), (12, 0.013), (16, 0.017)]
)
def test_times_between_and_beyond_the_points_are_on_straight_lines(places: int, seconds: float) -> None:
    assert TickTimes(POINTS).seconds(places) == pytest.approx(seconds)


def test_below_the_first_point_a_tick_costs_as_much_as_there() -> None:
    assert TickTimes(((4, 0.1), (8, 0.2))).seconds(1) == 0.1
    assert TickTimes(((8, 0.1),)).seconds(2) == 0.1


def test_beyond_a_single_point_the_time_is_in_proportion() -> None:
    assert TickTimes(((4, 0.1),)).seconds(8) == pytest.approx(0.2)


def test_beyond_a_last_point_that_noise_made_cheap_the_time_does_not_fall() -> None:
    assert TickTimes(((1, 0.2), (2, 0.1))).seconds(1000) == 0.1


def test_without_points_nothing_takes_time_and_nothing_is_learnt() -> None:
    times = TickTimes()
    assert times.seconds(8) == times.seconds_per_place(8) == 0
    assert times.observe(8, 1.0) == times


def test_seconds_per_place_are_those_of_a_full_tick() -> None:
    assert TickTimes(POINTS).seconds_per_place(8) == 0.009 / 8


@pytest.mark.parametrize(
    "points",
    [((2, 0.1), (1, 0.2)), ((1, 0.1), (1, 0.2)), ((0, 0.1),), ((1, -0.1),), ((1, math.nan),), ((1, math.inf),)],
)
def test_points_that_are_no_measurement_assert(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(AssertionError):
        TickTimes(points)


def test_the_times_follow_the_machine_slowly_at_any_number_of_places() -> None:
    times = TickTimes(POINTS)
    times = times.observe(2, 2 * 0.0033)
    assert 1 < times.seconds(8) / 0.009 < 1.05
    for _ in range(400):
        times = times.observe(2, 2 * 0.0033)
    assert times.seconds(8) == pytest.approx(2 * 0.009, rel=1e-2)


def test_one_tick_that_took_for_ever_moves_the_times_little() -> None:
    assert TickTimes(POINTS).observe(8, 3600.0).correction < 1.1


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_the_correction_stays_within_bounds(seconds: float) -> None:
    times = TickTimes(POINTS)
    for _ in range(5000):
        times = times.observe(8, seconds)
    assert 0.01 <= times.correction <= 100


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_a_negative_time_or_nan_is_not_learnt(seconds: float) -> None:
    assert TickTimes(POINTS).observe(8, seconds).correction == 1


@pytest.mark.parametrize(
    ("points", "best"),
    [
        (((1, 1.0), (2, 2.0), (4, 4.0)), 1),  # no gain
        (((1, 1.0), (2, 1.0), (4, 1.0)), 4),  # all gain
        (((1, 1.0), (8, 2.0), (16, 3.9), (32, 7.7)), 8),
        (((1, 0.5),), 1),
    ],
)
def test_the_smallest_batch_near_the_best_throughput_is_where_more_places_gain_little(
    points: tuple[tuple[int, float], ...], best: int
) -> None:
    assert smallest_batch_at(points) == best


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=8), st.floats(0.5, 1.0))
def test_the_batch_has_its_share_of_the_best_throughput_and_no_smaller_one_has(
    seconds: list[float], share: float
) -> None:
    points = [(2**k, s) for k, s in enumerate(seconds)]
    best = max(places / s for places, s in points)
    chosen = smallest_batch_at(points, share)
    assert dict(points)[chosen] <= chosen / (share * best) * (1 + 1e-12)
    assert all(places / s < share * best for places, s in points if places < chosen)
