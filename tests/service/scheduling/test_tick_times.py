import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tminus.service.scheduling.tick_times import TickTimes, smallest_batch_at

POINTS = ((1, 0.003), (2, 0.0033), (4, 0.005), (8, 0.009))


@pytest.mark.parametrize(
    ("points", "places", "seconds"),
    [
        pytest.param(POINTS, 3, 0.00415, id="between points"),
        pytest.param(POINTS, 8, 0.009, id="at a point"),
        pytest.param(POINTS, 16, 0.017, id="beyond them, on the last line"),
        pytest.param(((4, 0.1), (8, 0.2)), 1, 0.1, id="below the first as much as there"),
        pytest.param(((4, 0.1),), 8, 0.2, id="beyond a single one in proportion"),
        pytest.param(((8, 0.1),), 2, 0.1, id="below a single one as much as there"),
        pytest.param(((1, 0.2), (2, 0.1)), 1000, 0.1, id="beyond one that noise made cheap no less"),
        pytest.param((), 8, 0.0, id="nothing without points"),
    ],
)
def test_times_are_on_straight_lines_between_the_points(
    points: tuple[tuple[int, float], ...], places: int, seconds: float
) -> None:
    assert TickTimes(points).seconds(places) == pytest.approx(seconds)
    assert TickTimes(points).seconds_per_place(places) == pytest.approx(seconds / places)


@pytest.mark.parametrize("points", [((2, 0.1), (1, 0.2)), ((0, 0.1),), ((1, -0.1),), ((1, math.nan),)])
def test_points_that_are_no_measurement_assert(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(AssertionError):
        TickTimes(points)


def test_the_times_follow_the_machine_slowly_at_any_number_of_places() -> None:
    times = TickTimes(POINTS).observe(2, 2 * 0.0033)
    assert 1 < times.seconds(8) / 0.009 < 1.05
    for _ in range(400):
        times = times.observe(2, 2 * 0.0033)
    assert times.seconds(8) == pytest.approx(2 * 0.009, rel=1e-2)
    assert TickTimes(POINTS).observe(8, 3600.0).correction < 1.1, "one tick that took for ever moves them little"
    assert TickTimes().observe(8, 1.0) == TickTimes(), "without points nothing is learnt"


@pytest.mark.parametrize("seconds", [0.0, 1e9, -1.0, math.nan])
def test_the_correction_stays_within_bounds(seconds: float) -> None:
    times = TickTimes(POINTS)
    for _ in range(5000):
        times = times.observe(8, seconds)
    assert 0.01 <= times.correction <= 100


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=8), st.floats(0.5, 1.0))
def test_the_batch_has_its_share_of_the_best_throughput_and_no_smaller_one_has(
    seconds: list[float], share: float
) -> None:
    points = [(2**k, s) for k, s in enumerate(seconds)]
    best = max(places / s for places, s in points)
    chosen = smallest_batch_at(points, share)
    assert dict(points)[chosen] <= chosen / (share * best) * (1 + 1e-12)
    assert all(places / s < share * best for places, s in points if places < chosen)
