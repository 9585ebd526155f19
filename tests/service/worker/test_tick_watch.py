"""A running server doubts its measurements if real ticks are far from them."""

import logging

import pytest

from tminus.service.scheduling.scheduler import TickTimes
from tminus.service.worker.loaded_model import TickWatch

TIMES = TickTimes(((1, 0.01), (8, 0.04)), overlapped=0.5)


@pytest.mark.parametrize(("factor", "is_doubted"), [(1.0, False), (2.5, False), (3.5, True), (0.4, False), (0.3, True)])
@pytest.mark.parametrize(("places", "overlaps", "tick_s"), [(1, False, 0.01), (8, False, 0.04), (8, True, 0.02)])
def test_a_minute_of_ticks_three_times_off_is_told_once(
    factor: float, is_doubted: bool, places: int, overlaps: bool, tick_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[bool] = []
    watch = TickWatch(TIMES, lambda: told.append(True))
    seconds = factor * tick_s

    def work(for_s: float) -> None:
        for _ in range(round(for_s / seconds)):
            watch.ticked("the model", places, seconds, overlaps=overlaps)

    with caplog.at_level(logging.WARNING):
        work(59)
        assert not told, "a moment says little"
        work(200)
    assert told == [True] * is_doubted
    assert len(caplog.records) == is_doubted
