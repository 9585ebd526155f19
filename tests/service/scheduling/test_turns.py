"""Whose tick is next, and that the forecast knows it: against the schedulers themselves, tick by tick."""

import random
import weakref
from collections import Counter
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tminus.service.scheduling.forecast import Pending, Speed, forecast
from tminus.service.scheduling.owners import Served
from tminus.service.scheduling.scheduler import RESERVED_SHARE, Policy, Scheduler, Sharing
from tminus.service.scheduling.tick_times import TickTimes
from tminus.service.scheduling.turns import Turns
from tminus.service.work import Outlook, Work

FAST, SLOW = 0, 1  # a model of which a tick takes 10 ms, and one of which it takes 100 ms
TICK_S = {FAST: 0.01, SLOW: 0.1}


def speed_of(model: int, policy: Policy = "srpt", max_batch: int = 8) -> Speed:
    times = TickTimes(((1, TICK_S[model] / 2), (max_batch, TICK_S[model])))
    sharing = Sharing.of(max_batch, policy, place_s=times.seconds_per_place(max_batch), times=times)
    return Speed(sharing, times, 1000)


def work(model: int, rows: int, steps: int) -> Work:
    return Work(rows, steps, range(0), model=model)


class Machine:
    """The models' schedulers, with a clock of predicted ticks."""

    def __init__(self, policy: Policy = "srpt") -> None:
        self.speeds = {model: speed_of(model, policy) for model in (FAST, SLOW)}
        arrivals, self.served = count(), Served()
        self.schedulers = {
            model: Scheduler(speed.sharing, arrivals, self.served) for model, speed in self.speeds.items()
        }
        self.turns = Turns()
        for model, scheduler in self.schedulers.items():
            self.turns.put(model, scheduler)
        self.now_s = 0.0
        self.time_s: Counter[int] = Counter()  # by model
        self.left: dict[str, int] = {}
        self.pending: list[Pending] = []
        self.ends: dict[str, float] = {}

    def add(self, name: str, job: Work, owner: str = "") -> None:
        self.schedulers[job.model].add(name, range(job.rows), job, owner=owner)
        self.left[name] = job.places
        self.pending.append(Pending(name, job, job.places, owner=owner))

    def tick(self) -> int | None:
        model = self.turns.next()
        if model is None:
            return None
        batch = self.schedulers[model].next_batch()
        assert batch is not None
        seconds = self.speeds[model].tick_times.seconds(batch.places)
        self.now_s += seconds
        self.time_s[model] += seconds  # type: ignore[assignment]
        for picked in batch.jobs:
            self.left[picked.job_id] -= picked.places
        self.ends |= dict.fromkeys(self.schedulers[model].advance(batch).finished, self.now_s)
        self.turns.stepped(model, seconds)
        return model

    def run(self) -> None:
        while self.tick() is not None:
            pass

    def forecast(self) -> dict[str, Outlook]:
        jobs = [replace(job, places_left=self.left[job.job_id]) for job in self.pending if self.left[job.job_id]]
        return forecast(jobs, self.speeds, had_s=self.served.of({job.owner for job in jobs}))


def test_with_nothing_to_do_nobody_has_the_next_tick() -> None:
    machine = Machine()
    assert machine.turns.next() is None
    assert not machine.turns.has_work


def test_the_shortest_job_in_seconds_goes_first_whichever_model_it_is_of() -> None:
    machine = Machine()
    machine.add("slow", work(SLOW, 1, 10))  # 10 places of 12.5 ms
    machine.add("fast", work(FAST, 8, 10))  # 80 places of 1.25 ms: more places, and less time
    assert machine.tick() == FAST
    machine.run()
    assert machine.ends["fast"] < machine.ends["slow"]


def test_in_order_of_arrival_the_first_job_goes_first() -> None:
    machine = Machine("fcfs")
    machine.add("slow", work(SLOW, 8, 10))
    machine.add("fast", work(FAST, 1, 1))
    machine.run()
    assert machine.ends["slow"] == pytest.approx(1.0)
    assert machine.ends["fast"] == pytest.approx(1.005)


@pytest.mark.parametrize(("oldest", "others"), [(SLOW, FAST), (FAST, SLOW)])
def test_the_model_of_the_oldest_job_has_a_quarter_of_the_time_while_shorter_ones_come(
    oldest: int, others: int
) -> None:
    machine = Machine()
    machine.add("oldest", work(oldest, 8, 100_000))
    for number in range(100):
        machine.add(f"short{number}", work(others, 4, 20))
        while machine.schedulers[others].has_work:
            machine.tick()
    share = machine.time_s[oldest] / machine.now_s
    assert share == pytest.approx(RESERVED_SHARE, abs=0.02)


def test_a_job_that_comes_to_a_busy_machine_waits_for_one_tick_of_the_other_model_at_first() -> None:
    machine = Machine()
    machine.add("long", work(SLOW, 8, 1000))
    for _ in range(10):
        machine.tick()
    began_s = machine.now_s
    machine.add("short", work(FAST, 1, 10))
    while "short" not in machine.ends:
        machine.tick()
    alone_s = 10 * machine.speeds[FAST].tick_times.seconds(1)
    assert machine.ends["short"] - began_s <= alone_s + TICK_S[SLOW] + 1e-9


def test_a_model_may_come_and_go() -> None:
    machine = Machine()
    machine.add("a", work(FAST, 1, 2))
    machine.run()
    machine.turns.remove(FAST)
    assert machine.turns.next() is None
    with pytest.raises(AssertionError):
        machine.turns.put(SLOW, Scheduler(machine.speeds[SLOW].sharing))
    machine.turns.put(FAST, machine.schedulers[FAST])
    machine.add("b", work(FAST, 1, 2))
    with pytest.raises(AssertionError):
        machine.turns.remove(FAST)
    assert machine.tick() == FAST


