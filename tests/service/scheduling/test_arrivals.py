"""An ETA counts on as much work as has come lately."""

from statistics import median, quantiles

import pytest

from bench.simulate import LIMITS, mixed, serve
from tminus.service.scheduling.forecast import WINDOW_S, WINDOWS, Arrivals


def come(arrivals: Arrivals, work_s: float, windows: int) -> None:
    """One job a second."""
    for second in range(int(windows * WINDOW_S)):
        arrivals.add(work_s, float(second))


def test_shorter_work_that_takes_half_of_the_machine_doubles_the_time() -> None:
    arrivals = Arrivals()
    come(arrivals, 0.5, WINDOWS)
    now_s = WINDOWS * WINDOW_S
    assert arrivals.stretch(0.51, now_s, 0.1) == pytest.approx(2.0)
    assert arrivals.stretch(0.5, now_s, 0.1) == 1.0, "what is as long comes after"


def test_a_job_has_its_share_in_any_case() -> None:
    arrivals = Arrivals()
    come(arrivals, 10, WINDOWS)
    assert arrivals.stretch(20, WINDOWS * WINDOW_S, 0.25) == 4.0


def test_a_burst_is_not_taken_to_go_on() -> None:
    arrivals = Arrivals()
    for _ in range(1000):
        arrivals.add(0.5, 25.0)
    assert arrivals.stretch(1, 35.0, 0.1) == 1.0


def test_what_came_long_ago_is_forgotten() -> None:
    arrivals = Arrivals()
    come(arrivals, 0.5, WINDOWS)
    assert arrivals.stretch(1, 2 * WINDOWS * WINDOW_S, 0.1) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.7, 0.85])
def test_under_a_steady_mix_what_was_told_is_about_what_it_takes(load: float) -> None:
    """Most jobs short, a few of a thousand steps. Nearly all are done in twice the time that they were told."""
    requests = mixed(load, 900.0, seed=3)
    outcome = serve(requests, LIMITS)
    for steps in (20, 50, 1000):
        found = [outcome.took[k] / outcome.told[k] for k, (_, work) in enumerate(requests) if work.steps == steps]
        assert 0.7 < median(found) < 1.35, steps
        assert quantiles(found, n=20)[-1] < 2.0, steps
