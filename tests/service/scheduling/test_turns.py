"""Whose tick is next."""

import weakref
from itertools import count

import pytest

from tests.service.scheduling.machine import Machine, plain, speed_of
from tminus.service.scheduling.scheduler import RESERVED_SHARE, ModelScheduler, Scheduler, TickTimes, Turn

FAST, SLOW = 0, 1  # a model of which a tick takes 10 ms, and one of which it takes 100 ms
TICK_S = {FAST: 0.01, SLOW: 0.1}


def machine_of() -> Machine:
    times = [TickTimes(((1, tick_s / 2), (8, tick_s))) for tick_s in TICK_S.values()]
    return Machine(*(speed_of(8, times=each) for each in times))


def test_the_shortest_job_in_seconds_goes_first_whichever_model_it_is_of() -> None:
    machine = machine_of()
    assert not machine.turns.has_work
    assert machine.turns.next() is None
    machine.add("slow", plain(1, 10, SLOW))  # 10 places of 12.5 ms
    machine.add("sfast", plain(8, 10, FAST))  # 80 places of 1.25 ms: more places, and less time
    assert machine.turns.next() == Turn(FAST, ("s", SLOW))
    machine.run()
    assert machine.ends["sfast"] < machine.ends["slow"]


@pytest.mark.parametrize(("oldest", "others"), [(SLOW, FAST), (FAST, SLOW)])
def test_the_model_of_the_oldest_job_has_a_quarter_of_the_time_while_shorter_ones_come(
    oldest: int, others: int
) -> None:
    machine = machine_of()
    machine.add("oldest", plain(8, 100_000, oldest))
    for number in range(100):
        machine.add(f"o{number}", plain(4, 20, others))
        while machine.schedulers[others].has_work:
            machine.step()
    assert machine.time_s[oldest] / machine.now_s == pytest.approx(RESERVED_SHARE, abs=0.02)


def test_a_job_that_comes_to_a_busy_machine_waits_for_one_tick_of_the_other_model_at_first() -> None:
    machine = machine_of()
    machine.add("jlong", plain(8, 1000, SLOW))
    for _ in range(10):
        machine.step()
    began_s = machine.now_s
    machine.add("jshort", plain(1, 10, FAST))
    while "jshort" not in machine.ends:
        machine.step()
    alone_s = 10 * machine.speeds[FAST].tick_s(1)
    assert machine.ends["jshort"] - began_s <= alone_s + TICK_S[SLOW] + 1e-9


@pytest.mark.parametrize("rows", [8, 1])
def test_two_owners_of_two_models_have_half_of_the_time_each_however_few_rows_one_has(rows: int) -> None:
    machine = machine_of()
    machine.add("a", plain(rows, 100_000, FAST))
    machine.add("b", plain(8, 10_000, SLOW))
    for _ in range(2000):
        machine.step()
    assert machine.time_s[SLOW] / machine.now_s == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("others", [1, 3])
def test_the_oldest_job_on_another_model_has_its_share_of_its_owners_time_whoever_else_there_is(others: int) -> None:
    machine = machine_of()
    machine.add("a oldest", plain(8, 100_000, SLOW))
    for other in "bcd"[:others]:
        machine.add(f"{other} long", plain(8, 1_000_000, FAST))
    machine.add("a short", plain(8, 500_000, FAST))
    for _ in range(8000):
        machine.step()
    assert machine.time_s[SLOW] / machine.now_s >= 0.6 * RESERVED_SHARE / (1 + others)


def test_a_model_may_come_and_go_and_is_not_held_then() -> None:
    """A turn that was owed to its oldest job must not keep what the model has in memory."""

    class Model:
        pass

    arrivals, turns = count(), ModelScheduler[Model]()
    schedulers = [Scheduler(speed_of().policy, arrivals) for _ in range(2)]
    oldest, other = Model(), Model()
    for model, scheduler, steps in zip((oldest, other), schedulers, (50, 2), strict=True):
        turns.put(model, scheduler)
        scheduler.add(f"{steps} steps", range(1), plain(1, steps))
    with pytest.raises(AssertionError):
        turns.put(oldest, schedulers[0])
    assert turns.next() == Turn(other, ("", oldest))
    with pytest.raises(AssertionError):
        turns.remove(oldest)
    schedulers[0].cancel("50 steps")
    turns.remove(oldest)
    gone = weakref.ref(oldest)
    del oldest, model
    assert gone() is None
    assert turns.has_work