def test_a_model_that_is_gone_is_not_held() -> None:
    """A turn that was owed to its oldest job must not keep what the model has in memory."""

    class Model:
        pass

    arrivals, turns = count(), Turns[Model]()
    schedulers = [Scheduler(speed_of(kind).sharing, arrivals) for kind in (SLOW, FAST)]
    oldest, other = Model(), Model()
    for model, scheduler, steps in zip((oldest, other), schedulers, (50, 2), strict=True):
        turns.put(model, scheduler)
        scheduler.add(f"{steps} steps", range(1), work(FAST, 1, steps))
    turns.next()
    assert turns._owed == ("", oldest)
    schedulers[0].cancel("50 steps")
    turns.remove(oldest)
    gone = weakref.ref(oldest)
    del oldest, model
    assert gone() is None
    assert turns.has_work


# --- the forecast ---


@st.composite
def mixtures(draw: st.DrawFn) -> list[Work]:
    def one() -> Work:
        model, steps = draw(st.sampled_from([FAST, SLOW])), draw(st.sampled_from([5, 20, 50]) | st.integers(1, 100))
        start = draw(st.integers(0, steps - 1))
        guided = draw(st.sampled_from([range(0), range(0), range(steps), range(start, steps)]))
        return Work(draw(st.sampled_from([1, 1, 2, 4]) | st.integers(1, 16)), steps, guided, model=model)

    return [one() for _ in range(draw(st.integers(2, 10)))]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["srpt", "fcfs"])
def test_the_forecast_over_models_is_good_to_five_percent_or_a_few_ticks(policy: Policy) -> None:
    wrong: list[bool] = []

    @settings(deadline=None, max_examples=80, derandomize=True, database=None)
    @given(mixtures(), st.sampled_from([0, 0, 5, 50]))
    def compare(works: list[Work], ticks: int) -> None:
        machine = Machine(policy)
        for number, each in enumerate(works):
            machine.add(f"job{number}", each)
        for _ in range(ticks):
            machine.tick()
        outlooks, began_s = machine.forecast(), machine.now_s
        machine.run()
        assert outlooks.keys() == {name for name, end_s in machine.ends.items() if end_s > began_s}
        for name, outlook in outlooks.items():
            took_s = machine.ends[name] - began_s
            wrong.append(abs(outlook.eta_s - took_s) > max(0.05 * took_s, 3 * TICK_S[SLOW]) * (1 + 1e-9))
            assert 0 <= outlook.position < len(works)
        last_s = machine.now_s - began_s
        assert max((each.eta_s for each in outlooks.values()), default=0.0) == pytest.approx(last_s, rel=0.1, abs=0.4)

    compare()
    assert len(wrong) > 300
    assert sum(wrong) <= 0.03 * len(wrong)


@pytest.mark.parametrize("rows", [8, 1])
def test_two_owners_of_two_models_have_half_of_the_time_each_however_few_rows_one_has(rows: int) -> None:
    machine = Machine()
    machine.add("fast", work(FAST, rows, 100_000), owner="a")
    machine.add("slow", work(SLOW, 8, 10_000), owner="b")
    for _ in range(2000):
        machine.tick()
    assert machine.time_s[SLOW] / machine.now_s == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("others", [1, 2, 3])
def test_the_oldest_job_on_another_model_has_its_share_of_its_owners_time_whoever_else_there_is(others: int) -> None:
    machine = Machine()
    machine.add("oldest", work(SLOW, 8, 100_000), owner="a")
    for other in "bcd"[:others]:
        machine.add(f"long {other}", work(FAST, 8, 1_000_000), owner=other)
    machine.add("short", work(FAST, 8, 500_000), owner="a")
    for _ in range(8000):
        machine.tick()
    assert machine.time_s[SLOW] / machine.now_s >= 0.6 * RESERVED_SHARE / (1 + others)


@pytest.mark.slow
def test_the_forecast_over_models_and_owners_is_good_to_fifteen_percent_for_nearly_all_jobs() -> None:
    wrong: list[bool] = []

    @settings(deadline=None, max_examples=100, derandomize=True, database=None)
    @given(mixtures(), st.randoms(use_true_random=False))
    def compare(works: list[Work], rng: random.Random) -> None:
        machine = Machine()
        for number, each in enumerate(works):
            machine.add(f"job{number}", each, owner=rng.choice("ab"))
        outlooks = machine.forecast()
        machine.run()
        for name, outlook in outlooks.items():
            wrong.append(abs(outlook.eta_s - machine.ends[name]) > max(0.15 * machine.ends[name], 5 * TICK_S[SLOW]))
        last_s = max(machine.ends.values())
        assert max(each.eta_s for each in outlooks.values()) == pytest.approx(last_s, rel=0.15, abs=0.5)

    compare()
    assert len(wrong) > 300
    assert sum(wrong) <= 0.1 * len(wrong)


def test_a_short_job_is_told_that_it_overtakes_a_long_one_of_another_model() -> None:
    machine = Machine()
    machine.add("long", work(SLOW, 8, 1000))
    machine.add("short", work(FAST, 8, 100))
    outlooks = machine.forecast()
    machine.run()
    assert outlooks["short"].eta_s == pytest.approx(machine.ends["short"], abs=TICK_S[SLOW] + 0.01)
    assert outlooks["long"].eta_s == pytest.approx(101.0, rel=0.01)
